"""A server on loopback that speaks S3's protocol (moto), behind a proxy that counts requests and misbehaves when told."""

import http.client
import logging
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

REFUSAL = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


@dataclass
class Store:
    """A server, what it was asked, and how it misbehaves."""

    upstream: str
    """Host and port of moto"""
    url: str = ""
    gets: Counter[str] = field(default_factory=Counter)
    """Name of an object -> how often its content was asked for"""
    drop_after: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Name of an object -> after how many bytes to drop the connections of the next requests for it"""
    refuses: bool = False
    """Nothing may be read"""
    delay: threading.Event | None = None
    """Content is sent once this is set"""

    def upload(self, folder: Path, bucket: str, key: str) -> None:
        """Puts the files of a folder into a bucket."""
        for file in folder.rglob("*"):
            if file.is_file():
                self.put(bucket, f"{key}/{file.relative_to(folder).as_posix()}", file.read_bytes())

    def put(self, bucket: str, key: str, content: bytes) -> None:
        import boto3

        keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
        client = boto3.client("s3", endpoint_url=f"http://{self.upstream}", **keys)
        client.create_bucket(Bucket=bucket)
        client.put_object(Bucket=bucket, Key=key, Body=content)


@contextmanager
def serve_s3() -> Iterator[Store]:
    """Runs the server until the block ends."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    store = Store("{}:{}".format(*moto.get_host_and_port()))
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Proxy,), {"store": store}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    store.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        moto.stop()


def connect(store: Store, patch: pytest.MonkeyPatch) -> None:
    """Sends S3's clients there, with credentials from the environment as a user has them."""
    patch.setenv("AWS_ENDPOINT_URL", store.url)
    patch.setenv("AWS_ACCESS_KEY_ID", "key")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    patch.delenv("AWS_PROFILE", raising=False)


class Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def do_HEAD(self) -> None:
        self.forward()

    def do_GET(self) -> None:
        self.forward()

    def forward(self) -> None:
        name = urlsplit(self.path).path.rpartition("/")[2]
        if self.store.refuses:
            return self.answer(403, {"Content-Type": "application/xml"}, REFUSAL)
        connection = http.client.HTTPConnection(self.store.upstream)
        connection.request(self.command, self.path, headers=dict(self.headers))
        response = connection.getresponse()
        body = response.read()
        if self.command == "GET":
            self.store.gets[name] += 1
            if self.store.delay is not None:
                self.store.delay.wait(30)
        cut = self.store.drop_after[name].pop(0) if self.command == "GET" and self.store.drop_after[name] else None
        self.answer(response.status, dict(response.headers), body, cut)

    def answer(self, status: int, headers: dict[str, str], body: bytes, cut: int | None = None) -> None:
        self.send_response(status)
        length = headers.get("Content-Length", str(len(body)))
        for key, value in headers.items():
            if key.lower() not in ("connection", "transfer-encoding", "content-length", "server", "date"):
                self.send_header(key, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command == "GET":
            with suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass
