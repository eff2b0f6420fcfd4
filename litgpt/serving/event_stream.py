"""Answers sent while they are made, and what happens when the client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from litgpt.serving.errors import ApiError, internal_error

T = TypeVar("T")
DONE = "data: [DONE]\n\n"


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Stream(StreamingResponse):
    """A streamed response whose source is closed at once when the client goes away."""

    def __init__(
        self, parts: AsyncGenerator[str, None], media_type: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(parts, media_type=media_type, headers=headers)
        self.parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.parts.aclose()


def event(content: dict[str, Any]) -> str:
    """A server-sent event (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def line(content: dict[str, Any]) -> str:
    """A line of JSON."""
    return json.dumps(content, ensure_ascii=False) + "\n"


async def begun(request: Request, parts: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The parts again, once the first is there: what goes wrong until then is the response's status.

    Raises:
        ApiError: as the parts do.
        ClientGone: the client does not wait for it.
    """
    try:
        first = await unless_gone(request, anext(parts))
    except BaseException:
        await parts.aclose()
        raise

    async def all_parts() -> AsyncGenerator[T, None]:
        async with contextlib.aclosing(parts):
            yield first
            async for part in parts:
                yield part

    return all_parts()


async def with_errors(
    parts: AsyncGenerator[str, None], write: Callable[[dict[str, Any]], str]
) -> AsyncGenerator[str, None]:
    """The parts; an error on the way is the last of them, as the status cannot say it any more."""
    async with contextlib.aclosing(parts):
        try:
            async for part in parts:
                yield part
        except ApiError as error:
            yield write(error.body)
        except Exception as error:
            yield write(internal_error(error).body)


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What the work gives, which ends when the client goes away.

    Raises:
        ClientGone: it did.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
