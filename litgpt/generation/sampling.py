"""From logits to the next token: pure functions of tensors, and of the random generators that are passed in.

Shapes: B rows, V the vocabulary, K the candidates that are left of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt.devices.random_state import check_seed, following_seed

BLOCK = 256  # probabilities that are summed at a time


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The penalties change the logits; the filters act in this order, each on what the one
    before left.

    Raises:
        ValueError: a value outside its range, by name.
    """

    temperature: float = 1.0
    """Divides the logits: below 1 more certain, above 1 more varied; 0 takes the most likely token."""
    top_k: int | None = None
    """Only the k most likely tokens; 1 takes the most likely one, None or 0 all."""
    top_p: float = 1.0
    """Only the most likely tokens that together reach this probability (nucleus, https://arxiv.org/abs/1904.09751)."""
    min_p: float = 0.0
    """Only tokens at least this fraction as likely as the most likely one (https://arxiv.org/abs/2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that were in the prompt or the answer, and multiplies the negative ones
    (https://arxiv.org/abs/1909.05858)."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that the answer has had."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit for each time that the answer has had it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    seed: int | None = None
    """Of the answer's own random generator; None takes one from torch's global generator."""

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            if not isinstance(getattr(self, name), Real):
                raise ValueError(f"{name} {getattr(self, name)!r} is not valid: give a number.")
        for name in ("top_k", "seed"):
            if not isinstance(getattr(self, name), Integral | None):
                raise ValueError(f"{name} {getattr(self, name)!r} is not valid: give an integer, or leave it out.")
        if self.seed is not None:
            check_seed(self.seed)
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature} is not valid: give 0 (greedy) or more.")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} is not valid: give 1 or more, or leave it out for all tokens.")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is not valid: it is a probability, between 0 and 1.")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p {self.min_p} is not valid: it is a fraction, between 0 and 1.")
        # What is smaller or larger overflows float32, here or as its inverse.
        if not 0.01 <= self.repetition_penalty <= 100:
            raise ValueError(
                f"repetition_penalty {self.repetition_penalty} is not valid: give 0.01 to 100, 1 for none."
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(getattr(self, name)) <= 100:
                raise ValueError(f"{name} {getattr(self, name)} is not valid: give -100 to 100, 0 for none.")

    def following(self, index: int) -> Sampling:
        """The settings of one of several answers, each of which has a seed of its own: they count on from the first."""
        return self if self.seed is None or not index else replace(self, seed=following_seed(self.seed, index))

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1 or self.top_p == 0

    @property
    def has_penalties(self) -> bool:
        """Whether the logits are changed before a token is drawn from them."""
        penalties = (self.repetition_penalty != 1, self.presence_penalty, self.frequency_penalty, self.logit_bias)
        return any(map(bool, penalties))


class TopK(NamedTuple):
    """How many candidates some rows keep, 0 for none."""

    limits: Tensor
    """(B, 1)."""
    largest: int
    smallest: int
    """Of the rows, known without asking the device."""


class Filters(NamedTuple):
    """The settings of some rows, each (B, 1); None where no row has such a setting."""

    temperature: Tensor | None
    top_k: TopK | None
    top_p: Tensor | None
    min_p: Tensor | None

    @classmethod
    def of(cls, samplings: Sequence[Sampling], device: torch.device | str) -> Filters:
        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, device=device)[:, None]

        temperature = [sampling.temperature for sampling in samplings]
        top_k = [sampling.top_k or 0 for sampling in samplings]
        # Of rows without a nucleus nothing is left out, not even by rounding.
        top_p = [sampling.top_p if sampling.top_p < 1 else float("inf") for sampling in samplings]
        min_p = [sampling.min_p for sampling in samplings]
        return cls(
            column(temperature) if any(value != 1 for value in temperature) else None,
            TopK(column(top_k), max(top_k), min(top_k)) if any(top_k) else None,
            column(top_p) if min(top_p) < 1 else None,
            column(min_p) if any(min_p) else None,
        )


class Sampler:
    """Draws the next token of each row of a batch, with the row's own settings and its own generator: the rows next to
    it do not matter. The settings are brought to the device once, and nothing waits for the device.
    """

    def __init__(
        self, samplings: Sequence[Sampling], generators: Sequence[torch.Generator], device: torch.device | str
    ) -> None:
        kinds: dict[str, list[int]] = {}
        for row, sampling in enumerate(samplings):
            if not sampling.is_greedy:
                kind = "top_k" if sampling.top_k else "top_p" if sampling.top_p < 1 else "all"
                kinds.setdefault(kind, []).append(row)
        self.parts: list[tuple[Tensor | None, Filters, list[torch.Generator]]] = []
        for rows in kinds.values():
            index = None if len(rows) == len(samplings) else torch.tensor(rows, device=device)
            filters = Filters.of([samplings[row] for row in rows], device)
            self.parts.append((index, filters, [generators[row] for row in rows]))

    def __call__(self, logits: Tensor) -> Tensor:
        """(B, V) logits -> (B,) int64."""
        logits = logits.float()
        if len(self.parts) == 1 and self.parts[0][0] is None:
            return sample(logits, *self.parts[0][1:])
        tokens = logits.argmax(dim=-1)
        for rows, filters, generators in self.parts:
            tokens[rows] = sample(logits[rows], filters, generators)
        return tokens


def sample(logits: Tensor, filters: Filters, generators: Sequence[torch.Generator]) -> Tensor:
    """Draws one token per row, one generator per row: (B, V) float logits -> (B,) int64."""
    scores, candidates = filtered(logits, filters)  # (B, K), (B, K) or None
    choice = draw(scores, generators)  # (B,)
    return choice if candidates is None else candidates.gather(-1, choice[:, None])[:, 0]


def filtered(logits: Tensor, filters: Filters) -> tuple[Tensor, Tensor | None]:
    """What the temperature makes of (B, V) logits, and top-k, top-p and min-p leave of that: scores (B, K), -inf where
    excluded, and the tokens (B, K) they belong to.

    None for the tokens means all of the vocabulary in order; otherwise the most likely come first.
    """
    if filters.temperature is not None:
        logits = logits / filters.temperature
    candidates = None
    if filters.top_k is not None:
        most = min(filters.top_k.largest, logits.size(-1))
        logits, candidates = logits.topk(most, dim=-1)
        if filters.top_k.smallest < most:
            excluded = torch.arange(most, device=logits.device) >= filters.top_k.limits
            logits = logits.masked_fill(excluded, float("-inf"))
    elif filters.top_p is not None:
        logits, candidates = logits.sort(dim=-1, descending=True)
    if filters.top_p is not None:
        logits = keep_top_p(logits, filters.top_p)
    if filters.min_p is not None:
        logits = keep_min_p(logits, filters.min_p)
    return logits, candidates


def keep_top_p(sorted_logits: Tensor, top_p: float | Tensor) -> Tensor:
    """Excludes what comes after the tokens that reach `top_p` together; (B, K), most likely first.

    The token that crosses the threshold stays, so at least one does.
    """
    probabilities = sorted_logits.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    excluded = before >= top_p
    excluded[..., 0] = False
    return sorted_logits.masked_fill(excluded, float("-inf"))


def keep_min_p(logits: Tensor, min_p: float | Tensor) -> Tensor:
    """Excludes tokens less than `min_p` times as likely as the most likely one; (B, K) in any order."""
    probabilities = logits.softmax(dim=-1)
    excluded = probabilities < min_p * probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(excluded, float("-inf"))


def draw(scores: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Draws an index per row with probability softmax(scores): (B, K) -> (B,).

    One number for each row, from its own generator, says where in the running sum of the probabilities its index is: in
    which block first, as running sums of a whole vocabulary take as long as all the rest. Nothing waits for the device.
    """
    probabilities = scores.softmax(dim=-1)
    if rest := -probabilities.size(-1) % BLOCK:
        probabilities = F.pad(probabilities, (0, rest))
    blocks = probabilities.unflatten(-1, (-1, BLOCK))  # (B, N, BLOCK)
    sums = blocks.sum(dim=-1)  # (B, N)
    ends = sums.cumsum(dim=-1)
    numbers = torch.cat([torch.rand(1, generator=generator, device=generator.device) for generator in generators])
    places = numbers.to(scores.device)[:, None] * ends[:, -1:]  # (B, 1)
    block = index_at(sums, ends, places)
    within = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0]  # (B, BLOCK)
    begins = ends.gather(-1, block) - sums.gather(-1, block)
    return (block * BLOCK + index_at(within, within.cumsum(dim=-1), places - begins))[:, 0]


