"""What all endpoints share: the models once they are loaded, the queue and its limit, the metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from litgpt.cli.suggest import did_you_mean
from litgpt.serving.errors import ApiError
from litgpt.serving.prometheus import Metrics
from litgpt.serving.request_log import RequestLog
from litgpt.serving.served import ServedModel

T = TypeVar("T")
LARGE = 2**16  # bytes of a request that takes a while before it gets to the engine


class Service:
    """The state of a server.

    Args:
        max_running: How many answers are generated at a time.
        max_queue: How many more may wait; beyond that requests are refused.
        timeout: Seconds after which a request that is not answered to its end is ended with an error; 0 for no limit.
    """

    def __init__(self, max_running: int, max_queue: int, timeout: float = 0) -> None:
        self.capacity = max_running + max_queue
        self.timeout = timeout
        self.taken = 0  # answers that run or wait; only the event loop's thread changes it
        self.models: list[ServedModel] = []
        self.progress = "starting"
        self.closing = False
        self.started = time.time()
        self._small_requests = ThreadPoolExecutor(4, "litgpt-request")
        self._large_requests = ThreadPoolExecutor(1, "litgpt-large-request")
        self.stops: set[Callable[[ApiError], None]] = set()  # each ends the answers of a request with that error
        self.metrics = Metrics()
        self.requests = RequestLog(self.metrics)
        self.metrics.gauge("running", "Answers being generated", lambda: self._sum("running"))
        self.metrics.gauge("waiting", "Answers that wait for a slot", lambda: max(0, self.taken - self._sum("running")))
        self.metrics.gauge("kv_cache_bytes", "Memory that keys and values take now", lambda: self._sum("cache_size"))
        self.metrics.gauge("ready", "1 once the model is loaded", lambda: float(bool(self.models)))

    # -- the models

    def ready(self, models: list[ServedModel]) -> None:
        """From now on requests are answered. Safe from any thread."""
        self.models = models

    def say(self, progress: str) -> None:
        """What the server is doing before it is ready."""
        self.progress = progress

    @property
    def state(self) -> dict[str, Any]:
        """The answer of /health."""
        status = "stopping" if self.closing else "ok" if self.models else "loading"
        state: dict[str, Any] = {"status": status, "seconds": round(time.time() - self.started, 1)}
        if not self.models:
            return {**state, "progress": self.progress}
        running = int(self._sum("running"))
        return {
            **state,
            "models": [model.name for model in self.models],
            "running": running,
            "waiting": max(0, self.taken - running),
        }

    def model(self, name: str | None = None) -> ServedModel:
        """The model that a request names, by default the first.

        Raises:
            ApiError: 503 as long as none is loaded, 404 where there is none of that name.
        """
        if not self.models:
            seconds = time.time() - self.started
            raise ApiError(
                503,
                f"The model is not ready yet: {self.progress}, for {seconds:.0f} seconds.",
                code="loading",
                headers={"Retry-After": "2"},
            )
        if name is None:
            return self.models[0]
        for model in self.models:
            if name == model.name or name in model.aliases:
                return model
        names = [model.name for model in self.models]
        message = f"There is no model {name[:200]!r}.{did_you_mean(name[:200], names)} /v1/models lists what there is."
        raise ApiError(404, message, param="model", code="model_not_found")

    # -- the queue

    def check_size(self, count: int) -> None:
        """Raises ApiError (400) where this many answers would never find room."""
        if count > self.capacity:
            message = f"{count} answers in one request: this server takes at most {self.capacity} at a time."
            raise ApiError(400, message, param="n", code="invalid_value")

    def enter(self, count: int) -> None:
        """Takes places for this many answers.

        Raises:
            ApiError: 429, as many run and wait as may.
        """
        if self.taken + count > self.capacity:
            raise ApiError(
                429,
                f"The queue is full: {self.taken} answers are running or waiting. Try again later.",
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        self.taken += count

    def leave(self, count: int = 1) -> None:
        """Gives places back."""
        self.taken -= count

    def stop(self) -> None:
        """Ends all answers that are not complete, and says so in them."""
        for stop in list(self.stops):
            stop(ApiError(503, "The server is shutting down.", code="shutting_down", headers={"Retry-After": "5"}))

    async def aside(self, function: Callable[[], T], size: int) -> T:
        """Runs what takes a while, such as encoding a long prompt, off the event loop: of large requests one at a
        time, so that small ones do not wait for them, and their memory is not needed many times over.

        Args:
            function: What it is.
            size: Bytes of the request that it is done for.
        """
        threads = self._large_requests if size > LARGE else self._small_requests
        return await asyncio.get_running_loop().run_in_executor(threads, function)

    def close(self) -> None:
        """Lets go of what has not begun."""
        for threads in (self._small_requests, self._large_requests):
            threads.shutdown(wait=False, cancel_futures=True)

    def _sum(self, name: str) -> float:
        engines = {id(model.worker.engine): model.worker.engine for model in self.models}
        return float(sum(getattr(engine, name) for engine in engines.values()))
