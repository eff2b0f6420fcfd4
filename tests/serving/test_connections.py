"""Clients that take and do not give: idle, slow, unread and unfinished; others are served meanwhile."""

import contextlib
import errno
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from litgpt.serving.connections import Limits, Phase
from tests.serving.conftest import PATIENCE, Brake, connect, raw_request, running, wait_for, wait_until_ready

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "temperature": 0}
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "


def drip(connection: socket.socket, part: bytes) -> None:
    """Sends a little again and again, until the server does not want it any more."""
    with contextlib.suppress(OSError):
        while True:
            connection.sendall(part)
            time.sleep(0.02)


def last_words(connection: socket.socket) -> bytes:
    """What the server says until it closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            received += part
    return received


SLOW = {
    "nothing": ((), None, b""),
    "blank lines": ((), b"\r\n", b"HTTP/1.1 400 "),
    "headers that stop": ((b"GET /health HTTP/1.1\r\nHo",), None, b"HTTP/1.1 408 "),
    "headers without end": ((b"GET /health HTTP/1.1\r\nX: ",), b"x", b"HTTP/1.1 408 "),
    "a body that stops": ((HEAD + b'1000\r\n\r\n{"a":',), None, b"HTTP/1.1 408 "),
    "a body without end": ((HEAD + b"1000000\r\n\r\n",), b" ", b"HTTP/1.1 408 "),
    "chunks without end": ((HEAD[:-16] + b"Transfer-Encoding: chunked\r\n\r\n",), b"1\r\n \r\n", b"HTTP/1.1 408 "),
    "a body that nobody asked for": ((b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n",), b" ", b"HTTP/1.1 200 "),
    "a second request that stops": ((b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /hea",), None, b"HTTP/1.1 200 "),
}  # fmt: skip


@pytest.mark.parametrize("what", SLOW)
def test_who_does_not_get_on_is_ended(chat_directory, what):
    sent, more, answer = SLOW[what]
    log = []
    with running(chat_directory, limits=Limits(idle=0.3, head=0.3, body=0.3, body_rate=1e4), log=log) as server:
        with connect(server.url, *sent) as connection:
            if more is not None:
                threading.Thread(target=drip, args=(connection, more), daemon=True).start()
            words = last_words(connection)
        assert words.startswith(answer)
        assert bool(words) == bool(answer)
        if b"408" in answer:
            assert b"connection: close" in words
            assert json.loads(words.partition(b"\r\n\r\n")[2])["error"]["code"] == "timeout"
            wait_for(lambda: any(" 408" in line for line in log))
        wait_for(lambda: not server.server.server_state.connections)
        wait_for(lambda: not server.server.server_state.tasks)


def test_a_body_that_gets_on_may_take_its_time(chat_directory):
    body = json.dumps({**CHAT, "user": "x" * 3000}).encode()
    head = HEAD + str(len(body)).encode() + b"\r\nConnection: close\r\n\r\n"
    limits = Limits(idle=0.2, head=0.2, body=0.2, body_rate=100)
    with running(chat_directory, limits=limits) as server, connect(server.url, head) as connection:
        for start in range(0, len(body), 400):
            connection.sendall(body[start : start + 400])
            time.sleep(0.1)  # in all longer than the limit for nothing
        assert last_words(connection).startswith(b"HTTP/1.1 200")


def test_an_answer_may_take_longer_than_any_of_it(chat_directory):
    limits = Limits(idle=0.2, head=0.2, body=0.2, unread=0.2)
    with running(chat_directory, limits=limits) as server:
        brake = Brake(server)
        done = []
        asking = threading.Thread(
            target=lambda: done.append(httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, timeout=PATIENCE))
        )
        asking.start()
        wait_for(lambda: brake.steps)
        time.sleep(1.5)
        brake.release()
        asking.join(PATIENCE)
        assert done[0].status_code == 200


def test_who_does_not_read_is_ended(chat_directory):
    with running(chat_directory, limits=Limits(unread=0.3)) as server:
        ask = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 500
        with connect(server.url) as connection:
            connection.settimeout(1)
            with contextlib.suppress(OSError):
                while True:
                    connection.sendall(ask)
            wait_for(lambda: not server.server.server_state.connections)
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_the_oldest_that_owes_a_request_goes_for_a_new_one(chat_directory):
    limits = Limits(connections=6, fresh=0)
    with running(chat_directory, limits=limits, slots=1) as server:
        brake = Brake(server)
        with contextlib.ExitStack() as stack:
            body = json.dumps(CHAT).encode()
            asked = stack.enter_context(connect(server.url, HEAD + f"{len(body)}\r\n\r\n".encode() + body))
            wait_for(lambda: brake.steps)
            state = server.server.server_state
            half = stack.enter_context(connect(server.url, HEAD + b"99\r\n\r\n{"))
            wait_for(lambda: len(state.connections) == 2)
            idle = []
            for count in range(3, 7):
                idle.append(stack.enter_context(connect(server.url)))
                wait_for(lambda count=count: len(state.connections) == count)
            assert httpx.get(f"{server.url}/health").json()["running"] == 1
            assert last_words(idle[0]) == b""  # before any that has a request, or is newer
            for connection in (*idle[1:], half):
                connection.settimeout(0.05)
                with pytest.raises(TimeoutError):
                    connection.recv(1)
            idle.append(stack.enter_context(connect(server.url)))  # in the place of what asked for /health
            for connection in idle[1:]:
                connection.sendall(b"GET /")  # now they are newer, and none is without a request
            wait_for(lambda: sum(one.phase is Phase.HEAD for one in state.connections) == 4)
            stack.enter_context(connect(server.url))
            half.settimeout(PATIENCE)
            assert last_words(half).startswith(b"HTTP/1.1 503")
            assert len(state.connections) <= 6
            brake.release()
            asked.settimeout(PATIENCE)
            assert asked.recv(12) == b"HTTP/1.1 200"  # what is being answered stays


def test_a_crowded_server_keeps_no_connection_alive(chat_directory):
    two = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 2
    with running(chat_directory, limits=Limits(connections=1)) as server:
        answers = raw_request(server.url, two)
        assert answers.count(b"HTTP/1.1 200") == 1
        assert b"connection: close" in answers
    with running(chat_directory) as server, connect(server.url, two) as connection:
        answers = b""
        while answers.count(b"HTTP/1.1 200") < 2:
            answers += connection.recv(65536)
        assert b"connection: close" not in answers


def test_who_does_not_read_goes_for_a_new_one(chat_directory):
    with running(chat_directory, limits=Limits(fresh=0.1)) as server, connect(server.url) as unread:
        unread.settimeout(1)
        with contextlib.suppress(OSError):
            while True:
                unread.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 500)
        [connection] = server.server.server_state.connections
        wait_for(lambda: connection.owes_since < connection.loop.time() - 0.1)
        assert connection.phase is Phase.ANSWER
        server.server.connections.most = 1
        assert httpx.get(f"{server.url}/health", timeout=PATIENCE).status_code == 200
        assert connection not in server.server.server_state.connections


def test_unfinished_bodies_take_so_much_memory_together(chat_directory):
    limits = Limits(bodies=1_000_000)
    with running(chat_directory, limits=limits) as server, contextlib.ExitStack() as stack:
        large = HEAD + b"900000\r\n\r\n" + b" " * 400_000
        connections = [stack.enter_context(connect(server.url, large)) for _ in range(2)]
        wait_for(lambda: server.server.connections._held >= 800_000)
        last = stack.enter_context(connect(server.url, large))
        answers = last_words(connections[0])
        assert answers.startswith(b"HTTP/1.1 503")
        assert b"too_many_bodies" in answers
        assert httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, timeout=PATIENCE).status_code == 200
        rest = b" " * (500_000 - len(json.dumps(CHAT))) + json.dumps(CHAT).encode()
        last.sendall(rest)
        assert last.recv(12) == b"HTTP/1.1 200"
        connections[1].close()
        wait_for(lambda: server.server.connections._held == 0)


def test_no_more_connections_than_there_are_descriptors(chat_directory, tmp_path):
    """A process with 64 descriptors, and 300 clients of each kind that never say a whole request."""
    log = tmp_path / "log"
    command = [sys.executable, "-m", "litgpt", "serve", str(chat_directory), "--precision", "32-true", "--port", "0"]
    with open(log, "w") as file:
        process = subprocess.Popen(
            command,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
        )
    try:
        wait_for(lambda: "http://" in log.read_text() or process.poll() is not None)
        url = "http://" + log.read_text().partition("http://")[2].split()[0]
        wait_until_ready(url)
        said = len(log.read_text().splitlines())
        clients = []
        for start in ((), (b"GET /health HTTP/1.1\r\nHo",), (HEAD + b"9000\r\n\r\n{",)):
            for _ in range(300):
                with contextlib.suppress(ConnectionError):
                    clients.append(connect(url, *start))
            assert httpx.get(f"{url}/health", timeout=PATIENCE).status_code == 200
            reply = httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=PATIENCE)
            assert reply.status_code == 200
        lines = log.read_text().splitlines()[said:]
        assert len(lines) <= 1 + 6 + 600  # one a request, and one for all that could not be taken
        assert not [line for line in lines if "Traceback" in line or "resource" in line]
    finally:
        process.kill()
        process.wait()
        for client in clients:
            client.close()


def test_no_descriptor_left_is_said_once_and_passes(chat_directory, caplog):
    with running(chat_directory) as server:
        idle = connect(server.url)
        wait_for(lambda: server.server.server_state.connections)
        calls = []
        loop = server.server.connections._tasks[0].get_loop()
        accept = loop.sock_accept

        async def none_left(listener):
            calls.append(listener)
            if len(calls) < 5:
                raise OSError(errno.EMFILE, "Too many open files")
            return await accept(listener)

        loop.sock_accept = none_left
        assert httpx.get(f"{server.url}/health").status_code == 200  # ends the call that waits for a connection
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert last_words(idle) == b""  # made room
        assert len(calls) >= 5
    assert [record.getMessage() for record in caplog.records].count(
        "no connection can be taken: Too many open files (said once a minute)"
    ) == 1
