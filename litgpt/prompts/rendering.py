"""Chat templates, rendered within bounds on time, memory and length."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from litgpt.prompts import sandbox

SECONDS = 2.0  # of processor time for one conversation, which takes a few hundred microseconds
PATIENCE = 20.0  # seconds until it is given up, on a machine that has no time for it
MEMORY = 96 << 20  # bytes that a rendering may take, and this many for each byte of the conversation:
MEMORY_PER_BYTE = 16
CHARACTERS = 16 << 20  # of the text, and this many for each byte of the conversation:
CHARACTERS_PER_BYTE = 8
PROCESSES = 2  # at a time; each takes 20 MB
PIPE = 1 << 18  # bytes that a process may be sent before it reads, where the system lets a pipe have this many
LEAST_PIPE = 1 << 14  # and elsewhere
# What a process gets of the environment: what time it is where, and no tokens.
ENVIRONMENT = ("TZ", "TZDIR", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
REMEDY = "`prompt_style` takes another format."


class TemplateLimitError(ValueError):
    """A template took more time or memory than any conversation needs."""


def check_template(source: str) -> None:
    """Raises ValueError where that is no Jinja template."""
    _processes.ask(source, None)


def render_template(source: str, variables: Mapping[str, Any]) -> str:
    """The text that a template makes of its variables.

    Raises:
        TemplateLimitError: It takes too much time or memory, or makes too long a text.
        ValueError: It is no Jinja, or refuses the variables.
    """
    return _processes.ask(source, dict(variables))


@contextlib.contextmanager
def rendered_ahead(requests: Iterable[tuple[str, Mapping[str, Any]]]) -> Generator[None]:
    """What this thread asks for within, of these templates and variables, has been rendered at once, as far as a pipe
    holds it: for short texts it is the way to the process and back that takes the time."""
    before = _ahead.texts
    _ahead.texts = _processes.ask_ahead(_pickled((source, dict(variables))) for source, variables in requests)
    try:
        yield
    finally:
        _ahead.texts = before


class _Ahead(threading.local):
    """What this thread has had rendered already, by its request."""

    def __init__(self) -> None:
        self.texts: dict[bytes, str] = {}


class _Process:
    """A process that renders."""

    def __init__(self) -> None:
        places = [_folder_of(name) for name in ("jinja2", "markupsafe")]
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", sandbox.__file__, *dict.fromkeys(places)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
            start_new_session=True,  # Ctrl-C is for this process
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.pipes = self.process.stdin, self.process.stdout
        self.requests, self.answers = self.process.stdin, self.process.stdout.fileno()
        self.at_once = _pipe_size(self.requests) // 2  # a pipe counts in pages
        self.poll = select.poll()
        self.poll.register(self.answers, select.POLLIN | select.POLLHUP)

    def ask(self, *requests: bytes) -> Generator[tuple[bytes, str]]:
        """What it answers to each, kind and text. Several must not have more than `at_once` bytes together, or both
        sides might wait until the other reads."""
        with contextlib.suppress(BrokenPipeError):  # why it has ended is seen below
            self.requests.write(b"".join(_head(request) + request for request in requests))
            self.requests.flush()
        for _ in requests:
            deadline = time.monotonic() + PATIENCE
            kind, length = sandbox.ANSWER.unpack(self._read(sandbox.ANSWER.size, deadline))
            yield kind, self._read(length, deadline).decode("utf-8", "surrogatepass")

    def _read(self, count: int, deadline: float) -> bytes:
        parts = []
        while count:
            left = deadline - time.monotonic()
            if left <= 0 or not self.poll.poll(left * 1000):
                raise TemplateLimitError(_too_much(f"{PATIENCE:g} seconds"))
            part = os.read(self.answers, min(count, 1 << 20))
            if not part:
                raise TemplateLimitError(self._why_it_ended())
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def _why_it_ended(self) -> str:
        code = self.process.wait()
        if hasattr(signal, "SIGPROF") and code == -signal.SIGPROF:
            return _too_much(f"{SECONDS:g} seconds of processor time")
        return f"The checkpoint's chat template brings down the process that renders it (exit code {code}). {REMEDY}"

    def end(self) -> None:
        """Ends it, whatever it does."""
        self.process.kill()
        self.process.wait()
        self.forget()

    def forget(self) -> None:
        """Closes what leads to it."""
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.close()


class _Processes:
    """Those that are there, started when they are first needed. Safe from any thread."""

    def __init__(self) -> None:
        self._places = threading.BoundedSemaphore(PROCESSES)
        self._idle: list[_Process] = []

    def ask(self, source: str, variables: dict[str, Any] | None) -> str:
        request = _pickled((source, variables))
        if request in _ahead.texts:
            return _ahead.texts[request]
        with self._process() as process:
            ((kind, text),) = process.ask(request)
            if kind == sandbox.TOO_LARGE:
                raise TemplateLimitError(_too_much(f"{MEMORY >> 20} MB of memory"))
        if kind == sandbox.TOO_LONG:
            raise TemplateLimitError(_too_much(f"{CHARACTERS >> 20} million characters"))
        if kind == sandbox.INVALID:
            raise ValueError(f"The checkpoint's chat template is not valid Jinja: {text}")
        if kind == sandbox.REFUSED:
            raise ValueError(f"The checkpoint's chat template refuses this conversation: {text}")
        return text

    def ask_ahead(self, requests: Iterable[bytes]) -> dict[bytes, str]:
        """The texts of these requests, as far as there are: what becomes of another is seen when it is asked for."""
        # Before a process is taken, since making them may need one, too.
        first = _fitting(requests, PIPE)
        texts: dict[bytes, str] = {}
        with contextlib.suppress(TemplateLimitError), self._process() as process:
            fitting = _fitting(first, process.at_once)
            for request, (kind, text) in zip(fitting, process.ask(*fitting), strict=True):
                if kind == sandbox.TOO_LARGE:
                    raise TemplateLimitError
                if kind == sandbox.TEXT:
                    texts[request] = text
        return texts

    @contextlib.contextmanager
    def _process(self) -> Generator[_Process]:
        """One that nobody else asks meanwhile."""
        with self._places:
            try:
                process = self._idle.pop()
            except IndexError:
                process = _Process()
            try:
                yield process
            except BaseException:  # Ctrl-C, too: what it answers later is no answer to the next request
                process.end()
                raise
            self._idle.append(process)

    def end(self) -> None:
        """Ends those that are idle."""
        while self._idle:
            self._idle.pop().end()

    def forget(self) -> None:
        """In a process that was forked: those of its parent are not its own."""
        for process in self._idle:
            process.forget()
        self.__init__()


def _folder_of(name: str) -> str:
    """Where a package is installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return str(Path(spec.origin).parents[1])


