"""The `openai` client against a real server."""

import asyncio
import json
from typing import Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, ConfigDict

from litgpt.generation.engine import Engine, Request
from litgpt.generation.sampling import Sampling

MESSAGES = [{"role": "user", "content": "Hello there"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says the weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Köln", "Paris"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


@pytest.fixture(scope="module")
def chat(served):
    client = served.client
    return lambda messages=MESSAGES, **options: client.chat.completions.create(
        model="tiny-random", messages=messages, **{"temperature": 0, "max_tokens": 12, **options}
    )


@pytest.fixture(scope="module")
def alone(served):
    """What the model answers greedily to some token ids in an engine of its own."""

    def answer(ids: list[int], count: int) -> str:
        tokens = Engine(served.engine.model).complete([Request(ids, count, Sampling(0), served.model.stops)])[0]
        return served.model.codec.tokenizer.decode(tokens)

    return answer


def test_models(served):
    assert [model.id for model in served.client.models.list()] == ["tiny-random"]
    assert served.client.models.retrieve("tiny-random").id == "tiny-random"


def test_a_reply_is_that_of_the_engine(served, chat, alone):
    prompt = served.model.codec.encode(MESSAGES)
    response = chat()
    assert response.object == "chat.completion"
    [choice] = response.choices
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert choice.message.content == alone(prompt, 12) != ""
    usage = response.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (len(prompt), 12, len(prompt) + 12)
    assert chat().usage.prompt_tokens_details.cached_tokens == len(prompt) - 1


def test_content_may_be_parts_and_developers_are_systems(chat):
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]
    one = chat([{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}])
    two = chat([{"role": "system", "content": "Be brief."}, *MESSAGES])
    assert one.choices[0].message.content == two.choices[0].message.content != chat().choices[0].message.content


def test_a_stream_says_the_same_piece_by_piece(chat):
    whole = chat()
    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert [chunk.choices[0].delta.role for chunk in chunks[1:-1]] == [None] * (len(chunks) - 2)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12
    assert all(chunk.choices for chunk in chat(stream=True))


def test_a_stream_ends_with_done(served):
    body = {"messages": MESSAGES, "max_tokens": 3, "stream": True}
    response = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])


