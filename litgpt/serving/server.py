"""The program around the application: it listens at once, loads the model meanwhile, and ends gracefully."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from litgpt.serving.connections import Connection, Connections, Limits
from litgpt.serving.served import ServedModel
from litgpt.serving.service import Service

BACKLOG = 2048  # connections that wait to be accepted
GRACE = 30.0  # seconds; what starts and ends servers waits as long (Kubernetes)
SPARE = 16  # connections for requests that no answer is made for, such as /health
SECOND = 2.0  # seconds for what must be quick at the end


class Server(uvicorn.Server):
    """Runs an application until it is told to stop, by SIGTERM or Ctrl-C or `stop`.

    What is running and waiting then is finished first, within a bound; a second Ctrl-C ends it at once.

    Args:
        app: The application.
        service: Its state.
        load: Loads the models, in a thread of its own, and may take its time.
        limits: What clients may take.
        grace: How many seconds what is running has to finish.
        say: Is told what the end waits for.
        announce: Called once the models are there and requests are answered.
    """

    def __init__(
        self,
        app: FastAPI,
        service: Service,
        load: Callable[[], list[ServedModel]],
        limits: Limits | None = None,
        grace: float = GRACE,
        say: Callable[[str], None] = lambda text: None,
        announce: Callable[[], None] = lambda: None,
    ) -> None:
        limits = limits or Limits()
        # Not what else may be installed (uvloop, httptools): it was not quicker, and has no limit on headers. Requests
        # are logged by the application, which knows more of them.
        super().__init__(
            uvicorn.Config(
                app,
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="off",
                log_level="error",
                access_log=False,
                timeout_keep_alive=math.ceil(limits.idle),  # of `Limits.idle` itself, connections take care
            )
        )
        self.service, self.grace, self._load, self._say, self._announce = service, grace, load, say, announce
        self.connections = Connections(limits, service.requests.note, getattr(app.state, "origins", None))
        service.capacity = min(service.capacity, max(1, self.connections.most - SPARE))
        self._failure: BaseException | None = None
        self._is_interrupted = False

    def serve_on(self, listener: socket.socket) -> None:
        """Runs until it is stopped.

        Raises:
            BaseException: what went wrong while the models were loaded, or what `fail` was told.
        """
        threading.Thread(target=self._load_models, name="litgpt-load", daemon=True).start()
        try:
            with on_signals(self.handle_exit):
                self.run(sockets=[listener])
        finally:
            listener.close()
            self.service.close()
            workers = {id(model.worker): model.worker for model in self.service.models}
            for worker in workers.values():
                worker.close(timeout=None if self._failure is None and not self.force_exit else SECOND)
        if self._failure is not None:
            raise self._failure

    def stop(self, finish: bool = True) -> None:
        """Lets it end, at once or when what it has is finished. Safe from any thread."""
        self.service.closing = True
        self.should_exit = True
        if not finish:
            self._end_at_once()

    def fail(self, error: BaseException) -> None:
        """Lets it end, since it cannot answer any more; `serve_on` raises the error. Safe from any thread."""
        self._failure = error
        self.stop()

    def leave(self) -> None:
        """Ends the process after `serve_on`, where threads are in the middle of something: Python itself would wait
        for them, or abort where they are in C++.

        Raises:
            KeyboardInterrupt: There are none, and the user did not want to wait.
        """
        for thread in threading.enumerate():
            if thread is not threading.current_thread():
                thread.join(0.1)
        if threading.active_count() > 1:
            _end_process(130 if self._is_interrupted else 0)
        if self._is_interrupted:
            raise KeyboardInterrupt

    # -- the end

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """`serve_on` does."""
        yield

    def handle_exit(self, sig: int, frame: FrameType | None = None) -> None:
        """A signal has come; called in a thread of its own, which nothing holds up."""
        if not self.should_exit:
            self.stop()
            if count := self.service.taken:
                self._say(f"Finishing {count} answers, for at most {self.grace:g} seconds. Ctrl-C ends it at once.")
            self._end_process_after(self.grace + 3 * SECOND, code=0)
        elif sig == signal.SIGINT:
            self._is_interrupted = True
            self._end_at_once()
            self._end_process_after(2 * SECOND, code=130)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen, with connections of our own."""
        assert sockets is not None  # `serve_on` gives one
        (listener,) = sockets
        self.connections.listen(listener, lambda: Connection(self.connections, self.config, self.server_state))
        self.servers = []
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Waits for what runs, as long as it may take."""
        bound = asyncio.ensure_future(self._end_in_time())
        self.connections.close()
        await super().shutdown(sockets)
        self.connections.stop_watching()
        bound.cancel()

    async def _end_in_time(self) -> None:
        await asyncio.sleep(self.grace)
        if count := self.service.taken:
            self._say(f"{count} answers were not finished within {self.grace:g} seconds (--shutdown_timeout).")
        self.service.stop()
        await asyncio.sleep(SECOND)
        self._end_at_once()

    def _end_at_once(self) -> None:
        self.force_exit = True
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # of every request that is dropped

    def _end_process_after(self, seconds: float, code: int) -> None:
        """Sees to it that the process has ended by then, whatever its threads are busy with."""
        timer = threading.Timer(seconds, _end_process, [code])
        timer.daemon = True
        timer.start()

    def _load_models(self) -> None:
        try:
            self.service.ready(self._load())
            self._announce()
        except BaseException as error:  # SystemExit, too: the main thread is to end with it
            self.fail(error)


@contextlib.contextmanager
def on_signals(handle: Callable[[int], None]) -> Generator[None, None, None]:
    """Has SIGINT and SIGTERM handled in a thread of its own, so that it does not matter what the main thread is in the
    middle of. Elsewhere than in the main thread nothing is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = signal.SIGINT, signal.SIGTERM
    if sys.platform == "win32":  # where asyncio needs the only descriptor that signals are written to
        before = [signal.signal(number, lambda number, _: handle(number)) for number in numbers]
        wake, wait = None, None
    else:
        wait, wake = socket.socketpair()
        wake.setblocking(False)
        before = [signal.signal(number, lambda *_: None) for number in numbers]
        previous = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)

        def read() -> None:
            with wait:
                while data := wait.recv(64):
                    for number in filter(numbers.__contains__, data):
                        handle(number)

        threading.Thread(target=read, name="litgpt-signals", daemon=True).start()
    try:
        yield
    finally:
        if wake is not None:
            signal.set_wakeup_fd(previous)
            wake.close()
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _end_process(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ValueError: there is no such address, or it is taken.
    """
    if not 0 <= port < 65536:
        raise ValueError(f"port={port} is not valid: give 1 to 65535, or 0 for any that is free.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ValueError(f"host={host} is not an address of this machine ({error.strerror}).") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ValueError(
            f"host={host} port={port}: cannot listen there ({error.strerror}). Choose another port, or stop the "
            "program that uses it."
        ) from error
    return listener
