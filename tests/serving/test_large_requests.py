"""Requests that are large or long: what is done with them is bounded, and nobody else waits for it."""

import json
import threading
import time

import httpx
import pytest
from litgpt.api import LLM
from pydantic import ValidationError

from litgpt.serving import bodies
from litgpt.serving.bodies import parse
from litgpt.serving.errors import ApiError
from litgpt.serving.schemas import ChatRequest, CompletionRequest, PredictRequest
from litgpt.serving.service import LARGE
from litgpt.tokenizer.tokenizer import TextTooLongError, Tokenizer
from tests import tokenizer_files
from tests.serving.conftest import PATIENCE, running

HELLO = {"role": "user", "content": "Hello"}
MANY = 50_000
WRONG = {
    "ids": (CompletionRequest, {"prompt": [-1] * MANY}),
    "lists of ids": (CompletionRequest, {"prompt": [[-1]] * MANY}),
    "ids in a list": (CompletionRequest, {"prompt": [[-1] * MANY]}),
    "prompts": (CompletionRequest, {"prompt": [None] * MANY}),
    "stop strings": (CompletionRequest, {"prompt": "x", "stop": [7] * MANY}),
    "biases": (CompletionRequest, {"prompt": "x", "logit_bias": dict.fromkeys(map(str, range(MANY)), "x")}),
    "fields": (CompletionRequest, {"prompt": "x", **dict.fromkeys(map(str, range(MANY)), 1)}),
    "messages": (ChatRequest, {"messages": [{}] * MANY}),
    "parts": (ChatRequest, {"messages": [{"role": "user", "content": [{}] * MANY}]}),
    "calls": (ChatRequest, {"messages": [{"role": "assistant", "tool_calls": [{}] * MANY}]}),
    "tools": (ChatRequest, {"messages": [HELLO], "tools": [{}] * MANY}),
    "modalities": (ChatRequest, {"messages": [HELLO], "modalities": ["x"] * MANY}),
}


@pytest.mark.parametrize("name", WRONG)
def test_of_a_large_field_one_mistake_is_told(name):
    model, content = WRONG[name]
    with pytest.raises(ValidationError) as raised:
        model.model_validate(content)
    assert raised.value.error_count() <= 8  # a field of several forms has one of each


TOO_MANY = {
    "prompts": (CompletionRequest, {"prompt": ["x"] * 5000}, "prompt"),
    "biases": (CompletionRequest, {"prompt": "x", "logit_bias": {str(i): 1 for i in range(5000)}}, "logit_bias"),
    "stop strings": (CompletionRequest, {"prompt": "x", "stop": ["x"] * 17}, "stop"),
    "messages": (ChatRequest, {"messages": [HELLO] * 17_000}, "messages"),
    "tools": (ChatRequest, {"messages": [HELLO], "tools": [{"type": "function", "function": {"name": "f"}}] * 2000}, "tools"),
    "parts": (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 5000}]}, "messages"),
    "values": (PredictRequest, {"prompt": "x" + "," * 600_000}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", TOO_MANY)
def test_lists_have_a_bound(name):
    model, content, param = TOO_MANY[name]
    with pytest.raises(ApiError) as refused:
        parse(json.dumps(content).encode(), model)
    assert refused.value.status == (413 if param is None else 422)
    assert (refused.value.param or "").partition(".")[0] == (param or "")
    assert "most" in refused.value.message
    assert len(refused.value.message) < 1000


@pytest.mark.parametrize("depth", [60, 900, 100_000])
@pytest.mark.parametrize("field", ["chat_template_kwargs", "metadata", "tools", "arguments"])
def test_what_is_nested_deep_is_refused_before_anything_follows_it(served, depth, field):
    deep = '{"a": ' + "[" * (depth - 10) + "]" * (depth - 10) + "}"
    if field == "arguments":  # as text, which is JSON again
        calls = f'[{{"id": "x", "function": {{"name": "f", "arguments": {json.dumps(deep)}}}}}]'
        body = f'{{"max_tokens": 1, "messages": [{{"role": "assistant", "tool_calls": {calls}}}]}}'
    else:
        tools = f'[{{"type": "function", "function": {{"name": "f", "parameters": {deep}}}}}]'
        value = tools if field == "tools" else deep
        body = f'{{"max_tokens": 1, "messages": [{{"role": "user", "content": "x"}}], "{field}": {value}}}'
    answer = httpx.post(f"{served.url}/v1/chat/completions", content=body, timeout=PATIENCE)
    assert answer.status_code == (200 if depth == 60 else 400), answer.text
    assert depth == 60 or "nested more than" in answer.json()["error"]["message"]


def test_what_is_within_the_bounds_is_taken():
    ids = parse(json.dumps({"prompt": [list(range(1000))] * 200}).encode(), CompletionRequest).prompt
    assert (len(ids), ids[0]) == (200, list(range(1000)))
    biases = parse(json.dumps({"prompt": "x", "logit_bias": {"7": -3}}).encode(), CompletionRequest).logit_bias
    assert biases == {7: -3}


def test_the_event_loop_runs_while_a_body_is_taken_apart_and_small_ones_pass_large_ones(chat_directory, monkeypatch):
    began, go_on = threading.Event(), threading.Event()

    def slow(data):
        if len(data) > LARGE:
            began.set()
            assert go_on.wait(PATIENCE)
        return json.loads(data)

    large = {"prompt": "x", "max_new_tokens": 1, "temperature": 0}
    with running(chat_directory) as served:
        monkeypatch.setattr(bodies, "parse_json", slow)
        content = (json.dumps(large) + " " * LARGE).encode()
        responses = []

        def send() -> None:
            headers = {"Content-Type": "application/json"}
            responses.append(httpx.post(f"{served.url}/predict", content=content, headers=headers, timeout=PATIENCE))

        threads = [threading.Thread(target=send) for _ in range(8)]  # more than there are threads for small ones
        for thread in threads:
            thread.start()
        assert began.wait(PATIENCE)
        try:
            assert httpx.get(f"{served.url}/health", timeout=PATIENCE).status_code == 200
            assert httpx.post(f"{served.url}/predict", json=large, timeout=PATIENCE).status_code == 200
            assert not responses
        finally:
            go_on.set()
        for thread in threads:
            thread.join(PATIENCE)
        assert [response.status_code for response in responses] == [200] * len(threads)


LONG = {
    "/predict": lambda text: {"prompt": text},
    "/v1/completions": lambda text: {"prompt": text},
    "/v1/chat/completions": lambda text: {"messages": [{"role": "user", "content": text}]},
}


@pytest.mark.parametrize("path", LONG)
def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(served, path, monkeypatch):
    backend, encode, sizes = (
        served.model.codec.tokenizer._backend,
        served.model.codec.tokenizer._backend.encode_batch,
        [],
    )

    def noted(texts):
        sizes.extend(map(len, texts))
        return encode(texts)

    monkeypatch.setattr(backend, "encode_batch", noted)
    response = httpx.post(served.url + path, json=LONG[path]("word and " * 200_000), timeout=PATIENCE)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert "512 tokens" in response.json()["error"]["message"]
    assert sum(sizes) < 20 * 512


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "metaspace", "sentencepiece_model"])
def test_a_long_text_is_encoded_no_further_than_tells(kind, tmp_path, monkeypatch):
    """Of any kind of tokenizer; and what fits is not refused, however many letters a token has."""
    tokenizer = Tokenizer(getattr(tokenizer_files, kind)(tmp_path))
    text = "The quick brown fox jumps over the lazy dog. 日本語の文章 и " * 400
    ids = tokenizer.encode_ids(text)
    assert tokenizer.encode_ids(text, room=len(ids)) == ids
    assert tokenizer.encode_ids(text, room=len(ids), allow_special=True) == tokenizer.encode_ids(
        text, allow_special=True
    )
    [longest] = sorted(map(tokenizer.token_bytes, range(tokenizer.vocab_size)), key=len)[-1:]
    words = longest.decode() * 600
    assert tokenizer.encode_ids(words, room=len(tokenizer.encode_ids(words))) == tokenizer.encode_ids(words)
    assert len(words) <= 600 * (tokenizer._backend.most_bytes or len(words))
    with pytest.raises(TextTooLongError, match="all that the model's context holds"):
        tokenizer.encode_ids(text * 4, room=100)
    seen = []
    plain = tokenizer._encode_plain_or_special
    monkeypatch.setattr(
        tokenizer, "_encode_plain_or_special", lambda text, how: seen.append(len(text)) or plain(text, how)
    )
    with pytest.raises(TextTooLongError):
        tokenizer.encode_ids(text * 4, room=100)
    assert sum(seen) <= 1600


