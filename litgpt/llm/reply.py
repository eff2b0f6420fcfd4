"""The answers of an LLM while they come, and the settings that its callers give by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from typing_extensions import TypedDict

from litgpt.devices.memory import memory_used
from litgpt.generation.live import LiveEngine
from litgpt.generation.request import Output, Request
from litgpt.generation.text import TextStream
from litgpt.llm.timing import Timing
from litgpt.prompts.styles import Message

Messages: TypeAlias = Sequence[Message]
Yes: TypeAlias = Literal[True]
No: TypeAlias = Literal[False]


class SamplingSettings(TypedDict, total=False):
    """The fields of `Sampling` that `LLM.generate` and `LLM.chat` take, with the same defaults."""

    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    seed: int | None


class AnswerSettings(SamplingSettings, total=False):
    """The same, and where the answer ends."""

    max_new_tokens: int
    stop: str | Sequence[str]


class ChatSettings(AnswerSettings, total=False, closed=True):
    """What `LLM.chat` takes besides the messages and the form of the answer."""


class GenerateSettings(AnswerSettings, total=False, closed=True):
    """What `LLM.generate` takes besides the prompt and the form of the answer."""

    sys_prompt: str | None


class Reply:
    """What has come of an answer.

    Attributes:
        request: What the engine was asked.
        ids: The tokens so far.
        text: Their text so far.
        written: Makes the text.
    """

    def __init__(self, request: Request, written: TextStream) -> None:
        self.request, self.written = request, written
        self.ids: list[int] = []
        self.text = ""

    def take(self, output: Output) -> tuple[list[int], str]:
        """Add what one step gave, and return the new tokens and text."""
        ids, text = [], ""
        for token_id in output.token_ids:
            ids.append(token_id)
            text += self.written.push([token_id])
            if self.written.stopped:
                break
        if output.finish_reason is not None:
            text += self.written.finish()
        self.ids += ids
        self.text += text
        return ids, text

    @property
    def token_ids(self) -> Tensor:
        """The tokens, (T,) int64."""
        return torch.tensor(self.ids, dtype=torch.int64)


def answers(replies: Sequence[Reply], as_token_ids: bool) -> list[str] | list[Tensor]:
    """What has come of some answers: their texts, or their tokens."""
    return [reply.token_ids for reply in replies] if as_token_ids else [reply.text for reply in replies]


def figures_of(replies: Sequence[Reply], timing: Timing, device: torch.device) -> dict[str, float]:
    """What `LLM.benchmark` says of answers that have just ended."""
    seconds, tokens = timing.seconds, sum(len(reply.ids) for reply in replies)
    memory = "Total GPU memory allocated in GB" if device.type == "cuda" else "Peak memory in GB"
    return {
        "Seconds total": seconds,
        "Seconds to first token": min(timing.first_tokens),
        "Tokens generated": tokens,
        "Inference speed in tokens/sec": tokens / seconds,
        memory: memory_used(device) / 1e9,
    }


def taking(replies: Sequence[Reply]) -> Callable[[int, Output], tuple[tuple[list[int], str], bool]]:
    """What gives outputs to the replies that they belong to, for `LiveEngine.run`."""

    def take(index: int, output: Output) -> tuple[tuple[list[int], str], bool]:
        return replies[index].take(output), replies[index].written.stopped

    return take


def run_replies(engine: LiveEngine, replies: Sequence[Reply]) -> Generator[tuple[list[int], str], None, None]:
    """Have an engine answer, and yield the new tokens and text of one reply after the other, as they come."""
    return engine.run([reply.request for reply in replies], taking(replies))


def complete(engine: LiveEngine, replies: Sequence[Reply]) -> None:
    """Have an engine answer to the end."""
    for _ in run_replies(engine, replies):
        pass


def stream_ids(engine: LiveEngine, reply: Reply) -> Iterator[int]:
    """The token ids of an answer as they come. Closing the iterator ends the answer."""
    with contextlib.closing(run_replies(engine, [reply])) as pieces:
        for ids, _ in pieces:
            yield from ids


def stream_text(engine: LiveEngine, reply: Reply) -> Iterator[str]:
    """The text of an answer as it comes. Closing the iterator ends the answer."""
    with contextlib.closing(run_replies(engine, [reply])) as pieces:
        for _, text in pieces:
            if text:
                yield text
