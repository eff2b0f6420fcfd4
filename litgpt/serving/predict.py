"""`/predict`: {"prompt": ...} -> {"output": ...}."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from litgpt.generation.request import Request as EngineRequest
from litgpt.serving.async_engine import Answers
from litgpt.serving.bodies import json_route
from litgpt.serving.errors import prompt_error
from litgpt.serving.event_stream import Stream, begun, line, unless_gone, with_errors
from litgpt.serving.openai_api import sampling_of
from litgpt.serving.schemas import PredictRequest
from litgpt.serving.service import Service


def router(service: Service, path: str, stream: bool) -> APIRouter:
    """The route.

    Args:
        service: The server's state.
        path: Where it is.
        stream: Answer in lines of JSON, {"output": the next piece}, as the text comes.
    """
    routes = APIRouter(tags=["LitGPT"], route_class=json_route(service))

    @routes.post(path)
    async def predict(body: PredictRequest, request: Request) -> Response:
        """The answer to a prompt."""
        service.model()
        answers = await unless_gone(request, service.aside(lambda: prepare_text(service, body), request.state.size))
        if not stream:
            return JSONResponse({"output": await unless_gone(request, _whole(answers))})
        lines = await begun(request, _lines(answers))
        return Stream(with_errors(lines, line), media_type="application/x-ndjson")

    return routes


def prepare_text(service: Service, body: PredictRequest) -> Answers:
    """The prompt in the model's format.

    Raises:
        ApiError: a field has a value that cannot be served.
    """
    model = service.model()
    try:
        prompt = model.codec.encode([{"role": "user", "content": body.prompt}], room=model.context)
    except ValueError as error:
        raise prompt_error(error, "prompt") from None
    most = body.max_new_tokens or model.defaults.max_new_tokens
    return Answers(service, model, [EngineRequest(prompt, most, sampling_of(body, model), model.stops)])


async def _whole(answers: Answers) -> str:
    async with contextlib.aclosing(answers.pieces()) as pieces:
        return "".join([piece.text async for piece in pieces])


async def _lines(answers: Answers) -> AsyncGenerator[str, None]:
    async with contextlib.aclosing(answers.pieces()) as pieces:
        async for piece in pieces:
            yield line({"output": piece.text})
