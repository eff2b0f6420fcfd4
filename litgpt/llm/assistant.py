"""A model with its tokenizer, its prompt format and the engine that answers: what commands and the server build on."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from litgpt.config import Config
from litgpt.generation.interface import GenerationEngine
from litgpt.generation.live import LiveEngine, Piece, weights_version
from litgpt.generation.request import Output, Request
from litgpt.generation.sampling import Sampling
from litgpt.generation.worker import Worker
from litgpt.llm.placement import Placement
from litgpt.model import GPT
from litgpt.prompts import PromptStyle
from litgpt.prompts.styles import Message, with_input
from litgpt.tokenizer.tokenizer import Tokenizer

CONTINUATION = 256  # new tokens where a model has no format in which its answer ends


class Assistant(nn.Module):
    """A model that is ready to answer, from messages to token ids and from these to text.

    Args:
        model: The model, on its device.
        tokenizer: The model's.
        prompt_style: The format of its prompts; may be replaced.
        name: What the model is called; by default as its configuration says.
        checkpoint: Where its weights are from, if they may be read again.
        placement: Where it is, if it is on several devices.
        engine: Options of the engine that answers (`litgpt.generation.engine.Engine`).
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        prompt_style: PromptStyle,
        *,
        name: str | None = None,
        checkpoint: Path | str | None = None,
        placement: Placement | None = None,
        **engine: Any,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.prompt_style = model, tokenizer, prompt_style
        self.training = model.training
        self.name = name or model.config.name or Path(tokenizer.dir).name
        self._checkpoint = checkpoint
        self.placement = placement or Placement([self.device])
        self._use(model, **engine)
        self._loaded: tuple[Any, ...] | None = weights_version(model)  # until something else is done to the weights

    @property
    def config(self) -> Config:
        """The model's shape."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.transformer.wte.weight.device

    @property
    def engine(self) -> GenerationEngine:
        """The engine, made for the weights as they are now. Not for several threads at a time: see `worker`."""
        return self._live.engine

    @property
    def worker(self) -> Worker:
        """The thread that runs the engine for all callers."""
        return self._live.worker

    @property
    def stops(self) -> list[list[int]]:
        """Token sequences that end an answer."""
        return self.prompt_style.stop_sequences(self.tokenizer)

    def encode(self, messages: Sequence[Message], input: str = "") -> list[int]:
        """The token ids of a conversation, ready for the reply; `input` is what the last question is about.

        Raises:
            ValueError: The prompt format refuses the conversation, it is far longer than the model's context, or the
                tokenizer is not this model's.
        """
        messages, fields = with_input(self.prompt_style, messages, input)
        room = 2 * self.config.block_size  # `chat` leaves the oldest turns out of what is a little too long
        ids = self.prompt_style.encode(self.tokenizer, messages, room=room, **fields)
        self.tokenizer.check_rows(max(ids, default=0), self.config.padded_vocab_size)
        return ids

    def request(
        self, prompt: Sequence[int], max_new_tokens: int | None, sampling: Sampling, seed: int | None
    ) -> Request:
        """What to ask the engine for the answer to a prompt.

        Args:
            prompt: Token ids.
            max_new_tokens: An answer ends after that many, if the model does not end it before. None lets it go on to
                the end of the turn or of the context; where there are no turns, as in a model that was only
                pretrained, for 256 tokens.
            sampling: How tokens are drawn.
            seed: Of the draws.
        """
        if max_new_tokens is None:
            room = max(1, self.config.block_size - len(prompt))
            max_new_tokens = min(room, CONTINUATION) if self.prompt_style.continues_text else room
        return Request(prompt, max_new_tokens, sampling, self.stops, seed)

    def run(self, requests: Sequence[Request], take: Callable[[int, Output], tuple[Piece, bool]]) -> Iterator[Piece]:
        """Answers some requests together; as `LiveEngine.run`."""
        return self._live.run(requests, take)

    def stream(self, request: Request) -> Generator[int, None, str]:
        """The token ids of an answer as they come; safe from any thread. Closing the iterator ends the answer.

        Returns:
            Why it ended: "stop" or "length", as in `Output.finish_reason`.
        """
        reason = "length"
        for output in self._live.run([request], lambda _, output: (output, False)):
            reason = output.finish_reason or reason
            yield from output.token_ids
        return reason

    def text(self, ids: Iterable[int], prompt: Sequence[int], joins: bool = False) -> Iterator[str]:
        """The answer's text as it comes. Where it `joins` the prompt's text, as after a bare prompt, it keeps the space
        between the two."""
        return self.tokenizer.decode_stream(ids, after=prompt if joins or self.prompt_style.continues_text else ())

    def _use(self, model: GPT, **engine: Any) -> None:
        self._engine_options = engine
        self._live = LiveEngine(model, **engine)
