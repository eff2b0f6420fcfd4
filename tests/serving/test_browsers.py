"""What browsers ask: under which name (DNS rebinding), from which page (CORS), and with HEAD."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from litgpt.serving.connections import Limits
from litgpt.serving.guard import HostCheck, host_name
from litgpt.serving.origins import Origins
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
    assert f"--cors_origins {origin} is not an origin" in capsys.readouterr().err


# -- every answer, from whatever place in the server, can be read by a page that may


def fails_for_nobody(*_):
    raise RuntimeError("nobody has foreseen this")


@pytest.mark.parametrize("allowed", [PAGE, "*"])
def test_every_answer_says_who_may_read_it(chat_directory, monkeypatch, allowed):
    log, limits = [], Limits(body=0.2, body_rate=1e9)
    options = {"hosts": [], "origins": [allowed], "largest_body": 5000, "limits": limits, "log": log}
    origin = f"\r\nOrigin: {PAGE}\r\n".encode()
    post = b"POST /predict HTTP/1.1" + origin + b"Host: localhost\r\n"
    requests = {
        200: b"GET /health HTTP/1.0" + origin + b"\r\n",
        400: post + b"Transfer-Encoding: chunked\r\n\r\nno length\r\n",
        403: post.replace(b"localhost", b"evil.example") + b"Content-Length: 0\r\n\r\n",
        404: b"GET /nothing HTTP/1.0" + origin + b"\r\n",
        405: post.replace(b"/predict", b"/health") + b"Content-Length: 0\r\n\r\n",
        408: post + b"Content-Length: 5\r\n\r\n",
        413: post + b"Content-Length: 6000\r\n\r\n",
        422: post + b"Content-Length: 2\r\n\r\n[]",
        500: post + b'Content-Length: 15\r\n\r\n{"prompt": "x"}',
    }
    with running(chat_directory, **options) as server:
        monkeypatch.setattr(server.service, "model", fails_for_nobody)
        for status, request in requests.items():
            answer = raw_request(server.url, request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
            assert answer.startswith(b"HTTP/1.1 %d" % status), answer
            headers = answer.lower().partition(b"\r\n\r\n")[0].split(b"\r\n")
            assert headers.count(b"access-control-allow-origin: " + allowed.encode()) == 1, answer
            assert headers.count(b"access-control-expose-headers: retry-after") == 1, answer
    assert any("POST /predict 500" in line for line in log), log


# -- a page of others makes it do nothing, though browsers send some of its requests without asking


@pytest.mark.parametrize("kind", ["application/json", "text/plain", "application/x-www-form-urlencoded", None])
@pytest.mark.parametrize("path", ["/predict", "/v1/chat/completions", "/v1/completions"])
def test_a_page_of_others_is_not_answered(served, guarded, kind, path):
    headers = {"Origin": "https://evil.example"} | ({"Content-Type": kind} if kind else {})
    for server in (served, guarded):
        answer = httpx.post(server.url + path, content=b'{"prompt": "x"}', headers=headers, timeout=PATIENCE)
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "origin_not_allowed"
        assert "--cors_origins https://evil.example" in answer.json()["error"]["message"]
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("headers", "is_answered"),
    [
        ({}, True),
        ({"origin": PAGE}, True),
        ({"origin": "https://app.example.evil.example"}, False),
        ({"origin": "http://app.example"}, False),
        ({"origin": "null"}, False),  # of a file, or of a frame that hides where it is from
        ({"origin": "http://localhost:8000", "host": "localhost:8000"}, True),
        ({"origin": "http://localhost:8000", "host": "LOCALHOST:8000"}, True),
        ({"origin": "http://localhost:3000", "host": "localhost:8000"}, False),
        ({"origin": "http://127.0.0.1:8000", "host": "localhost:8000"}, False),
        ({"origin": "https://models.example", "host": "models.example"}, True),  # behind a proxy
        ({"origin": "https://models.example", "host": "models.example:443"}, True),
        ({"origin": "https://models.example", "host": "models.example:80"}, False),
        ({"origin": "http://[::1]:8000", "host": "[::1]:8000"}, True),
        ({"origin": "http://[::1:8000", "host": "[::1]:8000"}, False),
        ({"origin": "http://x:99999", "host": "x:99999"}, False),
        ({"origin": "", "host": ""}, False),
        ({"origin": "app://x", "host": "x"}, False),
        ({"origin": "https://models.example", "host": "127.0.0.1:8000", "sec-fetch-site": "same-origin"}, True),
        ({"origin": "http://models.lan", "host": "127.0.0.1:8000", "x-forwarded-host": "models.lan"}, True),
        ({"origin": "http://models.lan", "host": "127.0.0.1", "x-forwarded-host": "models.lan, inner:80"}, True),
        ({"origin": "http://evil.example", "host": "127.0.0.1:8000", "x-forwarded-host": "models.lan"}, False),
        ({"origin": "http://models.lan", "host": "127.0.0.1:8000"}, False),
        ({"sec-fetch-site": "none"}, True),
        ({"sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "same-site"}, False),
    ],
)
def test_the_page_that_a_request_comes_from(headers, is_answered):
    assert Origins([PAGE]).allow(headers) == is_answered
    assert Origins(["*"]).allow(headers)


def test_curl_needs_no_header(served):
    """The line of the page, as curl sends it: it calls the body a form."""
    page = (Path(__file__).parents[2] / "tutorials" / "deploy.md").read_text()
    (line,) = re.findall(r"^curl .*", page, re.MULTILINE)
    words = shlex.split(line.replace("http://127.0.0.1:8000", served.url))
    assert words[:3] == ["curl", f"{served.url}/predict", "-d"]
    if shutil.which("curl"):
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=True)
        answer = json.loads(done.stdout)
    else:
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        answer = httpx.post(words[1], content=words[3], headers=headers, timeout=PATIENCE).json()
    assert set(answer) == {"output"}


@pytest.mark.parametrize("kind", [None, "application/x-www-form-urlencoded", "text/plain; charset=utf-8", "x"])
def test_json_is_taken_whatever_it_is_called(served, kind):
    asked = {"choices": ("/v1/chat/completions", CHAT), "output": ("/predict", {"prompt": "x", "max_new_tokens": 2})}
    for answers, (path, body) in asked.items():
        headers = {"Content-Type": kind} if kind else {}
        answer = httpx.post(served.url + path, content=json.dumps(body), headers=headers, timeout=PATIENCE)
        assert answer.status_code == 200, answer.text
        assert answer.json()[answers]
