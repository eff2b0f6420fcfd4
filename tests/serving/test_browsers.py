"""What browsers ask: under which name (DNS rebinding), from which page (CORS), and with HEAD."""

import httpx
import pytest

from litgpt.serving.guard import HostCheck, host_name
from tests.serving.conftest import PATIENCE, raw_request, running

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "temperature": 0}
PAGE = "https://app.example"


@pytest.fixture(scope="module")
def guarded(chat_directory):
    with running(chat_directory, hosts=["models.example", "*.lan"], origins=[PAGE], api_key="k") as server:
        yield server


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("localhost", "localhost"),
        ("LOCALHOST.:8000", "localhost"),
        ("[::1]", "::1"),
        ("[::1]:8000", "::1"),
        ("127.0.0.1:8000", "127.0.0.1"),
        ("evil.example:localhost", "evil.example:localhost"),
        ("", ""),
    ],
)
def test_the_name_in_a_host_header(host, name):
    assert host_name(host) == name


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:9999", 200),
        ("models.localhost", 200),
        ("127.0.0.1", 200),
        ("127.1.2.3:80", 200),
        ("[::1]:8000", 200),
        ("models.example", 200),
        ("Models.Example:443", 200),
        ("a.b.lan", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("xmodels.example", 403),
        ("notlan", 403),
        ("10.0.0.1", 403),
        ("\xe9vil.example", 403),
    ],
)
@pytest.mark.parametrize("path", ["/health", "/", "/nowhere"])
def test_only_names_that_it_goes_by_are_answered(guarded, host, status, path):
    response = httpx.get(guarded.url + path, headers={"Host": host.encode("latin-1")})
    if status == 403:
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "host_not_allowed"
        assert "--allowed_hosts" in response.json()["error"]["message"]
    else:
        assert response.status_code == {"/health": 200, "/": 200, "/nowhere": 401}[path]


def test_without_a_name_nobody_can_have_been_misled(guarded):
    assert raw_request(guarded.url, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")
    double = b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n"
    assert raw_request(guarded.url, double).startswith(b"HTTP/1.1 400")


def test_any_name():
    assert HostCheck(None, ["*"]).goes_by("evil.example")
    assert not HostCheck(None, []).goes_by("evil.example")


def test_a_page_that_may_use_it_can(guarded):
    ask = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    ask["Access-Control-Request-Headers"] = "authorization, content-type, x-stainless-lang"
    for path in ("/v1/chat/completions", "/predict"):
        answer = httpx.options(guarded.url + path, headers=ask)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert answer.headers["access-control-allow-headers"] == ask["Access-Control-Request-Headers"]
    for key, status in (("k", 200), ("wrong", 401)):
        headers = {"Origin": PAGE, "Authorization": f"Bearer {key}"}
        answer = httpx.post(f"{guarded.url}/v1/chat/completions", json=CHAT, headers=headers, timeout=PATIENCE)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == PAGE


def test_another_page_cannot(guarded, served):
    ask = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    for server in (guarded, served):  # the second was told of none
        answer = httpx.options(f"{server.url}/v1/chat/completions", headers=ask)
        assert answer.status_code >= 400
        assert "access-control-allow-origin" not in answer.headers
        answer = httpx.get(f"{server.url}/health", headers=ask)
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("path", ["/health", "/", "/docs", "/openapi.json", "/metrics", "/v1/models", "/v1/models/x"])
def test_head_says_what_get_would(served, path):
    get, head = httpx.get(served.url + path), httpx.head(served.url + path)
    assert head.status_code == get.status_code
    assert head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]
    assert int(head.headers["content-length"]) > 0


def test_head_asks_for_no_answer(served):
    assert httpx.head(f"{served.url}/v1/chat/completions").status_code == 405


@pytest.mark.parametrize("origin", ["example.com", "https://example.com/app", "https://", "https://a b"])
def test_what_is_no_origin_is_refused(chat_directory, capsys, origin):
    from litgpt.__main__ import main

    assert main(["serve", str(chat_directory), "--cors_origins", origin]) in (1, 2)
    assert f"--cors_origins {origin} is no origin" in capsys.readouterr().err
