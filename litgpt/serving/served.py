"""The models of a server: an LLM each, the names that requests use for it, and what those get that leave a setting
out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from litgpt.adaptation.lora import adapted_copy
from litgpt.generation.request import Request
from litgpt.generation.sampling import Sampling
from litgpt.llm.llm import LLM
from litgpt.llm.loading import Parts
from litgpt.prompts import NamedTemplate, PromptStyle, choose_prompt_style
from litgpt.serving.constraint import Grammars
from litgpt.sources.adapted import LoRASource


@dataclass(frozen=True)
class Defaults:
    """What requests that leave it out get."""

    sampling: Sampling = field(default_factory=lambda: Sampling(0.8, 50))
    max_new_tokens: int = 50
    """Of /predict and /v1/completions."""
    max_reply_tokens: int = 1024
    """Of /v1/chat/completions."""


@dataclass
class ServedModel:
    """An LLM that is being served. Its weights and its prompt format stay as they are meanwhile."""

    llm: LLM
    defaults: Defaults = field(default_factory=Defaults)
    aliases: Sequence[str] = ()
    """Other names that requests may use."""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.name, self.codec, self.worker = self.llm.name, self.llm.codec, self.llm.worker
        self.stops = self.codec.stops
        self.vocab_size = self.llm.config.padded_vocab_size
        self.context = self.worker.engine.context

    @cached_property
    def grammars(self) -> Grammars:
        """Constraints for answers; made when the first is asked for (a second for 100,000 tokens)."""
        return Grammars(self.codec.tokenizer, self.stops)

    def encode_prompt(self, prompt: str | Sequence[int]) -> list[int]:
        """The token ids of a text completion's prompt, which may be such ids.

        Raises:
            ValueError: The model does not have one of them, or the text is far longer than the context.
        """
        if isinstance(prompt, str):
            return self.codec.encode_text(prompt, room=self.context)
        largest = max(prompt, default=0)
        if largest >= self.vocab_size:
            raise ValueError(
                f"Token id {largest} is not in the model's vocabulary, which ends at {self.vocab_size - 1}."
            )
        return list(prompt)

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
                f"{engine.cache_bytes / 1e6:,.1f} MB for them (`kv_cache_memory_bytes`). "
                "Shorten the prompt, or ask for fewer tokens (max_tokens)."
            )


def adapted_model(
    base: ServedModel, name: str, source: LoRASource, style: str | PromptStyle | NamedTemplate | None
) -> ServedModel:
    """A model of the same weights with LoRA, by a name of its own.

    Args:
        base: The model itself.
        name: What requests call the other.
        source: The LoRA weights, on the checkpoint of the model.
        style: A prompt format in place of the one recorded with them.

    Raises:
        ValueError: The adapter belongs to another model, or its name is taken.
    """
    given, llm = f"adapter={name}={source.directory}", base.llm
    if name == base.name:
        raise ValueError(f"{given}: that is the name of the model itself. Choose another.")
    try:
        model = adapted_copy(llm.model, source.update, source.settings)
    except ValueError as error:
        raise ValueError(f"{given}: {error}") from None
    options = llm.live.options
    if llm.device.type == "cpu":  # the code for CPUs knows no adapters
        options = replace(options, compile=False)
    tokenizer, files = llm.tokenizer, Path(llm.tokenizer.dir)
    own = choose_prompt_style(files, explicit=style, config=llm.config, tokenizer=tokenizer, finetuned=source.directory)
    parts = Parts(model, tokenizer, own, llm.placement, options, llm.placement.make_engine, name)
    return ServedModel(LLM(parts), base.defaults)
