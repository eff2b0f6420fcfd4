"""What `generate`, `chat` and their like print about their work, and how they read."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator

from litgpt.distributed import memory_used
from litgpt.llm import LLM


def clean(text: str) -> str:
    """What was read from outside, without the lone surrogates that stand for undecodable bytes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def say(text: str = "") -> None:
    """A line about the work, on stderr: stdout is for what the model says."""
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)


class Stopwatch:
    """Counts the tokens that pass through and the time they take."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.tokens = 0

    def count(self, ids: Iterable[int]) -> Iterator[int]:
        for token_id in ids:
            self.tokens += 1
            yield token_id

    def report(self) -> str:
        seconds = time.perf_counter() - self.started
        return f"{seconds:.02f} sec total, {self.tokens / seconds:.02f} tokens/sec, {self.tokens} tokens"


def memory_line(llm: LLM) -> str:
    return f"Memory used: {memory_used(llm.device) / 1e9:.02f} GB"