def _pipe_size(pipe: IO[bytes]) -> int:
    """The bytes that one holds; it is made larger where the system lets it."""
    try:
        import fcntl

        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE)
        return fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ)
    except (ImportError, AttributeError, OSError):  # Linux alone knows it
        return LEAST_PIPE


def _fitting(requests: Iterable[bytes], room: int) -> list[bytes]:
    """The first ones, as many as have room together."""
    fitting = []
    for request in requests:
        room -= sandbox.REQUEST.size + len(request)
        if room < 0:
            break
        fitting.append(request)
    return fitting


def _head(request: bytes) -> bytes:
    """What goes before a request: its length, and the bounds for it."""
    size = len(request)
    memory, characters = MEMORY + MEMORY_PER_BYTE * size, CHARACTERS + CHARACTERS_PER_BYTE * size
    return sandbox.REQUEST.pack(size, SECONDS, memory, characters)


def _too_much(bound: str) -> str:
    return f"The checkpoint's chat template takes more than {bound} for one conversation, and was stopped. {REMEDY}"


def _pickled(request: tuple[str, Any]) -> bytes:
    try:
        try:
            return pickle.dumps(request, pickle.HIGHEST_PROTOCOL)
        except (TypeError, AttributeError, pickle.PicklingError):
            return pickle.dumps(_plain(request), pickle.HIGHEST_PROTOCOL)
    except RecursionError:
        problem = "it is nested too deep"
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        problem = str(error)
    raise ValueError(f"The conversation cannot be given to the checkpoint's chat template: {problem}.")


def _plain(value: Any) -> Any:
    """Mappings of any kind as Python's own, wherever they stand."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else list(map(_plain, value))
    return value


_ahead = _Ahead()
_processes = _Processes()
atexit.register(_processes.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_processes.forget)
