"""A request on its way through an engine: what of it the model has seen, and what it has generated."""

from __future__ import annotations

import torch
from torch import Tensor

from litgpt.generation.request import Output, Request, TokenLogprob
from litgpt.generation.sampling import Penalties


class Sequence:
    """The tokens of one request, from its prompt to the last token of the answer.

    Args:
        request: What was asked.
        number: What its outputs bear.
        max_new_tokens: How many tokens the context leaves for the answer, at most those that were asked for.
        device: Where its tokens are drawn.
        vocab_size: V, the length of the logits.

    Attributes:
        num_prefilled: Tokens of the prompt that the model has seen.
        num_cached: Of these, how many came from the prefix cache.
        num_generated: Tokens of the answer so far.
        last_token: The last of these.
        finish_reason: As in `Output`.
        prompt_logprobs: Log-probabilities of the prompt's tokens that no output has given yet.
    """

    def __init__(
        self, request: Request, number: int, max_new_tokens: int, device: torch.device, vocab_size: int
    ) -> None:
        self.request = request
        self.number = number
        self.max_new_tokens = max_new_tokens
        self.device, self.vocab_size = device, vocab_size
        self.num_prefilled = self.num_cached = self.num_generated = 0
        self.last_token = -1
        self.finish_reason: str | None = None
        self.prompt_logprobs: list[TokenLogprob] = []
        self._pending: list[tuple[int, TokenLogprob | None]] = []  # the beginning of what may become a stop sequence
        # What is only scored draws nothing: of many thousands at a time, none has a generator.
        self._generator: torch.Generator | None = None
        if request.max_new_tokens:
            seed = request.sampling.seed
            if seed is None:
                seed = int(torch.randint(2**62, ()))
            self._generator = torch.Generator(device).manual_seed(seed)
        self._penalties: Penalties | None = None

    @property
    def generator(self) -> torch.Generator:
        """The random numbers that draw its tokens: of a request that asks for any."""
        assert self._generator is not None, "a request that is only scored draws no tokens"
        return self._generator

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the answer so far."""
        return len(self.request.prompt) + self.num_generated

    @property
    def max_length(self) -> int:
        """The most tokens that the KV cache ever has to hold of it."""
        return self.request.num_to_prefill + self.max_new_tokens

    @property
    def is_prefilled(self) -> bool:
        """Whether the model has seen the whole prompt."""
        return self.num_prefilled == self.request.num_to_prefill

    # -- before its next token is drawn

    @property
    def changes_logits(self) -> bool:
        """Whether penalties, biases or a constraint act on its logits."""
        return self.request.constraint is not None or self.request.sampling.has_penalties

    def process_logits(self, logits: Tensor) -> Tensor:
        """Apply penalties, biases and the constraint: (V,) float logits -> (V,)."""
        if self.request.sampling.has_penalties:
            if self._penalties is None:
                self._penalties = Penalties(self.request.sampling, self.request.prompt, logits.numel(), self.device)
            logits = self._penalties(logits)
        if self.request.constraint is not None:
            allowed = self.request.constraint.mask().to(self.device)
            logits = torch.cat((logits[: allowed.numel()].masked_fill(~allowed, float("-inf")),
                                torch.full_like(logits[allowed.numel() :], float("-inf"))))  # fmt: skip
        return logits

    def count_token(self, token: Tensor) -> None:
        """Tell the penalties of a token, () int64, on the device: nothing waits for its value."""
        if self._penalties is not None:
            self._penalties.count(token)

    # -- once it is drawn

    def append(self, token: int, logprob: TokenLogprob | None = None) -> Output:
        """Take the next token, and give those that are certain to be part of the output."""
        self.last_token = token
        self.num_generated += 1
        self._pending.append((token, logprob))
        if self.request.constraint is not None:
            self.request.constraint.accept(token)
        ids = [pending for pending, _ in self._pending]
        stop = next((stop for stop in self.request.stops if len(stop) and ids[-len(stop) :] == list(stop)), None)
        if stop is not None:
            self.finish_reason = "stop"
            count = len(ids) - len(stop)
        elif self.num_generated >= self.max_new_tokens:
            self.finish_reason = "length"
            count = len(ids)
        else:
            count = len(ids) - self._num_held_back(ids)
        released, self._pending = self._pending[:count], self._pending[count:]
        stop_logprobs = _logprobs(self._pending) if stop is not None else []
        return self._output([token for token, _ in released], _logprobs(released), stop_logprobs)

    def finish_scoring(self) -> Output:
        """The only output of a request that asks for no new tokens."""
        self.finish_reason = "length"
        return self._output([], [], [])

    def _output(self, token_ids: list[int], logprobs: list[TokenLogprob], stop_logprobs: list[TokenLogprob]) -> Output:
        prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, []
        return Output(
            self.number, token_ids, self.finish_reason, logprobs, prompt_logprobs, self.num_cached, stop_logprobs
        )

    def _num_held_back(self, ids: list[int]) -> int:
        """Length of the longest end of `ids` that begins a stop sequence."""
        longest = max((len(stop) for stop in self.request.stops), default=0) - 1
        for length in range(min(longest, len(ids)), 0, -1):
            if any(list(stop[:length]) == ids[-length:] for stop in self.request.stops if len(stop) > length):
                return length
        return 0


def _logprobs(tokens: list[tuple[int, TokenLogprob | None]]) -> list[TokenLogprob]:
    return [logprob for _, logprob in tokens if logprob is not None]
