"""One engine for many callers: a thread that runs it, and requests that join and leave whenever they want."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

from litgpt.generation.interface import GenerationEngine
from litgpt.generation.request import Output, Request

Deliver = Callable[[Output | Exception], None]


class Ticket:
    """A request that was handed in."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.number = -1  # until the engine's thread has taken it

    def cancel(self) -> None:
        """Ends it; its slot is free in the next step. Nothing more is delivered."""
        self.worker._commands.put(lambda: self.worker._cancel(self.number))


class Worker:
    """Runs the engine in a thread of its own as long as there is something to do. All methods are safe from any thread.

    Args:
        engine: From now on only this worker uses it.
    """

    def __init__(self, engine: GenerationEngine) -> None:
        self.engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._deliveries: dict[int, Deliver] = {}
        self._closed = False
        self._closing = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="litgpt-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, deliver: Deliver) -> Ticket:
        """Hands in a request, without waiting for the engine.

        Args:
            request: What to generate.
            deliver: Called in the engine's thread with every output, the last one having a finish_reason; or with an
                exception, as the last. It should be quick.

        Raises:
            ValueError: the request cannot be served.
            RuntimeError: the worker is closed.
        """
        self.engine.check(request)
        ticket = Ticket(self)

        def begin() -> None:
            try:
                ticket.number = self.engine.submit(request)
            except Exception as error:  # only this request fails: the thread has others to serve
                deliver(error)
            else:
                self._deliveries[ticket.number] = deliver

        with self._closing:  # what is put after the command to close would never be done
            if self._closed:
                raise RuntimeError("The engine has been shut down.")
            self._commands.put(begin)
        return ticket

    def generate(self, request: Request) -> Iterator[Output]:
        """The outputs of one request as they come. Closing the iterator ends it.

        Raises:
            ValueError: the request cannot be served.
        """
        outputs: queue.SimpleQueue[Output | Exception] = queue.SimpleQueue()
        ticket = self.submit(request, outputs.put)
        finished = False
        try:
            while not finished:
                output = outputs.get()
                if isinstance(output, Exception):
                    finished = True
                    raise output
                finished = output.finish_reason is not None
                yield output
        finally:
            if not finished:
                ticket.cancel()

    def stream(self, request: Request) -> Iterator[int]:
        """The token ids of one request as they come."""
        for output in self.generate(request):
            yield from output.token_ids

    def clear_prefix_cache(self) -> None:
        """As `Engine.clear_prefix_cache`."""
        self._commands.put(self.engine.clear_prefix_cache)

    def close(self, finish: bool = False, timeout: float | None = None) -> None:
        """Stops the thread: at once, or when all that was handed in is finished. The engine may be used again after.

        Args:
            finish: When all is finished.
            timeout: Seconds that it is waited for, at most; a step of a large model takes a while.
        """
        with self._closing:
            self._closed = True
            self._commands.put(None if not finish else self._close_when_idle)
        self._thread.join(timeout)

    # -- in the thread

    def _run(self) -> None:
        self._finishing = False
        stuck = False  # a step has failed though nobody waited for it: the next would, too, until something is asked
        while True:
            while not self._commands.empty() or stuck or not self.engine.busy:
                if self._finishing and (stuck or not self.engine.busy) and self._commands.empty():
                    return
                command, stuck = self._commands.get(), False
                if command is None:
                    self._fail(RuntimeError("The engine has been shut down."))
                    return
                command()
            try:
                outputs = self.engine.step()
            except Exception as error:  # too little memory, for example: these requests fail, others are served
                stuck = not self._deliveries
                self._fail(error)
                continue
            for output in outputs:
                deliver = self._deliveries[output.request]
                if output.finish_reason is not None:
                    del self._deliveries[output.request]
                deliver(output)

    def _close_when_idle(self) -> None:
        self._finishing = True

    def _cancel(self, number: int) -> None:
        self.engine.cancel(number)
        self._deliveries.pop(number, None)

    def _fail(self, error: Exception) -> None:
        """Ends all requests."""
        for number, deliver in list(self._deliveries.items()):
            self._cancel(number)
            deliver(error)
