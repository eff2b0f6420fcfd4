"""Answers of an LLM: to prompts, in a conversation, as they come, and measured."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from litgpt.devices.memory import memory_used
from litgpt.generation.request import Output, Request
from litgpt.generation.sampling import Sampling
from litgpt.generation.text import TextStream
from litgpt.llm.assistant import Assistant
from litgpt.prompts.styles import Message

Answer: TypeAlias = str | Tensor


class Answering(Assistant):
    """A model that is asked in plain text."""

    def generate(
        self,
        prompt: str | Sequence[str],
        sys_prompt: str | None = None,
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        return_as_token_ids: bool = False,
        stream: bool = False,
        *,
        min_p: float = 0.0,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
    ) -> Answer | list[Answer] | Iterator[str] | Iterator[int]:
        """Answers a prompt, or several at a time. May be called from many threads: the calls share one batch.

        Args:
            prompt: What to answer, without the model's prompt format: that is put around it. A list of prompts gives a
                list of answers.
            sys_prompt: Replaces the system message of the prompt format.
            max_new_tokens: An answer ends after so many tokens, if the model does not end it before.
            temperature: Below 1 the answer gets more certain, above 1 more varied; 0 always takes the likeliest token.
            top_k: Draw from the so many most likely tokens only; 1 always takes the most likely one.
            top_p: Draw from the most likely tokens that together reach this probability.
            return_as_token_ids: Give the answer's token ids, (T,) int64, and not its text.
            stream: Give an iterator over the pieces of the text (or the token ids) as they come. Closing it, or
                dropping it, ends the answer. Not for a list of prompts.
            min_p: Draw from tokens at least this fraction as likely as the most likely one.
            stop: A text, or several, that end the answer and are not part of it. Of token ids, the last are those that
                complete it.
            seed: Decides what is drawn; of a list of prompts, for the first, and the others count on from it. By
                default torch's global generator does (`torch.manual_seed`).

        Raises:
            ValueError: A setting is not possible, or a prompt is longer than the model's context; from an iterator,
                that comes with its first piece.
        """
        if stream and not isinstance(prompt, str):
            raise ValueError("stream=True takes one prompt, not a list. Stream them one by one, or leave it out.")
        replies = self._asked(prompt, sys_prompt, max_new_tokens, temperature, top_k, top_p, min_p, stop, seed)
        if stream:
            return self._stream(replies[0], return_as_token_ids)
        self._complete(replies)
        answers = [reply.answer(return_as_token_ids) for reply in replies]
        return answers[0] if isinstance(prompt, str) else answers

    def chat(
        self,
        messages: Sequence[Message],
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        return_as_token_ids: bool = False,
        stream: bool = False,
        *,
        min_p: float = 0.0,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
    ) -> Answer | Iterator[str] | Iterator[int]:
        """The next reply of a conversation. What earlier calls have read of it is not read again.

        Args:
            messages: The conversation, as [{"role": "user", "content": "..."}, ...]: an optional "system" message, then
                "user" and "assistant" in turn.
            max_new_tokens, temperature, top_k, top_p, min_p, stop, seed: As for `generate`.
            return_as_token_ids, stream: As for `generate`.

        Raises:
            ValueError: The prompt format refuses the conversation; and as for `generate`.
        """
        if isinstance(messages, str) or not all(isinstance(message, Mapping) for message in messages):
            raise ValueError(
                f"messages is {_short(messages)}: "
                "give a list of messages, as [{'role': 'user', 'content': 'Hello'}]; a prompt alone is for generate."
            )
        sampling = Sampling(temperature, top_k, top_p, min_p)
        reply = self._reply(messages, max_new_tokens, sampling, stop, seed)
        if stream:
            return self._stream(reply, return_as_token_ids)
        self._complete([reply])
        return reply.answer(return_as_token_ids)

    def benchmark(
        self,
        num_iterations: int = 1,
        prompt: str | Sequence[str] = "What do llamas eat?",
        *,
        stream: bool = False,
        return_as_token_ids: bool = False,
        **kwargs: Any,
    ) -> tuple[Answer | list[Answer], dict[str, list[float]]]:
        """Answers several times, and measures it.

        Args:
            num_iterations: How many times. Each reads the whole prompt.
            prompt: What to answer.
            stream: Makes no difference: an answer is always measured as it comes.
            return_as_token_ids: As for `generate`.
            kwargs: Other arguments of `generate`.

        Returns:
            The last answer, and for each time: "Seconds total", "Seconds to first token", "Tokens generated",
            "Inference speed in tokens/sec" (all tokens over all seconds), and the most memory used so far, of the GPU
            ("Total GPU memory allocated in GB") or of the process ("Peak memory in GB").

        Raises:
            ValueError: num_iterations is not possible; and as for `generate`.
        """
        if num_iterations < 1:
            raise ValueError(f"num_iterations={num_iterations} is not possible: give 1 or more.")
        memory = "Total GPU memory allocated in GB" if self.device.type == "cuda" else "Peak memory in GB"
        figures: dict[str, list[float]] = {}
        for _ in range(num_iterations):
            self.worker.clear_prefix_cache()
            started = time.perf_counter()
            replies = self._asked(prompt, **kwargs)
            self._complete(replies)
            seconds, tokens = time.perf_counter() - started, sum(len(reply.ids) for reply in replies)
            measured = {
                "Seconds total": seconds,
                "Seconds to first token": min(reply.began for reply in replies) - started,
                "Tokens generated": tokens,
                "Inference speed in tokens/sec": tokens / seconds,
                memory: memory_used(self.device) / 1e9,
            }
            for name, value in measured.items():
                figures.setdefault(name, []).append(value)
        answers = [reply.answer(return_as_token_ids) for reply in replies]
        return answers[0] if isinstance(prompt, str) else answers, figures

    def _asked(
        self,
        prompt: str | Sequence[str],
        sys_prompt: str | None = None,
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
    ) -> list[Reply]:
        """The replies to one prompt or to several, to be completed; arguments as for `generate`."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, Sequence) or not all(isinstance(text, str) for text in prompts):
            raise ValueError(f"prompt is {_short(prompt)}: give a text, or a list of texts; chat takes messages.")
        sampling = Sampling(temperature, top_k, top_p, min_p)
        system: list[Message] = [] if sys_prompt is None else [{"role": "system", "content": sys_prompt}]
        return [
            self._reply(
                [*system, {"role": "user", "content": text}],
                max_new_tokens,
                sampling,
                stop,
                None if seed is None else seed + index,
            )
            for index, text in enumerate(prompts)
        ]

    def _reply(
        self,
        messages: Sequence[Message],
        max_new_tokens: int,
        sampling: Sampling,
        stop: str | Sequence[str],
        seed: int | None,
    ) -> Reply:
        ids = self.encode(messages)
        stops = [stop] if isinstance(stop, str) else list(stop)
        after = ids if self.prompt_style.continues_text else ()
        return Reply(self.request(ids, max_new_tokens, sampling, seed), TextStream(self.tokenizer, stops, after))

    def _run(self, replies: Sequence[Reply]) -> Iterator[tuple[list[int], str]]:
        def take(index: int, output: Output) -> tuple[tuple[list[int], str], bool]:
            return replies[index].take(output), replies[index].written.stopped

        return self._live.run([reply.request for reply in replies], take)

    def _complete(self, replies: Sequence[Reply]) -> None:
        for _ in self._run(replies):
            pass

    def _stream(self, reply: Reply, as_token_ids: bool) -> Iterator[str] | Iterator[int]:
        with contextlib.closing(self._run([reply])) as pieces:
            for ids, text in pieces:
                if as_token_ids:
                    yield from ids
                elif text:
                    yield text


def _short(value: Any) -> str:
    """A value as it was given, as far as a line has room."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


class Reply:
    """What has come of an answer.

    Attributes:
        request: What the engine was asked.
        ids: The tokens so far.
        text: Their text so far.
        began: When the first token came, in seconds of `time.perf_counter`; infinity before.
        written: Makes the text.
    """

    def __init__(self, request: Request, written: TextStream) -> None:
        self.request, self.written = request, written
        self.ids: list[int] = []
        self.text = ""
        self.began = float("inf")

    def take(self, output: Output) -> tuple[list[int], str]:
        """Adds what one step gave, and returns the new tokens and text."""
        if output.token_ids and not self.ids:
            self.began = time.perf_counter()
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

    def answer(self, as_token_ids: bool) -> Answer:
        """The tokens, (T,) int64, or their text."""
        return torch.tensor(self.ids, dtype=torch.int64) if as_token_ids else self.text
