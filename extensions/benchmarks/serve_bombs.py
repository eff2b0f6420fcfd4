"""Requests that are made to hurt, against `litgpt serve`: whether others are answered meanwhile, and what they take.

    python extensions/benchmarks/serve_bombs.py --checkpoint DIR [--only NAME ...] [--root OTHER/TREE] [-- OPTIONS]

starts a server of this tree (or of another, for a comparison), and sends it one such request after the other. While one
is on its way, /health is asked 20 times. The Markdown table that it prints has, for each: the status and the seconds
that the request took, the median and the longest of the seconds that /health took, and by how many MB the process's
peak resident memory, and what it held 3 seconds after the request, were above what it held before. Both are with the
processes that render templates, whose memory is read with each question. One in a template comes eight times at once.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
from side_by_side import ROOT

POLLS = 20
PATIENCE = 600  # seconds that a server may take for anything, its start included
MB = 1e6

CHAT, TEXT, PREDICT = "/v1/chat/completions", "/v1/completions", "/predict"


def body(**fields) -> bytes:
    return json.dumps(fields).encode()


def repeated(start: str, part: str, end: str, size: float) -> bytes:
    """A body of this many bytes: a list, or an object, of one part again and again."""
    return (start + ",".join([part] * int(size / (len(part) + 1))) + end).encode()


def keys(start: str, value: str, end: str, size: float) -> bytes:
    """The same with a number in each part that makes it another key."""
    parts = [f'"k{index}":{value}' for index in range(int(size / (len(value) + 11)))]
    return (start + ",".join(parts) + end).encode()


def message(text: str, **options) -> bytes:
    return body(messages=[{"role": "user", "content": text}], max_tokens=1, **options)


# A name, where it goes, and how the body is made. Largest bodies are just below 16 MiB, the server's limit.
BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "3 MB of negative ids": (TEXT, lambda: repeated('{"prompt": [', "-1", "]}", 3e6)),
    "3 MB of negative ids in lists": (TEXT, lambda: repeated('{"prompt": [', "[-1]", "]}", 3e6)),
    "16 MB of ids": (TEXT, lambda: repeated('{"prompt": [', "7", "]}", 16.7e6)),
    "3 MB of unknown fields": (CHAT, lambda: keys('{"messages": [], ', "0", "}", 3e6)),
    "3 MB of wrong biases": (CHAT, lambda: keys('{"messages": [], "logit_bias": {', '"x"', "}}", 3e6)),
    "3 MB of empty messages": (CHAT, lambda: repeated('{"messages": [', "{}", "]}", 3e6)),
    "3 MB of empty parts": (CHAT, lambda: repeated('{"messages": [{"role": "user", "content": [', "{}", "]}]}", 3e6)),
    "3 MB of empty tools": (CHAT, lambda: repeated('{"messages": [], "tools": [', "{}", "]}", 3e6)),
    "3 MB of stop strings": (TEXT, lambda: repeated('{"prompt": "x", "stop": [', "7", "]}", 3e6)),
    "16 MB of empty lists": (CHAT, lambda: repeated('{"messages": [], "metadata": {"x": [', "[]", "]}}", 16.7e6)),
    "500,000 negative ids, which are not too many": (TEXT, lambda: repeated('{"prompt": [', "-1", "]}", 1.5e6)),
    "250,000 empty messages, as many": (CHAT, lambda: repeated('{"messages": [', "{}", "]}", 0.75e6)),
    "15 MB of words": (TEXT, lambda: body(prompt="word and " * 1_666_666)),
    "15 MB without a space": (TEXT, lambda: body(prompt="abc" * 5_000_000)),
    "15 MB of spaces": (TEXT, lambda: body(prompt=" " * 15_000_000)),
    "15 MB in a message": (CHAT, lambda: message("word and " * 1_666_666)),
    "15 MB for /predict": (PREDICT, lambda: body(prompt="word and " * 1_666_666)),
    "15 MB in a tool": (
        CHAT,
        lambda: message(
            "x", tools=[{"type": "function", "function": {"name": "f", "description": "word and " * 1_666_666}}]
        ),
    ),
    "1 MB of letters, as long as some contexts": (TEXT, lambda: body(prompt="xq" * 500_000)),
    "one answer as long as the context": (
        TEXT,
        lambda: body(prompt=[7] * 2000, max_tokens=2**31 - 1, stop=["a", "e", "i", " "]),
    ),
    "128 answers as long as the context": (
        TEXT,
        lambda: body(prompt="x", max_tokens=2**31 - 1, n=128, stop=["a", "e", "i", " "]),
    ),
}


# What a chat template may do, each sent by CLIENTS at once.
TEMPLATES = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "lipsum": "{{ lipsum(n=10**7) }}",
    "a long date": "{% set n = 10**8 %}{{ strftime_now('%c' * n) }}",
    "doubling": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "power": "{% set n = 10**9 %}{{ (9 + messages|length) ** n }}",
    "output": "{% for a in range(99999) %}{% set n = 10**5 %}{{ 'x' * n }}{% endfor %}",
}
CLIENTS = 8
SAID = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
BOMBS |= {
    f"template: {name}": (CHAT, lambda name=name: message("x", chat_template_kwargs={"bomb": name}))
    for name in TEMPLATES
}


def template() -> str:
    """One with all of them, each where a request says so."""
    parts = [f"{{% if bomb == '{name}' %}}{source}{{% endif %}}" for name, source in TEMPLATES.items()]
    return "".join(parts) + SAID + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def renderers(process: psutil.Process) -> float:
    """Bytes that the processes hold which render templates. (One that is just being started still has its parent's
    command line, and memory.)"""
    total = 0
    for child in process.children():
        with suppress(psutil.Error):
            if any(word.endswith("sandbox.py") for word in child.cmdline()):
                total += child.memory_info().rss
    return total


def peak(process: psutil.Process) -> float:
    """Bytes of the most resident memory since it was last reset."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("the system does not tell the peak of resident memory")


