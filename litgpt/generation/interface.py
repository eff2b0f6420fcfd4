"""What every engine offers: requests come in and outputs come out, step by step or all at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from litgpt.generation.request import Output, Request, check_request
from litgpt.model import GPT

MAX_SLOTS = 32  # sequences that run at a time


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is to run its model."""

    max_slots: int = MAX_SLOTS
    """How many requests run at a time; others wait."""
    compile: bool = False
    """Compile the decode step: on a CPU in the background, on a GPU the first tokens wait for it."""
    autocast: torch.dtype | None = None
    """A dtype to compute in where the weights are kept in another (mixed precision)."""
    fixed_length: int | None = None
    """How many tokens prompt and answer may have together; memory for them is reserved at once."""


class GenerationEngine(ABC):
    """Generates with one model. Not for several threads at a time: these share one through a `Worker`.

    Args:
        model: In eval mode, on its device, in its dtype.
        context: The most tokens that prompt and answer may have together.
        autocast: A dtype to compute in where the weights are kept in another (mixed precision).
        compiles: Whether it decodes with compiled code.

    Attributes:
        max_slots: How many requests run at a time.
        cache_bytes: The most memory for keys and values.
    """

    max_slots: int
    cache_bytes: float

    def __init__(self, model: GPT, *, context: int, autocast: torch.dtype | None, compiles: bool) -> None:
        self.model = model
        self.device = model.transformer.wte.weight.device  # the head may have been replaced
        self.context = context
        self.autocast = autocast
        self.compiles = compiles

    # -- one by one

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether a step has anything to do."""

    @property
    @abstractmethod
    def running(self) -> int:
        """How many requests are being answered."""

    @property
    @abstractmethod
    def waiting(self) -> int:
        """How many requests wait for their turn."""

    def check(self, request: Request) -> int:
        """How many tokens the context leaves for the answer, at most max_new_tokens. Safe from any thread.

        Raises:
            ValueError: The prompt is empty or leaves no room, or there is nothing to do.
        """
        return check_request(request, self.context)

    @abstractmethod
    def submit(self, request: Request) -> int:
        """Queue a request, and return the number that its outputs bear.

        Raises:
            ValueError: As for `check`.
        """

    @abstractmethod
    def cancel(self, number: int) -> None:
        """Drop a request, wherever it is; what it has of the engine is free at once."""

    @abstractmethod
    def step(self) -> list[Output]:
        """Do the least that makes progress, usually one call of the model, and return what it gave."""

    @abstractmethod
    def clear_prefix_cache(self) -> None:
        """Have new requests prefill all of their prompts, whatever is known of earlier ones."""

    def prepare(self) -> None:
        """Wait for what is built in the background, as a benchmark does."""
        return

    @property
    @abstractmethod
    def cache_size(self) -> int:
        """Bytes of memory that keys and values take now."""

    @abstractmethod
    def bytes_needed(self, length: int) -> int:
        """Memory for the keys and values of one request of `length` tokens, answer included. Safe from any thread."""

    # -- all at once

    def generate(self, requests: Sequence[Request]) -> Iterator[Output]:
        """Run the requests and yield what comes, step by step, until all are finished.

        Closing the iterator ends the generation. Meanwhile nobody else may call `step`.

        Raises:
            ValueError: A prompt is empty or leaves no room in the context.
        """
        for request in requests:
            self.check(request)
        index_of = {self.submit(request): index for index, request in enumerate(requests)}
        try:
            while index_of:
                for output in self.step():
                    if output.request in index_of:
                        index = index_of[output.request]
                        if output.finish_reason is not None:
                            del index_of[output.request]
                        yield replace(output, request=index)
        finally:
            for number in index_of:
                self.cancel(number)

    def stream(self, request: Request) -> Iterator[int]:
        """The token ids of one request as they come."""
        for output in self.generate([request]):
            yield from output.token_ids

    def complete(self, requests: Sequence[Request]) -> list[list[int]]:
        """The token ids of each request, when all are finished."""
        results: list[list[int]] = [[] for _ in requests]
        for output in self.generate(requests):
            results[output.request] += output.token_ids
        return results


EngineMaker: TypeAlias = Callable[[GPT, EngineOptions], GenerationEngine]
