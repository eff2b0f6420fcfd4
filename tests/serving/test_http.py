"""What the server says over HTTP beside OpenAI's API: /predict, keys, limits, and what a client does wrong."""

import asyncio
import http.client
import json
import threading

import httpx
import openai
import pytest

from litgpt.generation.request import Request
from litgpt.generation.sampling import Sampling
from litgpt.serving.async_engine import Answers
from litgpt.serving.errors import ApiError
from tests.serving.conftest import PATIENCE, Brake, raw_request, running, wait_for

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "temperature": 0}


def post(served, path, body, **options):
    return httpx.post(served.url + path, json=body, timeout=PATIENCE, **options)


def test_predict_answers_as_the_chat_does(served):
    body = {"prompt": "Hello", "max_new_tokens": 9, "temperature": 0}
    response = post(served, "/predict", body)
    assert response.status_code == 200
    assert set(response.json()) == {"output"}
    chat = post(served, "/v1/chat/completions", {**CHAT, "max_tokens": 9}).json()
    assert response.json()["output"] == chat["choices"][0]["message"]["content"] != ""
    longer = post(served, "/predict", {"prompt": "Hello", "temperature": 0}).json()["output"]
    assert len(longer) > len(response.json()["output"])
    assert longer.startswith(response.json()["output"])
    assert post(served, "/predict", {**body, "temperature": 5, "top_k": 1}).json() == response.json()
    assert post(served, "/predict", {**body, "temperature": 5, "top_p": 0}).json() == response.json()


def test_predict_streams_lines_of_json_where_it_is_told_to(served, chat_directory):
    body = {"prompt": "Hello", "max_new_tokens": 9, "temperature": 0}
    expected = post(served, "/predict", body).json()["output"]
    with running(chat_directory, stream=True, api_path="/ask") as streaming:
        with httpx.stream("POST", f"{streaming.url}/ask", json=body) as response:
            lines = [json.loads(line) for line in response.iter_lines()]
        assert len(lines) > 3
        assert "".join(line["output"] for line in lines) == expected
        assert post(streaming, "/ask", {"prompt": "x" * 900}).status_code == 400
        assert post(streaming, "/predict", body).status_code == 404


