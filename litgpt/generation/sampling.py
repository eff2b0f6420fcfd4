"""From logits to the next token: pure functions of tensors, and of the random generator that is passed in.

Shapes: B rows, V the vocabulary, K the candidates that are left of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The filters act in this order, each on what the one before left.

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

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature} is not possible: give 0 (greedy) or more.")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} is not possible: give 1 or more, or leave it out for all tokens.")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is not possible: it is a probability, between 0 and 1.")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p {self.min_p} is not possible: it is a fraction, between 0 and 1.")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1 or self.top_p == 0


def next_tokens(logits: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator]) -> Tensor:
    """The next token of each row: (B, V) logits -> (B,) int64.

    A row is drawn with its own settings and its own generator, so the rows beside it do not matter.
    """
    logits = logits.float()
    tokens = logits.argmax(dim=-1)
    for sampling in dict.fromkeys(samplings):
        if not sampling.is_greedy:
            rows = [row for row, other in enumerate(samplings) if other == sampling]
            tokens[rows] = sample(logits[rows], sampling, [generators[row] for row in rows])
    return tokens


def sample(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """Draws one token per row, one generator per row: (B, V) float logits -> (B,) int64."""
    scores, candidates = filtered(logits / sampling.temperature, sampling)  # (B, K), (B, K) or None
    choice = draw(scores, generators)  # (B,)
    return choice if candidates is None else candidates.gather(-1, choice[:, None])[:, 0]


def filtered(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """What top-k, top-p and min-p leave: scores (B, K), -inf where excluded, and the tokens (B, K) they belong to.

    None for the tokens means all of the vocabulary in order; otherwise the most likely come first.
    """
    candidates = None
    size = logits.size(-1)
    if sampling.top_k and sampling.top_k < size:
        logits, candidates = logits.topk(sampling.top_k, dim=-1)
    elif sampling.top_p < 1:
        logits, candidates = logits.sort(dim=-1, descending=True)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        logits = keep_min_p(logits, sampling.min_p)
    return logits, candidates


def keep_top_p(sorted_logits: Tensor, top_p: float) -> Tensor:
    """Excludes what comes after the tokens that reach `top_p` together; (B, K), most likely first.

    The token that crosses the threshold stays, so at least one does.
    """
    probabilities = sorted_logits.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    excluded = before >= top_p
    excluded[..., 0] = False
    return sorted_logits.masked_fill(excluded, float("-inf"))


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Excludes tokens less than `min_p` times as likely as the most likely one; (B, K) in any order."""
    probabilities = logits.softmax(dim=-1)
    excluded = probabilities < min_p * probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(excluded, float("-inf"))


def draw(scores: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Draws an index per row with probability softmax(scores): (B, K) -> (B,).

    The argmax of p / Exp(1) noise is distributed as p (the Gumbel trick): no synchronisation with the device, and a
    row's noise comes from its own generator.
    """
    noise = torch.empty_like(scores)
    for row, generator in enumerate(generators):
        noise[row].exponential_(generator=generator)
    noise.clamp_min_(torch.finfo(noise.dtype).tiny)  # 0 / 0 would win the argmax
    return (scores.softmax(dim=-1) / noise).argmax(dim=-1)