def test_several_choices_are_drawn_apart_and_again_with_the_seed(chat):
    options = {"temperature": 1.5, "n": 3, "seed": 7}
    texts = [choice.message.content for choice in chat(**options).choices]
    assert len(set(texts)) == 3
    assert [choice.message.content for choice in chat(**options).choices] == texts
    streamed = ["", "", ""]
    for chunk in chat(**options, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    response = chat(**options)
    assert response.usage.completion_tokens == 36
    assert chat(**{**options, "seed": 8}).choices[0].message.content != texts[0]


def test_a_stop_string_ends_the_reply_and_is_no_part_of_it(chat):
    whole = chat().choices[0].message.content
    stop = whole[3:5]
    expected = whole[: whole.index(stop)]
    response = chat(stop=["never", stop])
    assert (response.choices[0].message.content, response.choices[0].finish_reason) == (expected, "stop")
    chunks = list(chat(stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_logprobs_belong_to_the_text(chat):
    whole = chat(logprobs=True, top_logprobs=3)
    content = whole.choices[0].logprobs.content
    assert len(content) == 12
    text = b"".join(bytes(token.bytes) for token in content).decode("utf-8", "replace")
    assert text == whole.choices[0].message.content
    for token in content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token  # greedy
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)
    streamed = [
        token
        for chunk in chat(logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert [(token.token, token.logprob) for token in streamed] == [
        (token.token, pytest.approx(token.logprob, abs=1e-4)) for token in content
    ]
    assert chat(logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert chat().choices[0].logprobs is None
    stop = content[3].token + content[4].token
    cut = chat(logprobs=True, stop=stop).choices[0]
    assert cut.message.content == "".join(token.token for token in content[:3])
    assert [token.token for token in cut.logprobs.content] == [token.token for token in content[:3]]


def test_settings_reach_the_sampling(served, chat):
    plain = chat().choices[0].message.content
    [first] = served.model.codec.tokenizer.encode_ids(
        chat(logprobs=True).choices[0].logprobs.content[0].token, bos=False
    )
    assert chat(logit_bias={str(first): -100}).choices[0].message.content != plain
    for options in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"extra_body": {"repetition_penalty": 9}}):
        assert (
            chat(max_tokens=80, **options).choices[0].message.content != chat(max_tokens=80).choices[0].message.content
        )
    for extra in ({"top_k": 1}, {"min_p": 1}):
        assert chat(temperature=3, extra_body=extra).choices[0].message.content == plain
    assert chat(temperature=1e-300).choices[0].message.content == plain
    assert chat(temperature=3, top_p=0).choices[0].message.content == plain
    assert chat(max_tokens=None, max_completion_tokens=2).usage.completion_tokens == 2
    opened = chat(extra_body={"chat_template_kwargs": {"opening": "Well"}})
    assert opened.usage.prompt_tokens > chat().usage.prompt_tokens


def test_control_tokens_in_a_message_are_text(served, chat):
    response = chat([{"role": "user", "content": "<|im_end|>"}])
    assert response.usage.prompt_tokens > len(served.model.codec.encode([{"role": "user", "content": "x"}])) + 3


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: Literal["Ann", "Bob"]
    age: Literal[1, 2, 3]
    tall: bool


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_keeps_to_a_json_schema(served, chat, stream):
    for seed in range(3):
        options = {"temperature": 2, "seed": seed, "max_tokens": 200}
        if stream:
            with served.client.chat.completions.stream(
                model="tiny-random", messages=MESSAGES, response_format=Person, **options
            ) as events:
                for _ in events:
                    pass
                choice = events.get_final_completion().choices[0]
        else:
            choice = served.client.chat.completions.parse(
                model="tiny-random", messages=MESSAGES, response_format=Person, **options
            ).choices[0]
        assert isinstance(choice.message.parsed, Person)
        assert choice.finish_reason == "stop"


def test_choices_keep_to_their_schemas_beside_free_answers(served, chat):
    plain = chat(max_tokens=40).choices[0].message.content
    schema = {"type": "json_schema", "json_schema": {"name": "p", "schema": Person.model_json_schema()}}

    async def both():
        client = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        options = {"model": "tiny-random", "messages": MESSAGES}
        bound = client.chat.completions.create(
            **options, n=4, temperature=9, seed=1, response_format=schema, max_tokens=200
        )
        free = client.chat.completions.create(**options, temperature=0, max_tokens=40)
        return await asyncio.gather(bound, free)

    bound, free = asyncio.run(both())
    assert len({choice.message.content for choice in bound.choices}) > 1
    for choice in bound.choices:
        Person.model_validate_json(choice.message.content)
    assert free.choices[0].message.content == plain


def test_json_object_gives_an_object(chat, served):
    content = (
        chat(response_format={"type": "json_object"}, temperature=1, seed=1, max_tokens=5).choices[0].message.content
    )
    assert content.startswith("{")
    ending = {served.model.codec.tokenizer.token_to_id("}"): 100}  # otherwise the model goes on and on
    [choice] = chat(response_format={"type": "json_object"}, logit_bias=ending).choices
    assert choice.finish_reason == "stop"
    assert json.loads(choice.message.content) == {}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_required_call_comes_in_the_models_form_and_is_parsed(chat, choice):
    options = {"tools": [WEATHER], "tool_choice": choice, "max_tokens": 300, "parallel_tool_calls": False}
    [answer] = chat(**options).choices
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    [call] = answer.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "weather"
    assert set(arguments) == {"city", "days"}
    assert arguments["city"] in ("Köln", "Paris")
    assert 1 <= arguments["days"] <= 9
    chunks = list(chat(**options, stream=True))
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    [streamed] = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert (streamed.index, streamed.function.name) == (0, "weather")
    assert json.loads(streamed.function.arguments) == arguments
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ""
    turn = [
        *MESSAGES,
        answer.message.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    assert chat(turn, tools=[WEATHER]).usage.prompt_tokens > chat(tools=[WEATHER]).usage.prompt_tokens + 10


def test_a_named_function_is_the_one_that_is_called(chat):
    choice = {"type": "function", "function": {"name": "clock"}}
    for tools in ([WEATHER, CLOCK], [CLOCK, WEATHER]):
        [call] = chat(tools=tools, tool_choice=choice, max_tokens=200).choices[0].message.tool_calls
        assert (call.function.name, call.function.arguments) == ("clock", "{}")


def test_tools_reach_the_template_unless_none_may_be_called(chat):
    assert chat(tools=[WEATHER]).usage.prompt_tokens > chat().usage.prompt_tokens + 50
    assert chat(tools=[WEATHER], tool_choice="none").usage.prompt_tokens == chat().usage.prompt_tokens


def test_text_completions(served, alone):
    client, tokenizer = served.client, served.model.codec.tokenizer
    prompts = ["To be, or", "def f(x"]
    expected = [alone(tokenizer.encode_ids(prompt), 6) for prompt in prompts]
    options = {"model": "tiny-random", "max_tokens": 6, "temperature": 0}
    response = client.completions.create(prompt=prompts, **options)
    assert [choice.text for choice in response.choices] == expected
    assert response.usage.prompt_tokens == sum(len(tokenizer.encode_ids(prompt)) for prompt in prompts)
    ids = [tokenizer.encode_ids(prompt) for prompt in prompts]
    assert [choice.text for choice in client.completions.create(prompt=ids, **options).choices] == expected
    assert client.completions.create(prompt=ids[0], **options).choices[0].text == expected[0]
    assert (
        client.completions.create(prompt=prompts[0], echo=True, **options).choices[0].text == prompts[0] + expected[0]
    )
    chunks = list(client.completions.create(prompt=prompts[0], stream=True, **options))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected[0]
    assert chunks[-1].choices[0].finish_reason == "length"
    logprobs = client.completions.create(prompt=prompts[0], logprobs=2, **options).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 6
    assert all(1 <= len(top) <= 2 for top in logprobs.top_logprobs)


ERRORS = {
    "no such model": ({"model": "other"}, openai.NotFoundError, "model", "There is no model 'other'"),
    "too long": ({"messages": [{"role": "user", "content": "x" * 900}]}, openai.BadRequestError, "messages", "The prompt has 9[0-9][0-9] tokens, and the model's context of 512 tokens"),
    "temperature": ({"temperature": -1}, openai.UnprocessableEntityError, "temperature", "greater than or equal to 0"),
    "no field": ({"extra_body": {"temprature": 1}}, openai.UnprocessableEntityError, "temprature", "Did you mean 'temperature'"),
    "n": ({"n": 10**9}, openai.UnprocessableEntityError, "n", "less than or equal to 128"),
    "n beyond this server": ({"n": 100}, openai.BadRequestError, "n", "at most 72"),
    "top_logprobs": ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs", "needs logprobs"),
    "bias": ({"logit_bias": {"99999": 1}}, openai.BadRequestError, "logit_bias", "no token 99999"),
    "schema": ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objekt"}}}}, openai.BadRequestError, "response_format", "objekt"),
    "no schema": ({"response_format": {"type": "json_schema"}}, openai.UnprocessableEntityError, "response_format.json_schema.schema", "missing"),
    "no tools": ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice", "needs tools"),
    "unknown function": ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}}, openai.BadRequestError, "tool_choice", "not among"),
    "variables": ({"extra_body": {"chat_template_kwargs": {"messages": []}}}, openai.BadRequestError, "chat_template_kwargs", "not valid"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, openai.UnprocessableEntityError, "messages.0.content", "'text'"),
    "arguments": ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}]}]}, openai.BadRequestError, "messages", "no JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_those_of_the_client(chat, name, stream):
    options, kind, param, message = ERRORS[name]
    with pytest.raises(kind, match=message) as raised:
        list(chat(**options, stream=stream)) if "model" not in options else _other_model(chat, options, stream)
    assert raised.value.body["param"].startswith(param)
    assert set(raised.value.body) == {"message", "type", "param", "code"}


def _other_model(chat, options, stream):
    chat(extra_body=options, stream=stream)
