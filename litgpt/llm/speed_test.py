"""Measuring how quickly an engine reads prompts and writes answers, for one request and for many at a time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from litgpt.devices.memory import forget_peak, memory_used
from litgpt.generation.live import LiveEngine
from litgpt.generation.request import Request
from litgpt.generation.sampling import Sampling
from litgpt.llm.timing import timed
from litgpt.model import GPT, LLaMAMoE


@dataclass(frozen=True)
class SpeedTest:
    """One test: reading prompts, or writing answers."""

    prompt_tokens: int = 0
    """Of each prompt; 0 where answers are measured."""
    new_tokens: int = 0
    """Of each answer; 0 where prompts are measured."""
    batch_size: int = 1
    """Requests at a time."""
    depth: int = 0
    """Tokens that each request holds before the test begins."""

    @property
    def name(self) -> str:
        """As llama-bench has it: pp512, tg128, tg128 @ d1024; for several requests pp512 x8."""
        name = f"pp{self.prompt_tokens}" if self.prompt_tokens else f"tg{self.new_tokens}"
        name += f" @ d{self.depth}" if self.depth else ""
        return name + (f" x{self.batch_size}" if self.batch_size > 1 else "")

    @property
    def longest(self) -> int:
        """Tokens of a request, answer included."""
        return self.depth + (self.prompt_tokens + 1 if self.prompt_tokens else 1 + self.new_tokens + 1)

    def requests(self, vocab_size: int, seed: int) -> list[Request]:
        """Prompts of random tokens, and greedy answers of a given length."""
        length = self.depth + (self.prompt_tokens or 1)
        generator = torch.Generator().manual_seed(seed)
        prompts = torch.randint(vocab_size, (self.batch_size, length), generator=generator).tolist()
        return [Request(prompt, self.longest - length, Sampling(0)) for prompt in prompts]

    def held(self, requests: Sequence[Request]) -> list[Request]:
        """What leaves an engine with the tokens that each request holds before the test begins."""
        return [Request(request.prompt[: self.depth], 1, Sampling(0)) for request in requests if self.depth]


@dataclass
class SpeedResult:
    """What came of a test."""

    test: SpeedTest
    rates: list[float] = field(default_factory=list)
    """Tokens per second, all requests together, one for each repetition."""
    first_tokens: list[float] = field(default_factory=list)
    """Seconds until each request of each repetition had its first token."""
    peak_bytes: float = 0.0
    """The most memory used."""
    step_bytes: int = 0
    """Weights, keys and values that a decode step reads; 0 where prompts are measured, or a process has a part only."""

    @property
    def rate(self) -> float:
        return statistics.mean(self.rates)

    @property
    def deviation(self) -> float:
        """The standard deviation of a sample, as llama-bench has it."""
        return statistics.stdev(self.rates) if len(self.rates) > 1 else 0.0

    @property
    def bandwidth(self) -> float:
        """Bytes that are read of the memory, per second."""
        return self.step_bytes * self.rate / self.test.batch_size


def run_test(engine: LiveEngine, test: SpeedTest, repetitions: int, *, is_whole: bool = True) -> SpeedResult:
    """Run a test once to warm up, and then as often as it is to be measured.

    Args:
        engine: The engine. What it compiles in the background is waited for.
        test: The test.
        repetitions: How often it is measured.
        is_whole: Whether this process has all of the model.

    Raises:
        ValueError: The context does not suffice.
    """
    vocab_size = engine.model.config.vocab_size or engine.model.config.padded_vocab_size
    forget_peak(engine.engine.device)
    result = SpeedResult(test)
    for number in range(repetitions + 1):
        requests = test.requests(vocab_size, seed=number)
        timing = timed(engine, requests, before=test.held(requests))
        if number == 0:  # to warm up
            engine.engine.prepare()
            continue
        result.first_tokens += timing.first_tokens
        if test.prompt_tokens:
            result.rates.append(test.batch_size * test.prompt_tokens / max(timing.first_tokens))
        else:
            result.rates.append(timing.decode_rate)
    result.peak_bytes = memory_used(engine.engine.device)
    if test.new_tokens and is_whole:
        held = engine.engine.bytes_needed(1 + test.depth + test.new_tokens // 2)
        result.step_bytes = weight_bytes_read(engine.model, test.batch_size) + test.batch_size * held
    return result


def check_room(engine: LiveEngine, test: SpeedTest) -> None:
    """Refuse a test for which the model's context or the memory does not suffice.

    Raises:
        ValueError: Says which.
    """
    context = engine.model.config.block_size
    if test.longest > context:
        raise ValueError(
            f"The test {test.name} needs {test.longest} tokens in a row, and the model's context has {context}. Give "
            f"`{'prompt_tokens' if test.prompt_tokens else 'new_tokens'}` less{', or `depth`' if test.depth else ''}."
        )
    needed = test.batch_size * engine.engine.bytes_needed(test.longest)
    if test.batch_size > 1 and needed > engine.engine.cache_bytes:
        raise ValueError(
            f"The test {test.name} needs {needed / 1e9:.2f} GB for keys and values, and there are "
            f"{engine.engine.cache_bytes / 1e9:.2f} GB. Give `batch_sizes` less."
        )


def weight_bytes_read(model: GPT, rows: int) -> int:
    """Bytes of weights that a decode step of this many rows reads: all but the embedding, of which it takes a row each,
    and of experts those that are expected to be chosen, where every choice is as likely."""
    config = model.config
    wte, head = model.transformer.wte, model.lm_head
    total = sum(p.nbytes for p in model.parameters())
    if getattr(head, "weight", None) is not wte.weight:
        total -= wte.weight.nbytes
    for module in model.modules():
        if isinstance(module, LLaMAMoE):
            unused = (1 - config.n_expert_per_token / config.n_expert) ** rows
            total -= int(unused * sum(p.nbytes for expert in module.experts for p in expert.parameters()))
    return total
