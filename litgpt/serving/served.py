"""The models of a server: what each is, and how a request for one is chosen and encoded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from litgpt.generation.request import Request
from litgpt.generation.worker import Worker
from litgpt.prompts import PromptStyle
from litgpt.prompts.styles import Message
from litgpt.serving.constraint import Grammars
from litgpt.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Defaults:
    """What requests that leave it out get."""

    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float = 1.0
    max_new_tokens: int = 50
    """Of /predict and /v1/completions."""
    max_reply_tokens: int = 1024
    """Of /v1/chat/completions."""


@dataclass
class ServedModel:
    """A model that is ready to answer."""

    name: str
    tokenizer: Tokenizer
    style: PromptStyle
    worker: Worker
    defaults: Defaults = field(default_factory=Defaults)
    aliases: Sequence[str] = ()
    """Other names that requests may use."""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.stops = self.style.stop_sequences(self.tokenizer)
        self.config = self.worker.engine.model.config
        self.context = self.worker.engine.context

    @cached_property
    def grammars(self) -> Grammars:
        """Constraints for answers; made when the first is asked for (a second for 100,000 tokens)."""
        return Grammars(self.tokenizer, self.stops)

    def encode(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """The token ids of a conversation, ready for the reply.

        Raises:
            ValueError: the prompt format refuses the conversation, or it is far longer than the context.
        """
        return self.checked(self.style.encode(self.tokenizer, messages, room=self.context, **variables))

    def encode_text(self, text: str) -> list[int]:
        """The token ids of a text as it is. What stands for control tokens becomes them: a prompt that the client has
        rendered itself is taken as such.

        Raises:
            ValueError: the text is far longer than the context.
        """
        return self.checked(self.tokenizer.encode_ids(text, allow_special=True, room=self.context))

    def checked(self, ids: list[int]) -> list[int]:
        """Token ids that the model has.

        Raises:
            ValueError: there is one that it has not.
        """
        largest = max(ids, default=0)
        if largest >= self.config.padded_vocab_size:
            last = self.config.padded_vocab_size - 1
            raise ValueError(f"Token id {largest} is not in the model's vocabulary, which ends at {last}.")
        return ids

    def check(self, request: Request) -> None:
        """Raises ValueError where the engine cannot serve the request, or it needs more memory than there ever is."""
        engine = self.worker.engine
        if request.does_nothing:  # but its prompt must be one all the same
            request = replace(request, max_new_tokens=1) if len(request.prompt) < 2 else replace(request, score_from=1)
        new = engine.check(request)
        needed = engine.bytes_needed(request.num_to_prefill + new)
        if needed > engine.cache_bytes:
            raise ValueError(
                f"A prompt of {len(request.prompt):,} tokens with an answer of up to {new:,} needs "
                f"{needed / 1e6:,.1f} MB for keys and values, and this server has "
                f"{engine.cache_bytes / 1e6:,.1f} MB for them (--kv_cache_memory_bytes). "
                "Shorten the prompt, or ask for fewer tokens (max_tokens)."
            )