def send(url: str, path: str, content: bytes, results: list[str]) -> None:
    start = time.perf_counter()
    try:
        headers = {"Content-Type": "application/json"}
        response = httpx.post(url + path, content=content, headers=headers, timeout=PATIENCE)
        said = response.json().get("error", {}).get("message", "answered")
        results.append(f"{response.status_code} after {time.perf_counter() - start:.1f} s | {said[:90]}")
    except httpx.HTTPError as error:
        results.append(f"{type(error).__name__} after {time.perf_counter() - start:.1f} s |")


def tried(name: str, url: str, process: psutil.Process) -> str:
    """A row of the table."""
    path, make = BOMBS[name]
    content = make()
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # resets the peak
    idle, idle_renderers = process.memory_info().rss, renderers(process)
    results: list[str] = []
    clients = CLIENTS if name.startswith("template") else 1
    threads = [threading.Thread(target=send, args=(url, path, content, results)) for _ in range(clients)]
    for thread in threads:
        thread.start()
    seconds, held = [], [0.0]
    for _ in range(POLLS):
        start = time.perf_counter()
        httpx.get(f"{url}/health", timeout=PATIENCE)
        seconds.append(time.perf_counter() - start)
        held.append(renderers(process) - idle_renderers)
        time.sleep(0.02)
    for thread in threads:
        while thread.is_alive():
            held.append(renderers(process) - idle_renderers)
            thread.join(0.1)
    time.sleep(3)
    after = process.memory_info().rss - idle + renderers(process) - idle_renderers
    above = (peak(process) - idle + max(held)) / MB, after / MB
    row = results[-1].replace(
        "|", f"| {statistics.median(seconds):.3f} | {max(seconds):.2f} | {above[0]:.0f} | {above[1]:.0f} |"
    )
    return f"| {name} | {row} |"


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=10).status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def started(
    root: Path, checkpoint: str, options: Sequence[str], files: int | None = None
) -> Iterator[tuple[str, psutil.Process]]:
    """A server that is ready; its address and process.

    Args:
        root: The tree that it is of.
        checkpoint: What it serves.
        options: Others of `litgpt serve`.
        files: How many it may have open.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "litgpt", "serve", checkpoint, "--port", str(port), *options]
    if files is not None:
        command = ["bash", "-c", f'ulimit -n {files} && exec "$@"', "bash", *command]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, env=environment, cwd=root, stdout=log, stderr=log)
        deadline = time.monotonic() + PATIENCE
        try:
            while not is_ready(url):
                has_ended = server.poll() is not None
                if has_ended or time.monotonic() > deadline:
                    log.seek(0)
                    what = "has ended" if has_ended else f"is not ready after {PATIENCE} s"
                    sys.exit(f"The server {what}. Its log:\n{log.read().decode(errors='replace')[-5000:]}")
                time.sleep(0.2)
            yield url, psutil.Process(server.pid)
        finally:
            server.send_signal(signal.SIGKILL)
            server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree whose server is tried")
    parser.add_argument("--only", nargs="*", help="names of bombs")
    parser.add_argument("serve", nargs="*", help="options of litgpt serve, after --")
    arguments = parser.parse_args()
    names, options = arguments.only or list(BOMBS), list(arguments.serve)
    folder = tempfile.TemporaryDirectory()
    if any(name.startswith("template") for name in names):
        file = Path(folder.name) / "bombs.jinja"
        file.write_text(template())
        options += ["--prompt_style", str(file)]
    with folder, started(arguments.root, arguments.checkpoint, options) as (url, process):
        httpx.post(f"{url}/predict", json={"prompt": "Hello"}, timeout=PATIENCE)
        print("| | answered | /health, median s | longest s | peak, MB | after, MB | what it says |")
        print("|---|---|---|---|---|---|---|")
        for name in names:
            print(tried(name, url, process), flush=True)


if __name__ == "__main__":
    main()
