"""The engine of a model that may be trained between two answers, for callers in many threads."""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from litgpt.generation.interface import EngineMaker, EngineOptions, GenerationEngine
from litgpt.generation.request import Output, Request
from litgpt.generation.worker import Worker
from litgpt.model import GPT

Taken = TypeVar("Taken")


class LiveEngine:
    """Answers with the weights as they are now, whichever thread asks; concurrent calls join one batch.

    What an engine keeps (keys and values of earlier prompts, compiled code) belongs to the weights that it was made
    with. So where these have changed since the last answer, have moved or got another type, a new engine takes its
    place. While answers are being given, the model is in evaluation mode.

    Args:
        model: The model.
        make: Makes the engine.
        options: How it is to run the model.
    """

    def __init__(self, model: GPT, make: EngineMaker, options: EngineOptions) -> None:
        self.model, self.make, self.options = model, make, options
        self._lock = threading.Lock()
        self._engine: GenerationEngine | None = None
        self._worker: Worker | None = None
        self._made_with: tuple[object, ...] = ()
        self._changes = 0
        self._callers = 0  # that wait for answers
        self._in_training: list[nn.Module] = []  # what is put back into training mode when they have theirs

    def __reduce__(self) -> tuple[Any, ...]:
        return LiveEngine, (self.model, self.make, self.options)  # a copy begins without engine and thread

    @property
    def engine(self) -> GenerationEngine:
        """The engine, for one caller at a time."""
        with self._lock:
            return self._current_engine()

    @property
    def worker(self) -> Worker:
        """The engine's thread."""
        with self._lock:
            return self._current_worker()

    def weights_changed(self) -> None:
        """Says so where `weights_version` might not show it."""
        self._changes += 1

    def run(
        self, requests: Sequence[Request], take: Callable[[int, Output], tuple[Taken, bool]]
    ) -> Generator[Taken, None, None]:
        """Answers some requests, and yields what becomes of their outputs as they come.

        Args:
            requests: What to answer.
            take: Called with the index of a request and each of its outputs; says also whether that is enough.

        Raises:
            ValueError: A request cannot be served.
        """
        outputs: queue.SimpleQueue[tuple[int, Output | Exception]] = queue.SimpleQueue()
        with self._evaluating():
            with self._lock:  # nobody may close this worker meanwhile
                worker = self._current_worker()
                for request in requests:
                    worker.engine.check(request)
                tickets = {
                    index: worker.submit(request, lambda output, index=index: outputs.put((index, output)))
                    for index, request in enumerate(requests)
                }
            try:
                while tickets:
                    index, output = outputs.get()
                    if isinstance(output, Exception):
                        raise output
                    if index not in tickets:
                        continue  # came before the engine knew that it had been enough
                    piece, is_enough = take(index, output)
                    if output.finish_reason is not None:
                        del tickets[index]
                    elif is_enough:
                        tickets.pop(index).cancel()
                    yield piece
            finally:
                for ticket in tickets.values():
                    ticket.cancel()

    def stream(self, request: Request) -> Generator[int, None, str]:
        """The token ids of an answer as they come; safe from any thread. Closing the iterator ends the answer.

        Returns:
            Why it ended: "stop" or "length", as in `Output.finish_reason`.
        """
        reason = "length"
        for output in self.run([request], lambda _, output: (output, False)):
            reason = output.finish_reason or reason
            yield from output.token_ids
        return reason

    @contextlib.contextmanager
    def _evaluating(self) -> Generator[None, None, None]:
        with self._lock:
            if not self._callers:
                self._in_training = [module for module in self.model.modules() if module.training]
            self._callers += 1
            self._set_training(False)
        try:
            yield
        finally:
            with self._lock:
                self._callers -= 1
                if not self._callers:
                    self._set_training(True)

    def _set_training(self, training: bool) -> None:  # no function of the module: at the interpreter's end it is gone
        for module in self._in_training:
            module.training = training

    def _current_worker(self) -> Worker:
        engine = self._current_engine()
        if self._worker is None:
            self._worker = Worker(engine)
            self._closing = weakref.finalize(self, _close, self._worker)
        return self._worker

    def _current_engine(self) -> GenerationEngine:
        version = (self._changes, *weights_version(self.model))
        if self._engine is None or version != self._made_with:
            if self._worker is not None:
                self._worker.close(finish=True)
                self._closing.detach()
            self._worker = self._engine = None
            self._engine, self._made_with = self.make(self.model, self.options), version
        return self._engine


def weights_version(model: nn.Module) -> tuple[object, ...]:
    """What differs whenever a weight has another value, place or type than before.

    Writing to a tensor in place counts up its version, as `load_state_dict` and most optimizers do; steps of optimizers
    are counted besides, since fused ones leave no trace there. Not seen is what else is written through `.data`.
    """
    versions: list[object] = []
    for tensor in (*model.parameters(), *model.buffers()):
        versions += tensor.data_ptr(), tensor.dtype, tensor.device, _optimizer_steps[id(tensor)]
        versions.append(0 if tensor.is_inference() else tensor._version)
    return tuple(versions)


def _close(worker: Worker) -> None:
    if threading.current_thread() is not worker._thread:  # the garbage collector runs wherever it likes
        worker.close()


_optimizer_steps: Counter[int] = Counter()  # by the identity of the parameter: one that follows another only adds


def _count_step(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        _optimizer_steps.update(map(id, group["params"]))


register_optimizer_step_post_hook(_count_step)
