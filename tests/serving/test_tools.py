"""Function calls in the text of answers."""

import json
import random

import pytest

from litgpt.prompts import ChatTemplate, PromptStyle
from litgpt.serving.constraint import Grammars
from litgpt.serving.tools import HERMES, LLAMA, MISTRAL, MISTRAL_ARGS, Call, CallReader, ToolFunction, tool_form
from litgpt.tokenizer.tokenizer import Tokenizer
from tests import tokenizer_files

CALL = '{"name": "f", "arguments": {"x": [1, "}"]}}'


def read(form, text: str, draws: random.Random) -> tuple[str, list[tuple[str, str]]]:
    """Plain text and calls of an answer that comes in pieces of random length."""
    reader, found = CallReader(form, ["f", "g"]), []
    while text:
        size = draws.randrange(1, 9)
        found += reader.push(text[:size])
        text = text[size:]
    found += reader.finish()
    calls = [(call.name, call.arguments) for call in found if isinstance(call, Call)]
    assert reader.count == len(calls)
    return "".join(part for part in found if isinstance(part, str)), calls


F, G = ("f", '{"x": [1, "}"]}'), ("g", "{}")
ANSWERS = [
    (HERMES, "Just text, 1 < 2.", ("Just text, 1 < 2.", [])),
    (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", ("", [F])),
    (HERMES, f'Let me see.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{{"name": "g", "arguments": {{}}}}</tool_call>', ("Let me see.", [F, G])),
    (HERMES, f"<tool_call>\n{CALL}", ("", [F])),
    (HERMES, "a <tool_call>{broken</tool_call> b", ("a <tool_call>{broken</tool_call> b", [])),
    (HERMES, '<tool_call>{"name": "other", "arguments": {}}</tool_call>', ('<tool_call>{"name": "other", "arguments": {}}</tool_call>', [])),
    (HERMES, '<tool_call>{"name": "f", "argum', ('<tool_call>{"name": "f", "argum', [])),
    (HERMES, "ends with <tool_", ("ends with <tool_", [])),
    (HERMES, '<tool_call>{"name": "g", "arguments": "{}"}</tool_call>', ("", [G])),
    (HERMES, "text \n", ("text \n", [])),
    (LLAMA, '{"name": "f", "parameters": {"x": [1, "}"]}}', ("", [F])),
    (LLAMA, '<|python_tag|>{"type": "function", "name": "g", "parameters": {}}; {"name": "f", "parameters": {"x": [1, "}"]}}', ("", [G, F])),
    (LLAMA, '{"temperature": 3}', ('{"temperature": 3}', [])),
    (LLAMA, ' [{"name": "g", "arguments": {}}]', ("", [G])),
    (LLAMA, 'The JSON is {"name": "g", "parameters": {}}', ('The JSON is {"name": "g", "parameters": {}}', [])),
    (MISTRAL, f"[TOOL_CALLS] [{CALL}]", ("", [F])),
    (MISTRAL, f"[TOOL_CALLS][{CALL}, {CALL}]", ("", [F, F])),
    (MISTRAL, "No [TOOL", ("No [TOOL", [])),
    (MISTRAL_ARGS, '[TOOL_CALLS]f[ARGS]{"x": [1, "}"]}[TOOL_CALLS]g[CALL_ID]abcdefghi[ARGS]{}', ("", [F, G])),
    (MISTRAL_ARGS, "[TOOL_CALLS]f{}", ("", [("f", "{}")])),
    (MISTRAL_ARGS, "[TOOL_CALLS]f[ARGS]{", ("[TOOL_CALLS]f[ARGS]{", [])),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "expected"), ANSWERS)
def test_calls_are_found_wherever_the_text_is_split(form, text, expected):
    for seed in range(20):
        assert read(form, text, random.Random(seed)) == expected


def test_plain_text_is_not_held_back():
    reader = CallReader(HERMES, ["f"])
    assert list(reader.push("Hello")) == ["Hello"]
    assert list(reader.push(" <b>")) == [" <b>"]
    assert list(reader.push(" <tool")) == []
    assert list(reader.push("s>")) == [" <tools>"]


def test_ids_are_as_the_models_templates_take_them():
    reader = CallReader(MISTRAL, ["f"])
    calls = [*reader.push(f"[TOOL_CALLS][{CALL}, {CALL}]"), *reader.finish()]
    assert [len(call.id) for call in calls] == [9, 9]
    assert calls[0].id != calls[1].id


def test_the_template_shows_the_form():
    assert tool_form(PromptStyle.from_name("alpaca")) is None
    assert tool_form(ChatTemplate(tokenizer_files.CHATML)) is None
    assert tool_form(ChatTemplate("{{ tools }}<tool_call>")) is HERMES
    assert tool_form(ChatTemplate("{{ tools }}[TOOL_CALLS]")) is MISTRAL
    assert tool_form(ChatTemplate("{{ tools }}[TOOL_CALLS][ARGS]")) is MISTRAL_ARGS
    assert tool_form(ChatTemplate({"default": "x", "tool_use": "{{ tools }}<tool_call>"})) is HERMES


@pytest.mark.parametrize(("family", "form"), [("qwen2_5", HERMES), ("llama3_2", LLAMA), ("mistral_nemo", MISTRAL)])
def test_the_forms_of_real_templates(npm_tokenizer, family, form):
    assert tool_form(ChatTemplate.from_directory(npm_tokenizer(family))) is form


@pytest.mark.parametrize("form", [HERMES, LLAMA, MISTRAL, MISTRAL_ARGS])
@pytest.mark.parametrize("parallel", [False, True])
def test_what_the_grammar_lets_through_is_read_as_calls(tmp_path, form, parallel):
    """Random walks through the grammar, with control tokens for the markers, as real tokenizers have."""
    special = ("<|end|>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>")
    tokenizer = Tokenizer(tokenizer_files.byte_level(tmp_path, {"eos_token": "<|end|>"}, special=special))
    grammars = Grammars(tokenizer, [[tokenizer.eos_id]])
    schema = {
        "type": "object",
        "properties": {"x": {"enum": ["a", "{"]}},
        "required": ["x"],
        "additionalProperties": False,
    }
    functions = [ToolFunction("f", schema), ToolFunction("g", {"type": "object", "additionalProperties": False})]
    draws, counts = random.Random(0), set()
    for _ in range(8):
        constraint = grammars.constraint(f"start: calls\n{form.rules(tokenizer, functions, parallel)}")
        ids = []
        while constraint.complete_at is None and len(ids) < 400:
            token = draws.choice(constraint.mask().nonzero()[:, 0].tolist())
            if token == tokenizer.eos_id or (len(ids) > 120 and constraint.mask()[tokenizer.eos_id]):
                break
            constraint.accept(token)
            ids.append(token)
        decoder = tokenizer.stream_decoder(shown=form.shown(tokenizer))
        text, calls = read(form, "".join(map(decoder.push, ids)), draws)
        assert text == ""
        assert all(name in ("f", "g") for name, _ in calls)
        assert all(json.loads(arguments) in ({}, {"x": "a"}, {"x": "{"}) for _, arguments in calls)
        counts.add(len(calls))
    assert min(counts) >= 1
    if not parallel:
        assert counts == {1}
