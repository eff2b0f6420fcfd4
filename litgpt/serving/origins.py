"""Which web pages may use the server: those of its own address, and those that it was told of.

A browser lets the script of any page send a POST to any server; it asks first (CORS) only where the body is said to be
JSON, and otherwise just keeps the answer from the script. Bodies are read here whatever they are said to be, so that
`curl -d` works. So the page that a request comes from is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from litgpt.serving.errors import ApiError

ANY = "*"
EXPOSED = "Retry-After"  # of the headers of an answer, what a script may see besides the usual ones
DEFAULT_PORTS = {"http": 80, "https": 443}


class Origins:
    """The pages of others that may use it.

    Args:
        allowed: Their origins, such as https://example.com, or "*" for all.
    """

    def __init__(self, allowed: Sequence[str] = ()) -> None:
        self.allowed = tuple(allowed)

    def cors(self, app: ASGIApp) -> ASGIApp:
        """ASGI middleware: lets their scripts read what is answered, and tells browsers that ask."""
        if not self.allowed:
            return app
        methods = ["GET", "HEAD", "POST"]
        return CORSMiddleware(app, self.allowed, methods, allow_headers=["*"], expose_headers=[EXPOSED])

    def headers(self, origin: str | None) -> dict[str, str]:
        """The same for an answer that is given elsewhere than in the application, to a page of this origin."""
        if not self.allowed:
            return {}
        headers = {"Vary": "Origin"}
        allowed = ANY if ANY in self.allowed else origin
        if allowed is not None and allowed in self.allowed:
            headers["Access-Control-Allow-Origin"] = allowed
            headers["Access-Control-Expose-Headers"] = EXPOSED
        return headers

    def allow(self, headers: Mapping[str, str]) -> bool:
        """Whether a request may be answered, as far as it says which page it comes from. (Programs say nothing of it,
        and a script cannot change what its browser says.)"""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if ANY in self.allowed or origin in self.allowed or site == "same-origin":
            return True
        if origin is None:
            return site in (None, "none")
        # A proxy says so what the browser asked for. No page of others can: a browser asks first (CORS) before it sends
        # a header that forms do not have.
        addresses = [headers.get("host", ""), *headers.get("x-forwarded-host", "").split(",")]
        return any(_is_of(origin, address.strip()) for address in addresses)


class OriginCheck:
    """ASGI middleware: no page of others makes the server work.

    Args:
        app: What is guarded.
        origins: The pages that may.
    """

    def __init__(self, app: ASGIApp, origins: Origins) -> None:
        self.app, self.origins = app, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            headers = Headers(scope=scope)
            if not self.origins.allow(headers):
                page = headers.get("origin", "another site")[:100]
                message = (
                    f"Pages of {page} may not use this server. If they should, start it with --cors_origins {page}."
                )
                return await ApiError(403, message, code="origin_not_allowed").response(scope, receive, send)
        return await self.app(scope, receive, send)


def _is_of(origin: str, host: str) -> bool:
    """Whether an origin is of the address in a Host header, which does not say whether that is http or https."""
    try:
        page, own = urlsplit(origin), urlsplit(f"//{host}")
        default = DEFAULT_PORTS.get(page.scheme)
        return (page.hostname, page.port or default) == (own.hostname, own.port or default) and default is not None
    except ValueError:  # a port that is none, half an IPv6 address
        return False