def index_at(values: Tensor, ends: Tensor, places: Tensor) -> Tensor:
    """Where places (B, 1) lie in values (B, K), of which `ends` are the running sums: (B, 1).

    Sums are rounded: a place beyond the last of them, or at a value of 0, goes to the largest value.
    """
    index = torch.searchsorted(ends, places, right=True).clamp_(max=values.size(-1) - 1)
    return torch.where(values.gather(-1, index) > 0, index, values.argmax(dim=-1, keepdim=True))


class Penalties:
    """What a request's penalties and biases make of the logits, token by token.

    Args:
        sampling: The settings.
        prompt: The tokens of the prompt.
        size: V.
        device: Where the logits are.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], size: int, device: torch.device | str) -> None:
        self.sampling = sampling
        self.seen = torch.zeros(size, dtype=torch.bool, device=device)
        self.seen[torch.tensor(prompt, device=device)] = True
        self.counts = torch.zeros(size, device=device)
        self.biased = torch.tensor(list(sampling.logit_bias), dtype=torch.int64, device=device)
        self.biases = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32, device=device)

    def count(self, token: Tensor) -> None:
        """Takes note of a token of the answer, () or (1,) int64."""
        self.seen[token] = True
        self.counts[token] += 1

    def __call__(self, logits: Tensor) -> Tensor:
        """(V,) float logits -> (V,)."""
        sampling = self.sampling
        if sampling.repetition_penalty != 1:
            factor = torch.where(logits > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty)
            logits = torch.where(self.seen, logits * factor, logits)
        logits = logits - sampling.frequency_penalty * self.counts - sampling.presence_penalty * (self.counts > 0)
        return logits.index_add(0, self.biased, self.biases)
