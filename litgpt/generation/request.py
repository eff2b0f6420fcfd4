"""What is asked of the engine and what it gives: a prompt with its settings, new tokens with what belongs to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from litgpt.generation.sampling import Penalties, Sampling


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
    seed: int | None = None
    """Of this request's own random generator; None takes one from torch's global generator."""
    logprobs: int | None = None
    """Asks for the log-probability of each new token, and of the so many likeliest in its place."""
    constraint: Constraint | None = None
    score_from: int | None = None
    """Asks for the log-probabilities of the prompt's own tokens, from this one on (1 or more: nothing predicts the
    first, 0), with the `logprobs` likeliest in their places. max_new_tokens may then be 0: nothing is generated."""
    alternatives: Sequence[int] = ()
    """Tokens whose log-probabilities are asked for in the place of the prompt's last one, besides its own."""

    @property
    def does_nothing(self) -> bool:
        """Whether neither an answer nor a score is asked for."""
        return self.max_new_tokens == 0 and self.score_from is None

    @property
    def num_to_read(self) -> int:
        """How many tokens of the prompt the model has to see: not the last one, where nothing follows it."""
        return len(self.prompt) - (self.max_new_tokens == 0)

    @property
    def num_reusable(self) -> int:
        """How many of these may be known from before: what is predicted after the others is asked for."""
        return (len(self.prompt) if self.score_from is None else self.score_from) - 1


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability, natural, before temperature, penalties and filters."""

    token: int
    logprob: float
    likeliest: list[tuple[int, float]]
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
    """How many tokens of the prompt were known from before."""
    stop_logprobs: list[TokenLogprob] = field(default_factory=list)
    """As `logprobs`, of the tokens of the stop sequence that ended it."""


class Progress:
    """A request on its way: what has been read of its prompt, and what it has produced."""

    def __init__(self, request: Request, number: int, room: int, device: torch.device, vocabulary: int) -> None:
        self.request = request
        self.number = number
        self.room = room  # for new tokens
        self.device, self.vocabulary = device, vocabulary
        self.read = 0  # tokens of the prompt that the model has seen
        self.cached = 0  # of these, known from before
        self.last = -1
        self.produced = 0
        self.pending: list[tuple[int, TokenLogprob | None]] = []  # the beginning of what may become a stop sequence
        self.finish_reason: str | None = None
        self.prompt_logprobs: list[TokenLogprob] = []  # not given out yet
        # What is only scored draws nothing: of many thousands at a time, none has a generator.
        self.generator: torch.Generator | None = None
        if request.max_new_tokens:
            self.generator = torch.Generator(device)
            seed = request.seed if request.seed is not None else int(torch.randint(2**62, ()))
            self.generator.manual_seed(seed)
        self._penalties: Penalties | None = None

    @property
    def length(self) -> int:
        """Tokens of the prompt and the answer so far."""
        return len(self.request.prompt) + self.produced

    @property
    def changes_logits(self) -> bool:
        return self.request.constraint is not None or self.request.sampling.has_penalties

    def changed(self, logits: Tensor) -> Tensor:
        """The (V,) float logits after penalties and constraint."""
        if self.request.sampling.has_penalties:
            if self._penalties is None:
                self._penalties = Penalties(self.request.sampling, self.request.prompt, logits.numel(), self.device)
            logits = self._penalties(logits)
        if self.request.constraint is not None:
            allowed = self.request.constraint.mask().to(self.device)
            logits = torch.cat((logits[: allowed.numel()].masked_fill(~allowed, float("-inf")),
                                torch.full_like(logits[allowed.numel() :], float("-inf"))))  # fmt: skip
        return logits

    def note(self, token: Tensor) -> None:
        """Tells the penalties of a token, () int64, on the device."""
        if self._penalties is not None:
            self._penalties.count(token)

    def take(self, token: int, logprob: TokenLogprob | None = None) -> Output:
        """Counts the next token in, and gives those that are certain to be part of the output."""
        self.last = token
        self.produced += 1
        self.pending.append((token, logprob))
        if self.request.constraint is not None:
            self.request.constraint.accept(token)
        ids = [held for held, _ in self.pending]
        stop = next((stop for stop in self.request.stops if len(stop) and ids[-len(stop) :] == list(stop)), None)
        if stop is not None:
            self.finish_reason = "stop"
            count = len(ids) - len(stop)
        elif self.produced >= self.room:
            self.finish_reason = "length"
            count = len(ids)
        else:
            count = len(ids) - self._held_back(ids)
        released, self.pending = self.pending[:count], self.pending[count:]
        of_stop = self.pending if stop is not None else []
        return self._output([held for held, _ in released], _known(released), _known(of_stop))

    def finish_reading(self) -> Output:
        """The only output of a request that asks for no new tokens."""
        self.finish_reason = "length"
        return self._output([], [], [])

    def _output(self, token_ids: list[int], logprobs: list[TokenLogprob], of_stop: list[TokenLogprob]) -> Output:
        of_prompt, self.prompt_logprobs = self.prompt_logprobs, []
        return Output(self.number, token_ids, self.finish_reason, logprobs, of_prompt, self.cached, of_stop)

    def _held_back(self, ids: list[int]) -> int:
        """Length of the longest end of `ids` that begins a stop sequence."""
        longest = max((len(stop) for stop in self.request.stops), default=0) - 1
        for length in range(min(longest, len(ids)), 0, -1):
            if any(list(stop[:length]) == ids[-length:] for stop in self.request.stops if len(stop) > length):
                return length
        return 0


def _known(tokens: Sequence[tuple[int, TokenLogprob | None]]) -> list[TokenLogprob]:
    return [logprob for _, logprob in tokens if logprob is not None]
