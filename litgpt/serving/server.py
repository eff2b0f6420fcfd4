"""The program around the application: it listens at once, loads the model meanwhile, and ends gracefully."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from litgpt.serving.served import ServedModel
from litgpt.serving.service import Service

BACKLOG = 2048  # connections that wait to be accepted


class Server(uvicorn.Server):
    """Runs an application until it is told to stop, by SIGTERM or Ctrl-C or `stop`.

    What is running and waiting then is finished first; a second Ctrl-C ends it at once.

    Args:
        app: The application.
        service: Its state.
        load: Loads the models, in a thread of its own, and may take its time.
    """

    def __init__(self, app: FastAPI, service: Service, load: Callable[[], list[ServedModel]]) -> None:
        # No access log: /metrics counts the requests, and nobody's prompt or key gets into a file.
        super().__init__(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off"))
        self.service, self._load = service, load
        self._failure: BaseException | None = None

    def serve_on(self, listener: socket.socket) -> None:
        """Runs until it is stopped.

        Raises:
            BaseException: what went wrong while the models were loaded, or what `fail` was told.
        """
        threading.Thread(target=self._load_models, name="litgpt-load", daemon=True).start()
        try:
            self.run(sockets=[listener])
        finally:
            listener.close()
            workers = {id(model.worker): model.worker for model in self.service.models}
            for worker in workers.values():
                worker.close()
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

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As in the base class, but that a graceful end is a success: the signals are not raised again after it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.service.closing = True
        super().handle_exit(sig, frame)
        if self.force_exit:
            self._end_at_once()

    def _end_at_once(self) -> None:
        self.force_exit = True
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # of every request that is dropped

    def _load_models(self) -> None:
        try:
            self.service.ready(self._load())
        except BaseException as error:  # SystemExit, too: the main thread is to end with it
            self.fail(error)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ValueError: there is no such address, or it is taken.
    """
    if not 0 <= port < 65536:
        raise ValueError(f"--port {port} is not possible: give 1 to 65535, or 0 for any that is free.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ValueError(f"--host {host} is no address of this machine ({error.strerror}).") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ValueError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror}). Choose another port, or stop the "
            "program that uses it."
        ) from error
    return listener