def test_other_threads_run_while_a_text_is_encoded(tmp_path):
    tokenizer = Tokenizer(tokenizer_files.byte_level(tmp_path))
    tokenizer.encode_ids("<|im_start|>x", allow_special=True)
    text = "<|im_start|>" + "The quick brown fox jumps over the lazy dog. " * 20_000
    turns, ended, during = [0], threading.Event(), []

    def encode() -> None:
        before = turns[0]
        tokenizer.encode_ids(text, allow_special=True)
        during.append(turns[0] - before)
        ended.set()

    thread = threading.Thread(target=encode)
    thread.start()
    while not ended.is_set():
        turns[0] += 1
        time.sleep(0.001)
    thread.join()
    assert during[0] > 20  # it takes a second; one that keeps the interpreter to itself leaves a turn or two


def test_the_python_api_refuses_it_too(chat_directory):
    llm = LLM.load(chat_directory)
    with pytest.raises(ValueError, match="all that the model's context holds"):
        llm.generate("word and " * 200_000)


NULLS = {
    "completion": (CompletionRequest, {"prompt": "x"}),
    "chat": (ChatRequest, {"messages": [HELLO]}),
    "predict": (PredictRequest, {"prompt": "x"}),
}


@pytest.mark.parametrize("name", NULLS)
def test_null_is_as_if_left_out(name):
    model, least = NULLS[name]
    nulls = dict.fromkeys([*model.model_fields, "suffix", "functions", "prediction"])
    body = parse(json.dumps({**nulls, **least}).encode(), model)
    assert body == parse(json.dumps(least).encode(), model)
    with pytest.raises(ApiError, match="suffix: there is no such field"):
        parse(json.dumps({**least, "suffix": "x"}).encode(), model)


def test_null_within_a_part_is_as_if_left_out():
    call = {"type": None, "id": "1", "function": {"name": "f", "arguments": None}}
    message = {"role": "assistant", "content": None, "tool_calls": [call], "audio": None}
    tool = {"type": "function", "function": {"name": "f", "parameters": None, "strict": None}}
    body = {"messages": [message], "tools": [tool], "stream_options": {"include_usage": None}}
    chat = parse(json.dumps(body).encode(), ChatRequest)
    assert chat.messages[0].tool_calls[0].function.arguments == "{}"
    assert not chat.includes_usage
    schema = {"type": "json_schema", "json_schema": {"schema": {"enum": [None], "default": None}}}
    chat = parse(json.dumps({"messages": [HELLO], "response_format": schema}).encode(), ChatRequest)
    assert chat.response_format.json_schema.schema_ == {"enum": [None], "default": None}
