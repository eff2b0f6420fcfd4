"""What is checked before a request is read: whom it is for, the API key, and how large it is."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from litgpt.cli.secret import Secret, reveal
from litgpt.serving import page
from litgpt.serving.errors import ApiError

LARGEST_BODY = 16 * 2**20  # bytes: ten times the longest context's text
OPEN = ("/health", "/docs", "/openapi.json", "/favicon.ico", *page.FILES)


class HostCheck:
    """ASGI middleware: answers to certain host names only.

    A web page of anybody can have its own host name lead to this machine (DNS rebinding). Its requests count as its own
    then, for the browser; but they still carry that name.

    Args:
        app: What is guarded.
        hosts: Names; `*.example.com` for all below one; `*` for all there are. This machine's own, as localhost and
            127.0.0.1, are always among them.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self.app, self.hosts = app, [host.lower() for host in hosts]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self.goes_by(name := host_name(Headers(scope=scope).get("host", ""))):
            message = (
                f"This server does not go by the name {name[:100]!r}. If it should, start it with --allowed_hosts "
                f"{name[:100]}."
            )
            return await ApiError(403, message, code="host_not_allowed").response(scope, receive, send)
        return await self.app(scope, receive, send)

    def goes_by(self, name: str) -> bool:
        """Whether the server answers to a name."""
        return (
            not name
            or is_loopback(name)
            or any(host in ("*", name) or (host.startswith("*.") and name.endswith(host[1:])) for host in self.hosts)
        )


def host_name(header: str) -> str:
    """The name in a Host header, which may have a port after it."""
    name, _, port = header.strip().rpartition(":")
    return (name if port.isdecimal() or not port else header.strip()).strip("[]").rstrip(".").lower()


def is_loopback(name: str) -> bool:
    """Whether a name or address is of this machine alone (RFC 6761 for the names)."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


class Guard:
    """ASGI middleware.

    Args:
        app: What is guarded.
        api_key: What clients must send as `Authorization: Bearer KEY`, except for the paths in OPEN; None asks for
            nothing.
        largest_body: Bytes.
    """

    def __init__(self, app: ASGIApp, api_key: Secret | str | None = None, largest_body: int = LARGEST_BODY) -> None:
        self.app, self.largest_body = app, largest_body
        self._key = None if api_key is None else reveal(api_key).encode()

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
