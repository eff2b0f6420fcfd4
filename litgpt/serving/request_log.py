"""Every request: counted for /metrics, and a line in the log, without what it says or a key."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from litgpt.serving.prometheus import Metrics

LONGEST = 200  # characters of a path that are written


@dataclass
class Tally:
    """The tokens of a request."""

    prompt: int = 0
    generated: int = 0


_tally: ContextVar[Tally | None] = ContextVar("tally", default=None)


def count_tokens(prompt: int = 0, generated: int = 0) -> None:
    """So many more tokens belong to the request that is being answered here."""
    tally = _tally.get()
    if tally is not None:
        tally.prompt += prompt
        tally.generated += generated


class RequestLog:
    """Counts requests, and writes a line for each.

    Args:
        metrics: Where they are counted.
        write: Called with the lines; by default there are none.
    """

    def __init__(self, metrics: Metrics, write: Callable[[str], None] | None = None) -> None:
        self.metrics, self.write = metrics, write

    def note(
        self,
        status: int,
        seconds: float,
        method: str = "-",
        path: str = "-",
        route: str = "other",
        tally: Tally | None = None,
    ) -> None:
        """A request that is over.

        Args:
            status: Of HTTP; 499 where the client went away before there was one.
            seconds: From its headers to the end of the answer.
            method: As the client wrote it.
            path: As the client wrote it, without what follows a question mark, where some send keys.
            route: The path as we write it.
            tally: Its tokens, where it came so far.
        """
        # Unknown paths are the client's words: they must not become labels, of which there is no end.
        self.metrics.requests.labels(route, str(status)).inc()
        if self.write is None:
            return
        tokens = f", {tally.prompt} tokens in, {tally.generated} out" if tally and tally.prompt else ""
        what = f"{printable(method)} {printable(path)} {status}{tokens}, {seconds:.2f} s"
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {what}"
        with contextlib.suppress(OSError):  # a full disk, a terminal that is gone: the answer was given
            self.write(line)


def printable(text: str) -> str:
    """A client's words, fit for a terminal: no control characters, one line, not too long."""
    text = text if len(text) <= LONGEST else text[:LONGEST] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class LogRequests:
    """ASGI middleware: notes every request when it is over. A HEAD is answered as the GET that it stands for, whose
    body the server leaves out."""

    def __init__(self, app: ASGIApp, log: RequestLog) -> None:
        self.app, self.log = app, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status, began, tally = 499, time.monotonic(), Tally()  # 499: the client went away before there was another
        _tally.set(tally)
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(inner, receive, noted)
        finally:
            route = getattr(inner.get("route"), "path", "other")
            path = scope.get("raw_path", scope["path"].encode()).decode("ascii", "backslashreplace")
            seconds = time.monotonic() - began
            self.log.note(scope.get("state", {}).get("ended", status), seconds, scope["method"], path, route, tally)
        return None
