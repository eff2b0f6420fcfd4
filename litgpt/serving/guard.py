"""What is checked before a request is read: the API key, and how large it is."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from litgpt.serving import page
from litgpt.serving.errors import ApiError

LARGEST_BODY = 16 * 2**20  # bytes: ten times the longest context's text
OPEN = ("/health", "/docs", "/openapi.json", "/favicon.ico", *page.FILES)


class Guard:
    """ASGI middleware.

    Args:
        app: What is guarded.
        api_key: What clients must send as `Authorization: Bearer KEY`, except for the paths in OPEN; None asks for
            nothing.
        largest_body: Bytes.
    """

    def __init__(self, app: ASGIApp, api_key: str | None = None, largest_body: int = LARGEST_BODY) -> None:
        self.app, self.largest_body = app, largest_body
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        if scope["path"] not in OPEN and not self._has_key(headers):
            refusal = ApiError(
                401,
                "The API key is missing or wrong. Send it in the header: Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            return await refusal.response(scope, receive, send)
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.largest_body:
            return await ApiError(413, self._too_large, code="body_too_large").response(scope, receive, send)
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.largest_body:
                raise HTTPException(413, self._too_large)
            return message

        return await self.app(scope, counted, send)

    @property
    def _too_large(self) -> str:
        return f"The body is larger than {self.largest_body:,} bytes."

    def _has_key(self, headers: Headers) -> bool:
        if self._key is None:
            return True
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # bytes: compare_digest takes no text beyond ASCII
        return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1", "replace"), self._key)
