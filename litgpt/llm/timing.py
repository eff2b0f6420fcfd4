"""When the tokens of answers come: the one clock of `LLM.benchmark` and `litgpt bench`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from litgpt.generation.live import LiveEngine
from litgpt.generation.request import Output, Request


@dataclass
class Timing:
    """When the tokens of some requests came, in seconds since all of them were handed in."""

    arrivals: list[list[float]] = field(default_factory=list)
    """For each request, one for each of its tokens."""
    seconds: float = 0.0
    """When the last request was finished."""

    @property
    def first_tokens(self) -> list[float]:
        """When each request got its first token."""
        return [times[0] for times in self.arrivals if times]

    @property
    def decode_rate(self) -> float:
        """Tokens per second of all requests together, while all of them are being decoded.

        That is from the first token of the last request that gets one to the last token of the first that is finished.
        Of each request the intervals between its tokens count, so that it makes no difference in which order the tokens
        of a step are handed over.
        """
        begin, end = max(self.first_tokens), min(times[-1] for times in self.arrivals)
        rate = 0.0
        for times in self.arrivals:
            inside = [moment for moment in times if begin <= moment <= end]
            if len(inside) > 1:
                rate += (len(inside) - 1) / (inside[-1] - inside[0])
        return rate


def timed(
    engine: LiveEngine,
    requests: Sequence[Request],
    take: Callable[[int, Output], tuple[Any, bool]] | None = None,
    *,
    before: Sequence[Request] = (),
) -> Timing:
    """Have an engine answer requests, which are handed in at once, to the end.

    Args:
        engine: The engine.
        requests: What to answer.
        take: As for `LiveEngine.run`; by default every answer goes on to its end.
        before: What it answers before the clock starts. Of these prompts beginnings are reused, of earlier ones none.

    Raises:
        ValueError: A request cannot be served.
    """
    timing = Timing([[] for _ in requests])

    def note(index: int, output: Output) -> tuple[Any, bool]:
        now = time.perf_counter() - started
        timing.arrivals[index] += [now] * len(output.token_ids)
        return (take or _nothing)(index, output)

    engine.worker.clear_prefix_cache()
    for _ in engine.run(before, _nothing):
        pass
    started = time.perf_counter()
    for _ in engine.run(requests, note):
        pass
    timing.seconds = time.perf_counter() - started
    return timing


def _nothing(index: int, output: Output) -> tuple[None, bool]:
    """Takes an output, and lets the answer go on."""
    return None, False
