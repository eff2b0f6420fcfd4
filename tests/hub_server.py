"""A server on loopback that speaks as much of the Hugging Face Hub's protocol as the client needs for a download."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """The repositories of a server, what it demands, and what it was asked."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Repository id -> file name -> content."""
    tokens: dict[str, str] = field(default_factory=dict)
    """Repository id -> the token that a gated repository wants."""
    fail_status: int | None = None
    """Answer every request with this status."""
    requests: list[str] = field(default_factory=list)
    """`METHOD /path` of every request, in order."""
    url: str = ""

    def fetched(self) -> list[str]:
        """The names of the files whose content was sent."""
        return [line.rpartition("/")[2] for line in self.requests if line.startswith("GET") and "/resolve/" in line]


@contextmanager
def serve_hub(hub: Hub) -> Iterator[Hub]:
    """Serve until the block ends; `hub.url` is what HF_ENDPOINT has to be."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.fail_status:
            return self._send(self.hub.fail_status, b"", with_body)
        api = re.fullmatch(r"/api/models/(.+?)/(revision|tree)/([^/]+)", path)
        file = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path)
        match = api or file
        repository = match[1] if match else ""
        files = self.hub.repositories.get(repository)
        if files is None:
            return self._send(404, b"{}", with_body, {"X-Error-Code": "RepoNotFound"})
        commit = hashlib.sha1(repository.encode()).hexdigest()
        revision = match[3] if api else match[2]
        if revision not in ("main", commit):
            return self._send(404, b"{}", with_body, {"X-Error-Code": "RevisionNotFound"})
        wanted = self.hub.tokens.get(repository)
        if file and wanted and self.headers.get("Authorization") != f"Bearer {wanted}":
            return self._send(401, b"{}", with_body, {"X-Error-Code": "GatedRepo"})
        if api:
            return self._send_json(_info(repository, commit, files) if api[2] == "revision" else _tree(files))
        if match[3] not in files:
            return self._send(404, b"", with_body, {"X-Error-Code": "EntryNotFound"})
        content = files[match[3]]
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start and int(start[1]) < len(content):
            headers["Content-Range"] = f"bytes {start[1]}-{len(content) - 1}/{len(content)}"
            return self._send(206, content[int(start[1]) :], with_body, headers)
        return self._send(200, content, with_body, headers)

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), True, {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, with_body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def _etag(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _info(repository: str, commit: str, files: dict[str, bytes]) -> dict:
    siblings = [{"rfilename": name} for name in files]
    return {"id": repository, "modelId": repository, "sha": commit, "siblings": siblings, "tags": [], "private": False}


def _tree(files: dict[str, bytes]) -> list[dict]:
    return [
        {"type": "file", "path": name, "size": len(content), "oid": _etag(content)} for name, content in files.items()
    ]
