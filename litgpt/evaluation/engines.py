"""Who answers requests: the engine of this process, or those of several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from litgpt.generation.request import Output, Request

Taken = TypeVar("Taken")


class RequestRunner(Protocol):
    """What runs requests, as `litgpt.generation.live.LiveEngine.run` does."""

    def __call__(
        self, requests: Sequence[Request], take: Callable[[int, Output], tuple[Taken, bool]]
    ) -> Iterator[Taken]:
        """Answers some requests, and yields what `take` makes of each output, in the order in which they come.

        Args:
            requests: What to answer.
            take: Called with the index of a request and each of its outputs; says also whether that is enough.
        """
