"""What `generate`, `chat` and their like print about their work, and how they read."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterator

from litgpt.cli.plural import counted
from litgpt.devices.memory import memory_used
from litgpt.llm.llm import LLM


def clean(text: str) -> str:
    """What was read from outside, without the lone surrogates that stand for undecodable bytes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def say(text: str = "") -> None:
    """A line about the work, on stderr: stdout is for what the model says."""
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)


def announce_compilation(llm: LLM) -> None:
    """What is compiled before the first answer goes on is said before it: `notes_wait` keeps it from within."""
    if llm.device.type != "cpu":
        say("Compiling the decoding with torch.compile: the first answer waits for that after its first token.")


class Stopwatch:
    """Counts the tokens that pass through and the time they take."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.tokens = 0
        self.finish_reason: str | None = None

    def count(self, ids: Generator[int, None, str]) -> Iterator[int]:
        """Passes an answer's tokens on, and notes why it ended."""
        while True:
            try:
                token_id = next(ids)
            except StopIteration as end:
                self.finish_reason = end.value
                return
            self.tokens += 1
            yield token_id

    def report(self) -> str:
        seconds = time.perf_counter() - self.started
        return f"{seconds:.02f} sec total, {self.tokens / seconds:.02f} tokens/sec, {counted(self.tokens, 'token')}"


def cut_line(llm: LLM, stopwatch: Stopwatch, prompt_tokens: int, max_new_tokens: int | None) -> str | None:
    """What to say about an answer that the model did not end itself; None where it did."""
    if stopwatch.finish_reason != "length":
        return None
    if prompt_tokens + stopwatch.tokens >= llm.engine.context:
        return f"The answer was cut: the model's context of {llm.engine.context} tokens is full."
    if max_new_tokens is None:
        made = counted(stopwatch.tokens, "token")
        return f"Stopped after {made}: a text has no end of its own. --max_new_tokens N asks for more."
    return f"The answer was cut after --max_new_tokens {max_new_tokens}; without this option it goes on to its end."


def memory_used_line(llm: LLM) -> str:
    return f"Memory used: {memory_used(llm.device) / 1e9:.02f} GB"
