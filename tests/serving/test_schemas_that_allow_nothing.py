"""JSON schemas that nothing keeps to are refused, and what refers to itself with a way out is not."""

import json

import httpx
import jsonschema_rs
import pytest

from litgpt.serving.json_schema import allows_something
from litgpt.serving.tools import HERMES, LLAMA, MISTRAL, MISTRAL_ARGS, ToolFunction
from tests.serving.conftest import PATIENCE


def record(**properties) -> dict:
    """An object that must have these."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


SELF = {"$ref": "#"}
NOTHING = {
    "itself": SELF,
    "a circle": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "holds itself": record(a=SELF),
    "holds itself in one of two ways": {"anyOf": [record(a=SELF), record(b=SELF)]},
    "a list of itself": {"type": "array", "minItems": 1, "items": SELF},
    "first of itself": {"type": "array", "minItems": 1, "prefixItems": [SELF]},
    "two that hold each other": {
        "$ref": "#/$defs/a",
        "$defs": {"a": record(b={"$ref": "#/$defs/b"}), "b": {"type": "array", "minItems": 2, "items": {"$ref": "#/$defs/a"}}},
    },
    "all of it": {"allOf": [{"type": "string"}, SELF]},
    "one of nothing": {"enum": []},
    "any of nothing": {"anyOf": []},
    "of no type": {"type": []},
    "must have what it may not": {"type": "object", "required": ["a"], "additionalProperties": False},
    "false within": record(a=False),
    "strings and numbers": {"allOf": [{"type": "string"}, {"type": "number"}]},
    "least above most": {"type": "integer", "minimum": 3, "maximum": 1},
    "no letter": {"type": "string", "pattern": "[^\\s\\S]"},
}  # fmt: skip
SOMETHING = {
    "a tree": {"$ref": "#/$defs/t", "$defs": {"t": record(children={"type": "array", "maxItems": 0, "items": {"$ref": "#/$defs/t"}})}},
    "a chain that ends": record(next={"anyOf": [{"type": "null"}, SELF]}),
    "a chain whose end comes last": {
        "$ref": "#/$defs/a",
        "$defs": {
            "a": record(b={"$ref": "#/$defs/b"}),
            "b": {"anyOf": [record(a={"$ref": "#/$defs/a"}), {"$ref": "#/$defs/c"}]},
            "c": {"enum": [1]},
        },
    },
    "an escaped name": record(a={"$ref": "#/$defs/x~1y~0"}) | {"$defs": {"x/y~": {"enum": [5]}}},
}  # fmt: skip
OURS = [name for name in NOTHING if name not in ("strings and numbers", "least above most", "no letter")]


@pytest.mark.parametrize("name", OURS)
def test_what_allows_nothing_is_known(name):
    assert not allows_something(NOTHING[name])


@pytest.mark.parametrize("schema", [*SOMETHING.values(), True, {}, {"$ref": "http://elsewhere/"}, {"items": SELF},
                                    {"properties": {"a": SELF}}, {"required": ["a"], "properties": {"a": SELF}}])  # fmt: skip
def test_what_allows_something_is_known(schema):
    assert allows_something(schema)


@pytest.mark.parametrize("value", [None, 5, 1.5, float("inf"), float("nan"), "x", [], [5], [[]], {}, {"x": 5}, True])
def test_values_of_other_kinds_are_left_to_others(value):
    for name in ("$ref", "allOf", "anyOf", "enum", "type", "properties", "required", "items", "minItems", "prefixItems",
                 "additionalProperties", "patternProperties"):  # fmt: skip
        for other in ({}, {"type": "object", "required": ["a"]}, {"type": "array", "minItems": 1}):
            assert allows_something({**other, name: value}) in (True, False)
    assert allows_something({"type": 5})
    assert allows_something({"type": "objekt"})


def test_a_long_chain_is_followed_in_a_moment():
    definitions = {f"d{i}": record(x={"$ref": f"#/$defs/d{i + 1}"}) for i in range(100)} | {"d100": {"enum": [1]}}
    assert allows_something({"$ref": "#/$defs/d0", "$defs": definitions})
    definitions["d100"] = {"$ref": "#/$defs/d0"}
    assert not allows_something({"$ref": "#/$defs/d0", "$defs": definitions})


def ask(served, **options) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 200, "temperature": 1, "seed": 1, **options}
    return httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=PATIENCE)


@pytest.mark.parametrize("name", NOTHING)
def test_an_answer_that_cannot_be_is_refused(served, name):
    response = ask(served, response_format={"type": "json_schema", "json_schema": {"schema": NOTHING[name]}})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == "response_format"
    tool = {"type": "function", "function": {"name": "f", "parameters": NOTHING[name]}}
    response = ask(served, tools=[tool], tool_choice="required")
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == "tools"


@pytest.mark.parametrize("name", SOMETHING)
def test_an_answer_that_refers_to_itself_with_a_way_out_keeps_to_it(served, name):
    schema = SOMETHING[name]
    response = ask(served, response_format={"type": "json_schema", "json_schema": {"schema": schema}}, temperature=9)
    choice = response.json()["choices"][0]
    if choice["finish_reason"] == "stop":
        jsonschema_rs.validate(schema, json.loads(choice["message"]["content"]))
    else:
        assert choice["message"]["content"].startswith("{")


@pytest.mark.parametrize(
    "form", [HERMES, MISTRAL, MISTRAL_ARGS, LLAMA], ids=lambda form: form.opener + form.arguments_marker
)
def test_references_within_a_function_are_to_its_own_schema(served, form):
    """As pydantic writes a model within a model."""
    schema = record(a={"$ref": "#/$defs/A"}) | {"$defs": {"A": {"enum": [1]}}}
    other = record(a={"$ref": "#/$defs/A"}) | {"$defs": {"A": {"enum": ["x"]}}}
    functions = [ToolFunction("f", schema), ToolFunction("g", other)]
    rules = form.rules(served.model.codec.tokenizer, functions, False)
    constraint = served.model.grammars.constraint(f"start: calls\n{rules}")
    text = b""
    while constraint.complete_at is None:
        token = int(constraint.mask().nonzero()[-1])
        constraint.accept(token)
        text += served.model.codec.tokenizer.token_bytes(token)
        assert len(text) < 300
    assert not constraint.error
    assert b'{"a": 1}' in text or b'{"a": "x"}' in text
