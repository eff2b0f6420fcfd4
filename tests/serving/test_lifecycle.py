"""From the first second to the last: 503 while it loads, a graceful end, the command."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from litgpt import LLM
from litgpt.serving.server import listen
from tests.serving.conftest import PATIENCE, Brake, connect, running, wait_for, wait_until_ready
from tests.training.test_tensor_parallel import followers

POST = (
    b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 15\r\n\r\n"
    b'{"prompt": "x"}'
)
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 300, "temperature": 0, "ignore_eos": True}


def test_it_listens_at_once_and_says_what_it_waits_for(chat_directory):
    loaded = threading.Event()

    def before_loading():
        loaded.wait(PATIENCE)

    with running(chat_directory, before_loading=before_loading) as server:
        server.service.say("loading the weights")
        health = httpx.get(f"{server.url}/health")
        assert health.status_code == 503
        assert health.json()["status"] == "loading"
        assert health.json()["progress"] == "loading the weights"
        for path in ("/v1/chat/completions", "/predict"):
            response = httpx.post(server.url + path, json={**CHAT, "prompt": "x"} if path[1] == "p" else CHAT)
            assert response.status_code in (422, 503)
        response = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, timeout=PATIENCE)
        assert response.status_code == 503
        assert "loading the weights" in response.json()["error"]["message"]
        assert "retry-after" in response.headers
        assert httpx.get(f"{server.url}/v1/models").status_code == 503
        assert "litgpt_ready 0.0" in httpx.get(f"{server.url}/metrics").text
        loaded.set()
        wait_until_ready(server.url)
        assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
        assert httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, timeout=PATIENCE).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_graceful_end_finishes_what_runs_and_waits(chat_directory, stream):
    with running(chat_directory, slots=1) as server:
        brake = Brake(server)
        results = []

        def ask() -> None:
            response = httpx.post(
                f"{server.url}/v1/chat/completions", json={**CHAT, "stream": stream}, timeout=PATIENCE
            )
            results.append(response)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_for(lambda: server.service.taken == 2)
        server.server.stop()
        brake.release()
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive()
        for thread in threads:
            thread.join(PATIENCE)
        assert [response.status_code for response in results] == [200, 200]
        if stream:
            assert all(response.text.endswith("data: [DONE]\n\n") for response in results)
        else:
            assert [response.json()["usage"]["completion_tokens"] for response in results] == [300, 300]
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")


def test_a_port_that_is_taken_is_said(chat_directory):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"host=127.0.0.1 port={port}: cannot listen there"):
            listen("127.0.0.1", port)
    with pytest.raises(ValueError, match="port=70000 is not valid"):
        listen("127.0.0.1", 70000)
    with pytest.raises(ValueError, match=r"host=nowhere\.invalid is not an address"):
        listen("nowhere.invalid", 0)


def start(*words: str, **variables: str) -> tuple[subprocess.Popen, str]:
    """`litgpt serve`, and its address once it has said it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "litgpt", "serve", *words, "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )
    line = process.stderr.readline()
    found = re.search(r"http://[\d.:]+", line)
    assert found, line + process.stderr.read()
    return process, found[0]


def test_it_ends_where_a_process_that_has_a_part_of_the_model_is_gone(chat_directory):
    options = ("--devices", "2", "--generate_strategy", "tensor_parallel", "--accelerator", "cpu")
    process, url = start(str(chat_directory), "--precision", "32-true", *options)
    try:
        wait_until_ready(url)
        reply = httpx.post(f"{url}/v1/chat/completions", json={**CHAT, "max_tokens": 12}, timeout=PATIENCE).json()
        expected = LLM.load(chat_directory, precision="32-true").chat(CHAT["messages"], 12, temperature=0)
        assert reply["choices"][0]["message"]["content"] == expected
        (other,) = followers(process.pid)
        os.kill(other, signal.SIGKILL)
        assert process.wait(PATIENCE) == 1
        assert "error: Rank 1, a process that has a part of the model, is gone" in process.stderr.read()
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_the_command_serves_and_ends_by_a_signal(chat_directory):
    process, url = start(str(chat_directory), "--precision", "32-true", LITGPT_API_KEY="k-secret")
    try:
        assert httpx.get(f"{url}/health").status_code in (200, 503)
        wait_until_ready(url)
        headers = {"Authorization": "Bearer k-secret"}
        assert httpx.post(f"{url}/predict", json={"prompt": "x"}, timeout=PATIENCE).status_code == 401
        output = httpx.post(f"{url}/predict", json={"prompt": "x"}, headers=headers, timeout=PATIENCE).json()["output"]
        assert output
        models = httpx.get(f"{url}/v1/models", headers=headers).json()["data"]
        assert [model["id"] for model in models] == ["tiny-random"]
        body = {**CHAT, "model": str(chat_directory), "max_tokens": 3}
        assert httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=PATIENCE).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        said = process.stderr.read()
        assert "k-secret" not in said
        assert "Traceback" not in said
    finally:
        process.kill()
        process.stderr.close()


