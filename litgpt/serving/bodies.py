"""The body of a request: read, taken apart and checked off the event loop, in bounded time and memory.

FastAPI does this in the event loop, and pydantic makes an object of each thing that is wrong: three megabytes of wrong
numbers hold everybody up for a minute, and take gigabytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from litgpt.cli.untrusted import ExcessError, parse_json
from litgpt.serving.errors import ApiError, validation_error
from litgpt.serving.event_stream import ClientGone
from litgpt.serving.service import Service

MOST_VALUES = 2**19
"""Numbers, texts, lists and objects in a body. Python's JSON takes 100 bytes for each, and holds everything up."""

Model = TypeVar("Model", bound=BaseModel)


def json_route(service: Service) -> type[APIRoute]:
    """A class of routes whose endpoints take a body, in JSON, and the request; FastAPI describes them as its own.

    Args:
        service: The server's state, off whose event loop bodies are parsed.
    """

    class JsonRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            model = self.body_field and self.body_field.field_info.annotation
            if not (isinstance(model, type) and issubclass(model, BaseModel)):
                return super().get_route_handler()

            async def handle(request: Request) -> Response:
                return await self.endpoint(await _read(request, model, service), request)

            return handle

    return JsonRoute


def parse(data: bytes | bytearray, model: type[Model]) -> Model:
    """What the body of a request says.

    Args:
        data: JSON.
        model: What it must be.

    Raises:
        ApiError: 400 or 422, it is not; 413, it has too many parts.
    """
    if not data:
        raise ApiError(422, "The body is empty. It must be a JSON object.", code="invalid_request")
    # At least one of these characters belongs to each value but the first; those in texts are counted, too, which takes
    # far longer to avoid than the largest text that a model has a context for is worth.
    values = sum(data.count(mark) for mark in b",[{")
    if values > MOST_VALUES:
        message = f"The body has {values:,} commas and brackets; {MOST_VALUES:,} are the most. Send less at a time."
        raise ApiError(413, message, code="body_too_large")
    try:
        content = parse_json(data)
    except json.JSONDecodeError as error:
        message = f"The body is not valid JSON: {error.msg} at character {error.pos}"
        raise ApiError(422, message, code="invalid_request") from None
    except ExcessError as error:
        message = f"The body is not taken: {error}. Send it with fewer lists and objects in each other."
        raise ApiError(400, message, code="invalid_request") from None
    except ValueError:  # no text, a number of thousands of digits
        raise ApiError(400, "There was an error parsing the body: it is no JSON that can be read.") from None
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        raise validation_error(problems, list(model.model_fields)) from None


async def _read(request: Request, model: type[Model], service: Service) -> Model:
    """The body, whatever it is said to be: `curl -d` calls all a form. `request.state.size` is how many bytes it had,
    which nobody keeps."""
    data = await _received(request)
    request.state.size = len(data)
    return await service.aside(lambda: parse(data, model), len(data))


async def _received(request: Request) -> bytearray:
    data = bytearray()
    try:
        async for part in request.stream():
            data += part
    except ClientDisconnect:
        raise ClientGone from None
    return data
