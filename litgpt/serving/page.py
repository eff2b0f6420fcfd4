"""The chat page at `/`: static files, and the headers that keep everything else out of it."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

STATIC = Path(__file__).with_name("static")
# Said here, not guessed: on some systems the registry calls a script text/plain, and a browser then refuses it.
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FILES = {
    "/" if path.name == "index.html" else f"/static/{path.name}": path
    for path in sorted(STATIC.iterdir())
    if path.suffix in KINDS
}
"""What is served where."""
# https://www.w3.org/TR/CSP3/: nothing from elsewhere, no script or style within the markup, and (Trusted Types) no text
# that becomes markup: what a model writes could not run even if the page put it there.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a newer version is seen at once
}


def router() -> APIRouter:
    """The routes."""
    routes = APIRouter()
    for address, path in FILES.items():
        routes.add_api_route(address, _sender(path), methods=["GET", "HEAD"], include_in_schema=False)
    return routes


def _sender(path: Path):
    async def send() -> FileResponse:
        return FileResponse(path, headers=HEADERS, media_type=KINDS[path.suffix])

    return send