def test_a_key_is_asked_for_and_shown_nowhere(chat_directory, capfd):
    with running(chat_directory, api_key="sécret") as locked:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sécret".encode()}):
            response = post(locked, "/v1/chat/completions", CHAT, headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert post(locked, "/predict", {"prompt": "x"}).status_code == 401
        assert httpx.get(f"{locked.url}/metrics").status_code == 401
        assert httpx.get(f"{locked.url}/v1/models").status_code == 401
        assert httpx.get(f"{locked.url}/health").status_code == 200
        right = {"Authorization": b"Bearer " + "sécret".encode()}
        assert post(locked, "/v1/chat/completions", CHAT, headers=right).status_code == 200
    output = capfd.readouterr()
    assert "sécret" not in output.out + output.err


BAD_BODIES = {
    "no json": (b"{", 422, "not valid JSON"),
    "nothing": (b"", 422, "The body"),
    "a list": (b"[]", 422, "The body"),
    "not utf-8": (b'{"messages": "\xff"}', 400, ""),
    "nan": (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 422, "temperature"),
    "infinity": (b'{"messages": [{"role": "user", "content": "x"}], "presence_penalty": -Infinity}', 422, "presence_penalty"),
    "huge number": (b'{"messages": [{"role": "user", "content": "x"}], "n": ' + b"9" * 5000 + b"}", 400, ""),
    "deep": (b"[" * 100_000, 400, ""),
    "deep message": (b'{"messages": [{"role": "user", "content": ' + b"[" * 500 + b"]" * 500 + b"}]}", 400, "nested more than 64 levels deep"),
    "role": (b'{"messages": [{"role": "king", "content": "x"}]}', 422, "role"),
    "surrogate in a field": (b'{"messages": [{"role": "user", "content": "x"}], "\\ud800": 1}', 422, "unicode"),
    "surrogate in the model": (b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}', (404, 422), ""),
    "huge seed": (b'{"messages": [{"role": "user", "content": "x"}], "seed": 99999999999999999999}', 422, "seed"),
    "zero byte": (b'{"messages": [{"role": "user", "content": "\\u0000"}], "max_tokens": 2}', 200, ""),
    "surrogate": (b'{"messages": [{"role": "user", "content": "a\\ud800b"}], "max_tokens": 2}', (200, 422), ""),
    "half a pair": (b'{"messages": [{"role": "user", "content": "\\ude00"}], "max_tokens": 2, "stream": true}', (200, 422), ""),
    "empty": (b'{"messages": [{"role": "user", "content": ""}], "max_tokens": 2}', 200, ""),
    "null": (b'{"messages": [{"role": "user", "content": null}], "max_tokens": 2, "temperature": null, "n": null}', 200, ""),
    "tiny temperature": (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "temperature": 1e-300}', 200, ""),
    "bad pattern": (b'{"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": "(?=x)("}}}}', 400, "schema"),
    "reference": (b'{"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://127.0.0.1:9/"}}}}', 400, "schema"),
    "template": (b'{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"opening": 5, "tools": 1}}', 400, "chat_template_kwargs"),
    "type in the template": (b'{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"opening": 5}}', 400, "template refuses"),
    "tool schema": (b'{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": 5}}}], "tool_choice": "required"}', 400, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_BODIES)
def test_no_body_makes_an_error_of_ours(served, name, capfd):
    body, status, message = BAD_BODIES[name]
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{served.url}/v1/chat/completions", content=body, headers=headers, timeout=PATIENCE)
    assert response.status_code in (status if isinstance(status, tuple) else (status,)), response.text
    if response.status_code != 200:
        assert message in response.json()["error"]["message"]
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text + capfd.readouterr().err
    assert post(served, "/v1/chat/completions", CHAT).status_code == 200


def test_other_mistakes_of_clients(served):
    form = httpx.post(f"{served.url}/predict", data={"prompt": "x"})
    assert form.status_code == 422
    assert "The body is not valid JSON" in form.json()["error"]["message"]
    assert httpx.get(f"{served.url}/nothing").json()["error"]["code"] == "not_found"
    assert httpx.get(f"{served.url}/predict").status_code == 405
    assert httpx.post(f"{served.url}/v1/embeddings", json={}).status_code == 404
    assert b" 400 " in raw_request(served.url, b"nonsense\r\n\r\n")
    assert b" 400 " in raw_request(served.url, b"GET / HTTP/9.9\r\nHost: x\r\nContent-Length: -5\r\n\r\n")
    assert httpx.get(f"{served.url}/docs").status_code == 200


def test_a_mistake_in_a_field_of_several_types_names_the_field(served):
    error = post(served, "/v1/completions", {"prompt": [-1, -1]}).json()["error"]
    assert error["param"] == "prompt"
    assert "prompt.0: Input should be greater than or equal to 0" in error["message"]
    assert "constrained" not in error["message"]
    assert "str:" not in error["message"]


def test_a_body_may_not_be_larger_than_the_limit(chat_directory):
    with running(chat_directory, largest_body=5000) as small:
        response = post(small, "/predict", {"prompt": "x" * 6000})
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")

        def parts():
            for _ in range(100):
                yield b" " * 1000

        headers = {"Content-Type": "application/json"}
        response = httpx.post(f"{small.url}/predict", content=parts(), headers=headers)
        assert response.status_code == 413
        assert post(small, "/predict", {"prompt": "x", "max_new_tokens": 1}).status_code == 200


def in_background(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    return thread, results


def test_a_full_queue_refuses_and_says_when_to_come_back(chat_directory):
    with running(chat_directory, slots=1, queue=1) as narrow:
        brake = Brake(narrow)
        waiting = [in_background(lambda: post(narrow, "/v1/chat/completions", CHAT)) for _ in range(2)]
        wait_for(lambda: narrow.service.taken == 2)
        refused = post(narrow, "/v1/chat/completions", CHAT)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert post(narrow, "/v1/chat/completions", {**CHAT, "stream": True}).status_code == 429
        health = httpx.get(f"{narrow.url}/health").json()
        assert (health["running"], health["waiting"]) == (1, 1)
        brake.release()
        for thread, results in waiting:
            thread.join(PATIENCE)
            assert results[0].status_code == 200
        assert post(narrow, "/v1/chat/completions", CHAT).status_code == 200
        narrow.wait_until_idle()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/predict"])
def test_a_client_that_goes_away_frees_its_slot(chat_directory, stream, path):
    with running(chat_directory, slots=1, stream=stream) as narrow:
        body = {"prompt": "x", "max_new_tokens": 400, "temperature": 0}
        if path != "/predict":
            body = {**CHAT, "max_tokens": 400, "ignore_eos": True, "stream": stream}
        brake = Brake(narrow, after=8)
        if stream:
            with httpx.stream("POST", narrow.url + path, json=body, timeout=PATIENCE) as response:
                lines = response.iter_lines()  # kept: once it is let go of, the connection is closed
                next(lines)
                assert narrow.service.taken == 1
        else:
            connection = http.client.HTTPConnection(narrow.url.removeprefix("http://"))
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            wait_for(lambda: brake.steps > brake.after)
            assert narrow.service.taken == 1
            connection.close()
        wait_for(lambda: narrow.service.taken == 0)
        brake.release()
        narrow.wait_until_idle()
        assert brake.steps <= brake.after + 2  # of 400: the one that was held up, at most one more
        assert post(narrow, "/predict", {"prompt": "x", "max_new_tokens": 2}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_waits_too_long_is_refused(chat_directory, stream):
    with running(chat_directory, slots=1, timeout=0.3) as narrow:
        brake = Brake(narrow)
        first = in_background(lambda: post(narrow, "/v1/chat/completions", CHAT))
        wait_for(lambda: narrow.service.taken == 1 or first[1])
        response = post(narrow, "/v1/chat/completions", {**CHAT, "stream": stream})
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
        assert "0.3 seconds" in response.json()["error"]["message"]
        brake.release()
        first[0].join(PATIENCE)
        assert first[1][0].status_code == 504
        narrow.wait_until_idle()
        narrow.service.timeout = 0
        assert post(narrow, "/v1/chat/completions", CHAT).status_code == 200


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/predict"])
def test_an_answer_that_takes_too_long_is_ended(chat_directory, path, count):
    """The time that an answer takes after its first token counts, too."""
    stream = path == "/predict"
    with running(chat_directory, timeout=0.8, stream=stream) as slow:
        brake = Brake(slow, after=8)
        long = {**CHAT, "max_tokens": 400, "ignore_eos": True, "n": count}
        if stream:
            body = {"prompt": "Hello", "max_new_tokens": 400}
            with httpx.stream("POST", slow.url + path, json=body, timeout=PATIENCE) as response:
                *lines, last = [json.loads(line) for line in response.iter_lines()]
            assert response.status_code == 200
            assert len(lines) > 3
            assert last["error"]["code"] == "timeout"
            brake.remove()
            slow.wait_until_idle()
            brake, pieces = Brake(slow, after=8), []
            with pytest.raises(openai.APIError, match=r"not complete after 0\.8 seconds") as refused:  # noqa: PT012
                for chunk in slow.client.chat.completions.create(
                    model="tiny-random", messages=CHAT["messages"], max_tokens=400, n=count, stream=True, temperature=0
                ):
                    pieces += [choice.delta.content for choice in chunk.choices]
            assert refused.value.code == "timeout"
            assert len("".join(filter(None, pieces))) > 3
        else:
            response = post(slow, path, long)
            assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
        brake.release()
        slow.wait_until_idle()
        assert brake.steps <= brake.after + 2  # of 400
        slow.service.timeout = 0
        assert post(slow, path, {**CHAT, "n": count} if not stream else {"prompt": "x", "max_new_tokens": 1}).is_success


def test_a_client_that_does_not_read_holds_its_slot_no_longer_than_the_limit(chat_directory):
    with running(chat_directory, timeout=0.8) as slow:
        brake = Brake(slow, after=8)

        async def read() -> None:
            prompt = slow.model.codec.encode(CHAT["messages"])
            answers = Answers(slow.service, slow.model, [Request(prompt, 400, Sampling(0))])
            pieces = answers.pieces()
            assert (await anext(pieces)).text
            while slow.model.worker._commands.empty():  # until the engine is told to end it, while it stands still
                await asyncio.sleep(0.02)
            brake.release()
            while slow.engine.running:
                await asyncio.sleep(0.02)
            assert brake.steps <= brake.after + 2  # of 400
            later = []
            with pytest.raises(ApiError, match="not complete") as refused:  # noqa: PT012
                async for piece in pieces:
                    later.append(piece.text)
            assert refused.value.status == 504
            assert len(later) > 3  # what came in time is given out

        asyncio.run(read())
        assert slow.service.taken == 0


@pytest.mark.parametrize("stream", [False, True])
def test_what_goes_wrong_in_the_engine_is_an_error_without_details(chat_directory, stream):
    with running(chat_directory) as broken:

        def fail(*_):
            raise RuntimeError("secrets of ours")

        handle = broken.engine.model.transformer["h"][0].register_forward_pre_hook(fail)
        response = post(broken, "/v1/chat/completions", {**CHAT, "stream": stream})
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        assert "secrets" not in response.text
        handle.remove()
        broken.wait_until_idle()
        assert post(broken, "/v1/chat/completions", CHAT).status_code == 200
        count = 0

        def fail_later(*_):
            nonlocal count
            count += 1
            if count == 4:
                raise MemoryError("no more")

        handle = broken.engine.model.transformer["h"][0].register_forward_pre_hook(fail_later)
        response = post(broken, "/v1/chat/completions", {**CHAT, "max_tokens": 20, "stream": stream})
        handle.remove()
        assert response.status_code == (200 if stream else 503)
        last = response.text.strip().split("\n\n")[-1].removeprefix("data: ")
        assert json.loads(last)["error"]["code"] == "out_of_memory"
        broken.wait_until_idle()


def test_metrics(chat_directory):
    with running(chat_directory) as server:
        for _ in range(2):
            post(server, "/v1/chat/completions", CHAT)
        post(server, "/v1/chat/completions", {})
        httpx.get(f"{server.url}/some/unknown/path")
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        prompt = len(server.model.codec.encode([{"role": "user", "content": "Hello"}]))
        assert float(values["litgpt_generated_tokens_total"]) == 8
        assert float(values["litgpt_prompt_tokens_total"]) == 2 * prompt
        assert float(values["litgpt_cached_tokens_total"]) == prompt - 1
        assert float(values['litgpt_answers_total{finish_reason="length"}']) == 2
        assert float(values['litgpt_requests_total{path="/v1/chat/completions",status="200"}']) == 2
        assert float(values['litgpt_requests_total{path="/v1/chat/completions",status="422"}']) == 1
        assert float(values['litgpt_requests_total{path="other",status="404"}']) == 1
        assert float(values["litgpt_time_to_first_token_seconds_count"]) == 2
        assert float(values["litgpt_running"]) == float(values["litgpt_waiting"]) == 0
        assert "unknown" not in "".join(lines)


def test_a_prompt_is_read_in_turns_with_the_answers_of_others(served):
    """The server's engine is the one that Request describes: nothing is between them but HTTP."""
    prompt = served.model.codec.encode([{"role": "user", "content": "Hello"}])
    tokens = list(served.model.worker.stream(Request(prompt, 4, Sampling(0), served.model.stops)))
    answer = post(served, "/v1/chat/completions", CHAT).json()["choices"][0]["message"]["content"]
    assert answer == served.model.codec.tokenizer.decode(tokens)
