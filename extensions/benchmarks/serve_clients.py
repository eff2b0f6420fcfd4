"""Clients that take and do not give, against `litgpt serve`: whether others are answered meanwhile, and what it takes.

    python extensions/benchmarks/serve_clients.py --checkpoint DIR [--root OTHER/TREE] [-- SERVE OPTIONS]

starts a server of this tree (or of another, for a comparison) that may have 128 files open, and has 200 such clients
come, of one kind after the other. While they are there, and send a little every half second where they are slow,
/health is asked 20 times. The Markdown table that it prints has, for each kind: how many of the 20 were answered, the
median and the longest of the seconds that it took, the clients that were left, and by how many MB the process's peak
resident memory was above what it held before.
"""

import argparse
import contextlib
import socket
import statistics
import threading
import time
from pathlib import Path

import httpx
import psutil
from serve_bombs import MB, POLLS, peak, started
from side_by_side import ROOT

FILES = 128
CLIENTS = 200
PATIENCE = 5  # seconds for an answer of /health
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LARGE = POST + b"Content-Length: 15000000\r\n\r\n"

# What each sends at first, and then again and again.
KINDS = {
    "that say nothing": (b"", b""),
    "whose headers do not end": (b"GET /health HTTP/1.1\r\nX-Slow: ", b"x"),
    "whose bodies do not end": (LARGE + b'{"messages": [', b" " * 1000),
    "whose chunks do not end": (POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "whose bodies of 15 MB lack the end": (LARGE + b" " * 14_000_000, b""),
    "that do not read": (b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2000, b""),
}


class Clients:
    """Some clients of one kind, in a thread each.

    Args:
        url: The server.
        first: What they send when they come.
        then: What they send every half second.
    """

    def __init__(self, url: str, first: bytes, then: bytes) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self.address, self.first, self.then = (host, int(port)), first, then
        self.left, self.over = 0, threading.Event()
        self.threads = [threading.Thread(target=self.behave, daemon=True) for _ in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    def behave(self) -> None:
        try:
            with socket.create_connection(self.address, timeout=60) as connection:
                connection.sendall(self.first)
                self.left += 1
                while not self.over.wait(0.5):
                    connection.sendall(self.then or b"")
                    self.look(connection)
        except OSError:
            pass

    def look(self, connection: socket.socket) -> None:
        """Whether the server still wants it."""
        connection.setblocking(False)
        try:
            if self.first.startswith(b"GET /openapi") or connection.recv(1):
                return
            raise ConnectionResetError
        except BlockingIOError:
            connection.settimeout(60)

    def go(self) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(60)


def tried(name: str, url: str, process: psutil.Process) -> str:
    """A row of the table."""
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # resets the peak
    before = process.memory_info().rss
    clients = Clients(url, *KINDS[name])
    time.sleep(3)
    seconds, answered = [], 0
    for _ in range(POLLS):
        start = time.perf_counter()
        with contextlib.suppress(httpx.HTTPError):
            answered += httpx.get(f"{url}/health", timeout=PATIENCE).status_code == 200
        seconds.append(time.perf_counter() - start)
        time.sleep(0.1)
    above = (peak(process) - before) / MB
    held = sum(thread.is_alive() for thread in clients.threads)
    clients.go()
    return f"| {name} | {answered} | {statistics.median(seconds):.3f} | {max(seconds):.2f} | {held} | {above:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree whose server is tried")
    parser.add_argument("--only", nargs="*", default=list(KINDS), help="kinds of clients")
    parser.add_argument("serve", nargs="*", help="options of litgpt serve, after --")
    arguments = parser.parse_args()
    print(f"| {CLIENTS} clients, {FILES} files | answered of {POLLS} | median s | longest s | left | peak, MB |")
    print("|---|---|---|---|---|---|")
    for name in arguments.only:
        with started(arguments.root, arguments.checkpoint, arguments.serve, FILES) as (url, process):
            print(tried(name, url, process), flush=True)


if __name__ == "__main__":
    main()
