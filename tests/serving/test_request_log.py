"""A line for each request, which says nothing of what it says."""

import http.client
import re

import httpx

from litgpt.serving.request_log import printable
from tests.serving.conftest import PATIENCE, connect, raw_request, running, wait_for

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
LINE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d %s, \d+\.\d\d s"


def test_a_line_for_each_request(chat_directory):
    log: list[str] = []
    with running(chat_directory, log=log, api_key="k-secret") as server:
        wait_for(lambda: log)
        log.clear()
        headers = {"Authorization": "Bearer k-secret"}
        client = httpx.Client(base_url=server.url, headers=headers, timeout=PATIENCE)
        usage = client.post("/v1/chat/completions?key=k-secret", json={**CHAT, "n": 2}).json()["usage"]
        client.post("/v1/chat/completions", json={**CHAT, "stream": True})
        client.post("/predict", json={"prompt": "my words", "max_new_tokens": 3})
        client.head("/health")
        client.post("/v1/chat/completions", json={**CHAT, "secret_field": 1})
        httpx.get(f"{server.url}/my%20words%0A%1B%5B2J")
        httpx.post(f"{server.url}/v1/completions", headers={"Authorization": "Bearer wrong-key"})
        raw_request(server.url, b"my words\r\n\r\n")
        tokens = usage["prompt_tokens"]
        expected = [
            f"POST /v1/chat/completions 200, {tokens} tokens in, 8 out",
            f"POST /v1/chat/completions 200, {tokens} tokens in, 4 out",
            r"POST /predict 200, \d+ tokens in, 3 out",
            "HEAD /health 200",
            "POST /v1/chat/completions 422",
            "GET /my%20words%0A%1B%5B2J 401",
            "POST /v1/completions 401",
            "- - 400",
        ]
        wait_for(lambda: len(log) >= len(expected))
    assert len(log) == len(expected)
    for line, pattern in zip(log, expected, strict=True):
        assert re.fullmatch(LINE % pattern, line), line
    for secret in ("secret", "Hello", "wrong-key"):
        assert secret not in "".join(log)


def test_what_becomes_of_a_request_that_does_not_get_to_its_end(chat_directory):
    log: list[str] = []
    with running(chat_directory, log=log, largest_body=1000) as server:
        wait_for(lambda: log)
        log.clear()
        httpx.post(f"{server.url}/predict", json={"prompt": "x" * 2000})
        head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"
        with connect(server.url, head):  # goes away
            wait_for(lambda: server.server.connections._held)
        wait_for(lambda: len(log) == 2)
        assert "POST /predict 413, " in log[0]
        assert "POST /predict 499, " in log[1]
        assert 'path="/predict",status="499"' in httpx.get(f"{server.url}/metrics").text


def test_a_log_that_cannot_be_written_stops_nothing(chat_directory):
    def full(_: str) -> None:
        raise OSError(28, "No space left on device")

    with running(chat_directory) as server:
        server.service.requests.write = full
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=PATIENCE)
        for _ in range(2):  # on one connection, which an error would end
            connection.request("GET", "/health")
            response = connection.getresponse()
            assert response.status == 200
            response.read()
        connection.close()


def test_a_clients_words_are_shown_on_one_line():
    assert printable("/a\nb\x1b[31m\u2028\x7f\x00") == "/a\\nb\\x1b[31m\\u2028\\x7f\\x00"
    assert printable("/caf\xe9") == "/caf\xe9"
    assert len(printable("/" * 10_000)) < 300