HASHING = 'hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)'  # minutes, in which no handler of a signal is run
MULTIPLYING = "while True: torch.ones(500, 500) @ torch.ones(500, 500)"  # C++ that cannot be left behind
UNENDING = """
import hashlib, sys, torch
from litgpt.{module} import {name} as owner

def stuck(*_, **__):
    print("stuck", file=sys.stderr, flush=True)
    {work}

owner.{method} = stuck
from litgpt.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@contextlib.contextmanager
def stuck(
    directory: Path, module: str, name: str, method: str, *options: str, work: str = HASHING
) -> Iterator[tuple[subprocess.Popen, str]]:
    """`litgpt serve`, where a method of the server never returns; the process, and its address."""
    code = UNENDING.format(module=module, name=name, method=method, work=work)
    words = ["serve", str(directory), "--precision", "32-true", "--port", "0", *options]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        line = process.stderr.readline()
        assert "http://" in line, line + process.stderr.read()
        yield process, re.search(r"http://[\d.:]+", line)[0]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def until(process: subprocess.Popen, word: str) -> None:
    """Reads what a process says up to a word."""
    for line in process.stderr:
        if word in line:
            return
    raise AssertionError(f"it does not say {word!r}")


def test_a_signal_ends_it_while_it_loads(chat_directory):
    # in the loading thread
    with stuck(chat_directory, "serving.service", "Service", "ready", work=MULTIPLYING) as (process, _):
        until(process, "stuck")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        assert process.stderr.read() == ""


@pytest.mark.parametrize("place", [("llm.codec.Codec", "encode"), ("serving.service.Service", "model")])
@pytest.mark.parametrize("leaves", [False, True])
def test_whatever_it_is_busy_with_a_signal_ends_it(chat_directory, place, leaves):
    """In a thread next to the event loop, and in the event loop itself; the client may have gone or not."""
    (module, _, name), method = place[0].rpartition("."), place[1]
    with stuck(chat_directory, module, name, method, "--shutdown_timeout", "0.5") as (process, url):
        if method == "encode":
            wait_until_ready(url)
        else:
            until(process, "is ready")
        connection = connect(url, POST)
        until(process, "stuck")
        if leaves:
            connection.close()
        if method == "encode":
            assert httpx.get(f"{url}/health", timeout=PATIENCE).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        connection.close()


ENTERED = ("generation.worker.Worker", "submit")  # counts as being answered


@pytest.mark.parametrize("place", [("llm.codec.Codec", "encode"), ("serving.service.Service", "model"), ENTERED])
def test_two_interrupts_end_it_at_once(chat_directory, place):
    (module, _, name), method = place[0].rpartition("."), place[1]
    with stuck(chat_directory, module, name, method, "--shutdown_timeout", "100000") as (process, url):
        until(process, "is ready")
        with connect(url, POST):
            until(process, "stuck")
            process.send_signal(signal.SIGINT)
            if method == "submit":
                until(process, "Finishing 1 answers, for at most 100000 seconds. Ctrl-C ends it at once.")
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE) == 130


@pytest.mark.parametrize("stream", [False, True])
def test_what_runs_too_long_is_ended_and_told_so(chat_directory, stream):
    with running(chat_directory, grace=0.5) as server:
        brake = Brake(server, after=5)
        results = []

        def ask() -> None:
            body = {**CHAT, "stream": stream}
            results.append(httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=PATIENCE))

        thread = threading.Thread(target=ask)
        thread.start()
        half = connect(server.url, POST[:-5])  # whose request is not waited for at all
        wait_for(lambda: brake.steps > 5)
        server.server.stop()
        thread.join(PATIENCE)
        brake.release()
        server.thread.join(PATIENCE)
        assert half.recv(12) == b"HTTP/1.1 503"
        half.close()
        assert "The server is shutting down." in results[0].text
        assert results[0].status_code == (200 if stream else 503)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_queue", "-1"], "--max_queue -1 is not valid"),
        (["--temperature", "-1"], "temperature -1.0 is not valid"),
        (["--devices", "2"], "--devices 2 is not supported without --generate_strategy"),
        (
            ["--devices", "2", "--generate_strategy", "tensor_parallel", "--compile", "true"],
            "--compile true cannot be combined with",
        ),
        (["--devices", "3", "--generate_strategy", "sequential"], "--devices 3: tiny-random has 2 blocks"),
        (["--generate_strategy", "sequential"], "--generate_strategy sequential is not supported"),
        (["--api_path", "/health"], "--api_path /health is taken"),
    ],
)
def test_options_that_cannot_act_are_refused(chat_directory, capsys, options, message):
    from litgpt.__main__ import main

    assert main(["serve", str(chat_directory), *options]) in (1, 2)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn"])
def test_without_its_packages_the_help_is_there_and_the_command_says_what_to_install(chat_directory, missing):
    code = f"""
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from litgpt.__main__ import main

