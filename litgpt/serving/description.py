"""The API's description as a page at `/docs`: made here from /openapi.json, complete on a network without a way out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from html import escape
from typing import Any

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from litgpt.serving.page import HEADERS

BOUNDS = {"minimum": "at least", "exclusiveMinimum": "over", "maximum": "at most", "exclusiveMaximum": "below"}
NOT_OURS = ("HTTPValidationError", "ValidationError")  # FastAPI's form of errors, which is not sent here


def router(describe: Callable[[], dict[str, Any]]) -> APIRouter:
    """The route.

    Args:
        describe: Gives the description in OpenAPI's form (https://spec.openapis.org/oas/v3.1.0).
    """
    routes = APIRouter()

    @routes.api_route("/docs", methods=["GET", "HEAD"], include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page(describe()), headers=HEADERS)

    return routes


def page(description: Mapping[str, Any]) -> str:
    """The description in HTML."""
    about, schemas = description["info"], description.get("components", {}).get("schemas", {})
    operations = [
        (f"{method.upper()} {path}", operation)
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    ]
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(about['title'])}: the API</title>",
            '<link rel="stylesheet" href="static/docs.css"></head><body><main>',
            f"<h1>{escape(about['title'])} {escape(about['version'])}</h1>",
            f"<p>{_text(about['description'])}</p>",
            '<p>For programs: <a href="openapi.json">openapi.json</a>. Errors have the form '
            '<code>{"error": {"message", "type", "param", "code"}}</code>. To talk with the model: '
            '<a href="./">the chat page</a>.</p>',
            *(part for name, operation in operations for part in _operation(name, operation)),
            *(part for name, schema in schemas.items() if name not in NOT_OURS for part in _schema(name, schema)),
            "</main></body></html>",
        ]
    )


def _operation(name: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"<h2><code>{escape(name)}</code></h2>"
    yield f"<p>{_text(operation.get('description', ''))}</p>"
    for parameter in operation.get("parameters", ()):
        yield f"<p><code>{escape(parameter['name'])}</code> in the {parameter['in']}: {kind(parameter['schema'])}</p>"
    for content in operation.get("requestBody", {}).get("content", {}).values():
        yield f"<p>The body: {kind(content['schema'])}, as JSON.</p>"


def _schema(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    needed = schema.get("required", ())
    yield f'<h2 id="{escape(name)}">{escape(name)}</h2><p>{_text(schema.get("description", ""))}</p>'
    yield "<table><thead><tr><th>Field</th><th>Value</th><th></th></tr></thead><tbody>"
    for field, value in schema.get("properties", {}).items():
        notes = [_text(value["description"])] if "description" in value else []
        notes += ["<strong>required</strong>"] if field in needed else []
        if value.get("default") is not None:
            notes.append(f"by default <code>{escape(json.dumps(value['default']))}</code>")
        yield f"<tr><td><code>{escape(field)}</code></td><td>{kind(value)}</td><td>{'; '.join(notes)}</td></tr>"
    yield "</tbody></table>"


def kind(schema: Mapping[str, Any]) -> str:
    """What a value may be, in HTML."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(kind(choice) for choice in choices if choice.get("type") != "null")
    if "const" in schema or "enum" in schema:
        values = schema.get("enum") or [schema["const"]]
        return " or ".join(f"<code>{escape(str(value))}</code>" for value in values)
    if schema.get("type") == "array":
        return f"list of {kind(schema.get('items', {}))}"
    bounds = [f"{word} {schema[key]:.15g}" for key, word in BOUNDS.items() if key in schema]
    return escape(", ".join([schema.get("type", "anything"), *bounds]))


def _text(words: str) -> str:
    """Words with `code` in them, as docstrings have it."""
    parts = escape(words).split("`")
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))
