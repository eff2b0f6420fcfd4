"""What is asked of an engine and what it gives: a prompt with its settings, new tokens with what belongs to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Protocol

from torch import Tensor

from litgpt.generation.sampling import Sampling


class Constraint(Protocol):
    """What tokens an answer may consist of, such as a grammar; it follows the answer token by token."""

    def mask(self) -> Tensor:
        """(V or less,) bool: the tokens that may come next. Beyond its end none may."""

    def accept(self, token: int) -> None:
        """Takes the next token."""


@dataclass
class Request:
    """One prompt and how it is to be continued."""

    prompt: Sequence[int]
    max_new_tokens: int = 50
    sampling: Sampling = field(default_factory=Sampling)
    stops: Sequence[Sequence[int]] = ()
    """Token sequences that end the generation; they are not part of the output."""
    logprobs: int | None = None
    """Asks for the log-probability of each new token, and of this many of the likeliest in its place."""
    constraint: Constraint | None = None
    score_from: int | None = None
    """Asks for the log-probabilities of the prompt's own tokens, from this one on (1 or more: nothing predicts the
    first, 0), with the `logprobs` likeliest in their places. max_new_tokens may then be 0: nothing is generated."""
    alternatives: Sequence[int] = ()
    """Tokens whose log-probabilities are asked for in the place of the prompt's last one, besides its own."""
    reports_prefill: bool = False
    """Asks for an output without tokens after each chunk of the prompt but the last."""

    @property
    def does_nothing(self) -> bool:
        """Whether neither an answer nor a score is asked for."""
        return self.max_new_tokens == 0 and self.score_from is None

    @property
    def num_to_prefill(self) -> int:
        """How many tokens of the prompt the model has to see: not the last one, where nothing follows it."""
        return len(self.prompt) - (self.max_new_tokens == 0)

    @property
    def num_reusable(self) -> int:
        """How many of these may come from the prefix cache: what the model predicts after the others is asked for."""
        return (len(self.prompt) if self.score_from is None else self.score_from) - 1


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability, natural, before temperature, penalties and filters."""

    token: int
    logprob: float
    top_logprobs: list[tuple[int, float]]
    """Tokens and log-probabilities, the likeliest first."""


@dataclass(frozen=True)
class Output:
    """What one step gave one request."""

    request: int
    """The number that `submit` returned; of `generate`, the index of the request."""
    token_ids: list[int]
    """New tokens: usually one; none while they may be the beginning of a stop sequence, then several at once."""
    finish_reason: str | None = None
    """None while it goes on; "stop" at a stop sequence, "length" at max_new_tokens or the end of the context."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """One for each token, where the request asked for them."""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """One for each token of the prompt from `score_from` on, then one for each of the `alternatives`; with the first
    output."""
    cached_tokens: int = 0
    """How many tokens of the prompt came from the prefix cache."""
    stop_logprobs: list[TokenLogprob] = field(default_factory=list)
    """As `logprobs`, of the tokens of the stop sequence that ended it."""
    num_prefilled: int | None = None
    """How many tokens of the prompt the model has seen, where a request asks for that; None once it has seen all."""


def check_request(request: Request, context: int) -> int:
    """How many new tokens a context of `context` tokens leaves room for, at most max_new_tokens.

    Raises:
        ValueError: The prompt is empty or leaves no room, or nothing is asked for.
    """
    if not isinstance(request.max_new_tokens, Integral):
        raise ValueError(f"max_new_tokens {request.max_new_tokens!r} is not valid: give an integer.")
    length, scores = len(request.prompt), request.score_from is not None
    if request.max_new_tokens < (0 if scores else 1):
        raise ValueError(f"max_new_tokens {request.max_new_tokens} is not valid: give 1 or more.")
    if length == 0:
        raise ValueError("The prompt is empty, and the tokenizer puts no token before it. Give it some text.")
    if request.score_from is not None and not 0 < request.score_from < length:
        raise ValueError(
            f"score_from {request.score_from} is not valid with a prompt of {length} tokens: give 1 to {length - 1}."
        )
    if request.max_new_tokens == 0:
        if request.num_to_prefill > context:
            raise ValueError(
                f"The prompt has {length} tokens, and the model's context of {context} tokens must hold all but the "
                "last. Shorten it, or take a model with a longer context."
            )
        return 0
    if length >= context:
        raise ValueError(
            f"The prompt has {length} tokens, and the model's context of {context} tokens must hold it and at least "
            "one new token. Shorten the prompt, or take a model with a longer context."
        )
    return min(request.max_new_tokens, context - length)