for words in (["--help"], ["serve", "--help"]):
    assert main(words) == 0
assert main(["serve", {str(chat_directory)!r}, "--port", "0"]) == 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--max_batch_size" in done.stdout
    assert done.stderr.strip() == (
        f"error: the Python package {missing!r} is not installed: pip install 'litgpt[all]' or pip install {missing}"
    )


def test_a_checkpoint_that_is_not_there_ends_the_command(tmp_path, capsys):
    from litgpt.__main__ import main

    assert main(["serve", str(tmp_path / "nothing"), "--port", "0"]) == 1
    error = capsys.readouterr().err
    assert "nothing" in error
    assert "Listening" not in error
    assert "Traceback" not in error


@pytest.mark.parametrize("damaged", ["lit_model.pth", "tokenizer.json"])
def test_what_only_loading_finds_is_all_that_is_said(chat_directory, tmp_path, capsys, damaged):
    from litgpt.__main__ import main

    shutil.copytree(chat_directory, tmp_path / "chat")
    content = (tmp_path / "chat" / damaged).read_bytes()
    (tmp_path / "chat" / damaged).write_bytes(content[: len(content) // 2])
    assert main(["serve", str(tmp_path / "chat"), "--port", "0"]) == 1
    loading, *rest = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"Loading \S+; http://127.0.0.1:\d+ answers 503 until it is there.", loading)
    assert rest[0].startswith("error: ")
    assert not [line for line in rest if "Listening" in line or "Traceback" in line or "ready" in line]


FAILING = """
import asyncio, logging, os, sys, threading
from litgpt.serving.service import Service

key = os.environ["LITGPT_API_KEY"]

def fail():
    raise RuntimeError(f"failed, with {key}")

def state(_):
    threading.Thread(target=fail).start()
    logging.getLogger("anything").error("logged, with %s", key)
    asyncio.get_running_loop().call_soon(fail)
    print("printed, with", key, file=sys.stderr)
    raise RuntimeError(f"in a request, with {key}")

Service.state = property(state)
from litgpt.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_no_key_is_in_what_the_server_prints(chat_directory):
    """Whatever goes wrong, and whoever writes of it: Python itself, uvicorn, asyncio, or a library."""
    key = "sk-1234567890abcdef"
    process = subprocess.Popen(
        [sys.executable, "-c", FAILING, "serve", str(chat_directory), "--precision", "32-true", "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LITGPT_API_KEY": key},
    )
    try:
        url = re.search(r"http://[\d.:]+", process.stderr.readline())[0]
        until(process, "Listening")
        assert httpx.get(f"{url}/health", timeout=PATIENCE).status_code == 500
        httpx.get(f"{url}/static/{key}", timeout=PATIENCE)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=PATIENCE)[1]
    finally:
        process.kill()
        process.wait()
    assert key not in said
    for what in ("in a request, with ***", "logged, with ***", "printed, with ***", "/static/***"):
        assert what in said
    assert said.count("RuntimeError: failed, with ***") == 2  # of the thread, and of asyncio
