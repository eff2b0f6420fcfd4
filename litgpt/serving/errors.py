"""What a client is told when something goes wrong, in OpenAI's form: {"error": {message, type, param, code}}."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from litgpt.cli.suggest import did_you_mean
from litgpt.generation.rank_engine import RanksLost
from litgpt.tokenizer.tokenizer import TextTooLongError

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError")
logger = logging.getLogger("litgpt.serving")


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: Of HTTP.
        message: What is wrong and what to do.
        param: The field of the request that it is about.
        code: What programs tell errors apart by.
        headers: For the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = self.message.encode("utf-8", "replace").decode()  # a client's surrogates cannot be sent back
        param = self.param and self.param.encode("utf-8", "replace").decode()
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def bad_request(error: ValueError, param: str | None, code: str | None = "invalid_value") -> ApiError:
    """A request that can be read and cannot be served."""
    return ApiError(400, str(error), param=param, code=code)


def prompt_error(error: ValueError, param: str) -> ApiError:
    """A prompt that cannot be written or encoded."""
    too_long = isinstance(error, TextTooLongError)
    return bad_request(error, param, "context_length_exceeded" if too_long else "invalid_value")


def engine_error(error: Exception) -> ApiError:
    """What the engine raised while it worked on the request."""
    if type(error).__name__ in OUT_OF_MEMORY:
        logger.error("out of memory: %s", error)
        message = "The server has too little memory for this request. Try a shorter one, or later."
        return ApiError(503, message, code="out_of_memory", headers={"Retry-After": "5"})
    if isinstance(error, RuntimeError) and "shut down" in str(error):
        return ApiError(503, "The server is shutting down.", code="shutting_down", headers={"Retry-After": "5"})
    if isinstance(error, RanksLost):  # the server is about to end
        return ApiError(503, "The server has lost a process that has a part of the model.", code="shutting_down")
    return internal_error(error)


def internal_error(error: Exception) -> ApiError:
    """A mistake of ours: the log has the details, the client does not."""
    logger.error("%s while answering a request", type(error).__name__, exc_info=error)
    return ApiError(500, "The server made a mistake. Its log has the details.", code="internal_error")


def validation_error(problems: Sequence[Mapping[str, Any]], known: Sequence[str] = ()) -> ApiError:
    """What pydantic found, as one message.

    Args:
        problems: Its list of errors.
        known: Names of fields, to suggest one for another that is not known.
    """
    parts, params = [], []
    for problem in problems[:5]:
        place = ".".join(str(part) for part in problem["loc"] if part != "body" and not _is_branch(part))[:100]
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = f"there is no such field.{did_you_mean(place, known)}"
        said = f"{place}: {message}" if place else f"The body: {message}"
        if said not in parts:
            parts.append(said)
            params.append(place)
    return ApiError(422, "; ".join(parts), param=params[0] if params else None, code="invalid_request")


def _is_branch(part: object) -> bool:
    """Whether a part of a place is no field: pydantic's word for one of the types that a field may have."""
    return isinstance(part, str) and (part in ("str", "int", "float", "bool", "dict") or part.endswith("]"))


class Unforeseen:
    """ASGI middleware: what nobody has foreseen is answered with 500. (FastAPI's own answer to that is made outside of
    all middleware: it would not be logged, and no web page could read it.) An answer that has begun is broken off."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def noted(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except Exception as error:
            if has_begun or scope["type"] != "http":
                raise
            await internal_error(error).response(scope, receive, send)


def install(app: FastAPI) -> None:
    """Every error of the application leaves in this form."""
    app.add_middleware(Unforeseen)

    async def answer(_: Request, error: Exception) -> JSONResponse:
        if isinstance(error, HTTPException):
            code = "not_found" if error.status_code == 404 else None
            error = ApiError(error.status_code, error.detail, code=code, headers=error.headers)
        return (error if isinstance(error, ApiError) else engine_error(error)).response

    for kind in (ApiError, HTTPException, RanksLost):
        app.add_exception_handler(kind, answer)
