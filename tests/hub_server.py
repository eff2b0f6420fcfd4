"""A server on loopback that speaks as much of the Hugging Face Hub's protocol as a download needs.

Large files (weights) are under Git LFS, as on the Hub: the tree lists their SHA-256, and a request for one is redirected
to another host, which knows neither repositories nor tokens.
"""

import hashlib
import json
import math
import re
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

LFS = (".safetensors", ".bin", ".gguf", ".pth", ".parquet")
CHUNK = 2**16


@dataclass
class Hub:
    """The repositories of a server, what it demands, what it was asked, and how it misbehaves."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Repository id -> file name -> content, of its main branch; a data set's id begins with `datasets/`."""
    revisions: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    """Repository id and branch or tag -> file name -> content."""
    tokens: dict[str, str] = field(default_factory=dict)
    """Repository id -> the token that a gated repository wants for its files."""
    private: dict[str, str] = field(default_factory=dict)
    """Repository id -> the token without which there seems to be no such repository."""
    fail_status: int | None = None
    """Answer every request with this status."""
    failures: list[tuple[str, int, dict[str, str]]] = field(default_factory=list)
    """Part of a path, status, headers: answers the next request for such a path so, once each."""
    drop_after: dict[str, list[int]] = field(default_factory=dict)
    """File name -> after how many bytes to drop the connections of the next requests for it."""
    corrupt: set[str] = field(default_factory=set)
    """Names of files whose last byte is sent wrong."""
    no_ranges: bool = False
    """Send whole files whatever is asked for."""
    delay: float = 0.0
    """Seconds before each 64 KB of a file."""
    most: float = math.inf
    """Of a file, no more than this many bytes are sent; what waits for more goes on once the number is raised."""
    requests: list[str] = field(default_factory=list)
    """`METHOD /path` of every request, in order."""
    sent: Counter[str] = field(default_factory=Counter)
    """File name -> bytes of it that were sent."""
    parts: dict[str, list[list[int]]] = field(default_factory=lambda: defaultdict(list))
    """File name -> for each time that it was sent, from which byte, and how many bytes."""
    tokens_elsewhere: list[str] = field(default_factory=list)
    """Tokens that were sent to the other host."""
    url: str = ""

    def fetched(self) -> list[str]:
        """The names of the files whose content was asked for."""
        return [line.rpartition("/")[2] for line in self.requests if line.startswith("GET") and "/resolve/" in line]

    def files(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files of a revision (a branch, tag or commit)."""
        branches = {"main": self.repositories[repository]}
        branches |= {branch: files for (owner, branch), files in self.revisions.items() if owner == repository}
        commits = {branch: commit_of(repository, branch) for branch in branches}
        return next(((commits[b], f) for b, f in branches.items() if revision in (b, commits[b])), None)


def commit_of(repository: str, branch: str = "main") -> str:
    return hashlib.sha1(f"{repository}@{branch}".encode()).hexdigest()


@contextmanager
def serve_hub(hub: Hub) -> Iterator[Hub]:
    """Serve until the block ends; `hub.url` is what HF_ENDPOINT has to be."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def connect(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process, which has imported the hub's client already, ask `hub`."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", hub.url, raising=False)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url, raising=False)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # the client was killed
            self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        failure = next((entry for entry in self.hub.failures if entry[0] in path), None)
        if failure:
            self.hub.failures.remove(failure)
            return self._send(failure[1], b"", with_body, failure[2])
        if self.hub.fail_status:
            return self._send(self.hub.fail_status, b"", with_body)
        elsewhere = re.fullmatch(r"/elsewhere/(.+?)@(\w+)/(.+)", path)
        if elsewhere:
            self.hub.tokens_elsewhere += filter(None, [self.headers.get("Authorization")])
            return self._send_file(elsewhere[3], self.hub.files(elsewhere[1], elsewhere[2])[1][elsewhere[3]], with_body)
        api = re.fullmatch(r"/api/(?:models/|(?=datasets/))(.+?)/(revision|tree)/(.+)", path)
        file = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path)
        match = api or file
        repository = match[1] if match else ""
        if repository not in self.hub.repositories or not self._has(self.hub.private.get(repository)):
            return self._send(401, b"{}", with_body, {"X-Error-Code": "RepoNotFound"})
        revision, folder = match[3] if api else match[2], ""
        if api and api[2] == "tree" and self.hub.files(repository, revision) is None:
            revision, _, folder = revision.rpartition("/")  # what stands in one folder
        found = self.hub.files(repository, revision)
        if found is None:
            return self._send(404, b"{}", with_body, {"X-Error-Code": "RevisionNotFound"})
        commit, files = found
        if file and not self._has(self.hub.tokens.get(repository)):
            status = 403 if self.headers.get("Authorization") else 401
            return self._send(status, b"{}", with_body, {"X-Error-Code": "GatedRepo"})
        if api:
            if api[2] == "revision":
                return self._send_json(_info(repository, commit, files))
            if folder:
                return self._send_json([_entry(name, files[name]) for name in files if name.startswith(f"{folder}/")])
            return self._send_json(_tree(files, "recursive=true" in self.path.lower()))
        if match[3] not in files:
            return self._send(404, b"", with_body, {"X-Error-Code": "EntryNotFound"})
        name, content = match[3], files[match[3]]
        headers = {"X-Repo-Commit": commit}
        if name.endswith(LFS):
            host = self.hub.url.replace("127.0.0.1", "localhost")
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{_digest(name, content)}"'}
            headers["Location"] = f"{host}/elsewhere/{repository}@{commit}/{name}"
            return self._send(302, b"", with_body, headers)
        self._send_file(name, content, with_body, headers)

    def _has(self, token: str | None) -> bool:
        return token is None or self.headers.get("Authorization") == f"Bearer {token}"

    def _send_file(self, name: str, content: bytes, with_body: bool, headers: dict[str, str] | None = None) -> None:
        if name in self.hub.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        headers = {**(headers or {}), "ETag": f'"{_digest(name, content)}"', "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part is None or self.hub.no_ranges:
            return self._send(200, content, with_body, headers, name)
        first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
        if first >= len(content):
            return self._send(416, b"", with_body, {"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._send(206, content[first : last + 1], with_body, headers, name)

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), True, {"Content-Type": "application/json"})

    def _send(
        self, status: int, body: bytes, with_body: bool, headers: dict[str, str] | None = None, name: str = ""
    ) -> None:
        self.send_response(status)
        for header, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(header, value)
        self.end_headers()
        if not with_body:
            return
        sent = [int(re.sub(r"bytes (\d+)-.*", r"\1", (headers or {}).get("Content-Range", "0"))), 0]
        self.hub.parts[name].append(sent)
        end = self.hub.drop_after[name].pop(0) if self.hub.drop_after.get(name) else None
        for start in range(0, len(body[:end]), CHUNK):
            if name:
                time.sleep(self.hub.delay)
            part = body[:end][start : start + CHUNK]
            while name and sent[0] + start + len(part) > self.hub.most:
                time.sleep(0.01)
            self.wfile.write(part)
            self.hub.sent[name] += len(part)
            sent[1] += len(part)
        if end is not None:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


def _digest(name: str, content: bytes) -> str:
    if name.endswith(LFS):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _info(repository: str, commit: str, files: dict[str, bytes]) -> dict:
    siblings = [{"rfilename": name} for name in files]
    return {"id": repository, "modelId": repository, "sha": commit, "siblings": siblings, "tags": [], "private": False}


def _tree(files: dict[str, bytes], recursive: bool) -> list[dict]:
    """What stands at the top level, or everywhere."""
    folders = dict.fromkeys(name.partition("/")[0] for name in files if "/" in name)
    listed = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in folders]
    return listed + [_entry(name, content) for name, content in files.items() if recursive or "/" not in name]


def _entry(name: str, content: bytes) -> dict:
    entry = {"type": "file", "path": name, "size": len(content), "oid": _digest("", content)}
    if name.endswith(LFS):
        entry["lfs"] = {"oid": _digest(name, content), "size": len(content), "pointerSize": 134}
    return entry
