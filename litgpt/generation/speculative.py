"""Speculative decoding: a large model checks several drafted tokens in one call, in about the time of one token.

The drafts come from a smaller model (Leviathan et al., https://arxiv.org/abs/2211.17192), or are what followed the same
words earlier in the text (prompt lookup, https://github.com/apoorvumang/prompt-lookup-decoding). Either way the tokens
are distributed as the large model alone would draw them, and the greedy ones are the same. Where it does not pay, it
stops by itself (`draft_pace`).

Shapes: T tokens, K drafted ones, V the vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections import abc, deque
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from litgpt.generation.draft_pace import DraftPace, plain_times
from litgpt.generation.engine import PREFILL_CHUNK
from litgpt.generation.interface import GenerationEngine
from litgpt.generation.kv_cache_manager import kv_cache_bytes, limit_attention
from litgpt.generation.model_runner import precision
from litgpt.generation.request import Output, Request
from litgpt.generation.sampling import Filters, Sampling, draw, filtered
from litgpt.generation.sequence import Sequence
from litgpt.kv_cache import KVCache
from litgpt.model import GPT

# Last tokens that prompt lookup looks for. What follows a single one is rarely the same (6 % of 162 tokens, measured in
# an explanation by SmolLM2-135M).
SHORTEST_MATCH, LONGEST_MATCH = 2, 3


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """(T, V) logits -> (T, V) float32: what `sampling` draws from, temperature and filters applied."""
    logits = logits.float()
    if sampling.is_greedy:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    filters = Filters.of([sampling] * logits.size(0), logits.device)
    scores, candidates = filtered(logits, filters)
    found = scores.softmax(dim=-1)
    return found if candidates is None else torch.zeros_like(logits).scatter_(-1, candidates, found)


def accept(target: Tensor, draft: Tensor, proposed: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which drafted tokens stay, and the token after them (algorithm 1 of the paper).

    A token that the draft drew with probability q and the target would with p stays with probability min(1, p / q). The
    first that does not is replaced by one drawn from max(0, p - q); if all stay, one more is drawn.

    Args:
        target: (K + 1, V) what the target draws from at each place.
        draft: (K, V) what the draft drew from.
        proposed: (K,) what it drew.
        generator: Of the random numbers.

    Returns:
        How many stay, (), and the next token, (); both int64 on the device.
    """
    chosen = proposed[:, None]
    p, q = target[:-1].gather(-1, chosen)[:, 0], draft.gather(-1, chosen)[:, 0]
    luck = torch.rand(q.shape, generator=generator, device=q.device)
    count = (luck * q < p).cumprod(0).sum()
    beyond = torch.cat((draft, torch.zeros_like(target[:1])))  # after all of them nothing was drafted
    rest = (target - beyond).clamp(min=0).index_select(0, count[None])  # (1, V)
    whole = target.index_select(0, count[None])
    rest = torch.where(rest.sum() > 0, rest, whole)  # q = p: only rounding can have rejected the token
    return count, draw(rest.log(), [generator])[0]


def accept_equal(target: Tensor, proposed: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same for tokens that were not drawn, but found: those stay that the target draws itself.

    A found token stays with the probability that the target has for it, as in `accept`. Each token takes one random
    number, whether it was drafted or not: what a seed gives does not depend on what was drafted.

    Args:
        target: (K + 1, V) what the target draws from at each place.
        proposed: (K,) what was found.
        generator: Of the random numbers.

    Returns:
        As `accept`.
    """
    drafted = [*proposed.tolist(), -1]
    for place, (row, found) in enumerate(zip(target, drafted, strict=True)):
        token = draw(row[None].log(), [generator])[0]
        if int(token) != found:
            return torch.tensor(place, device=target.device), token
    raise AssertionError("no token is -1")


class PromptLookup:
    """Drafts what followed the last words where they stood before, the longest match first."""

    def __init__(self, shortest: int = SHORTEST_MATCH, longest: int = LONGEST_MATCH) -> None:
        self.shortest, self.longest = shortest, longest
        self.tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # where the text goes on after these tokens, the latest place

    def extend(self, tokens: abc.Sequence[int]) -> None:
        """Takes the next tokens of the text."""
        for token in tokens:
            end = len(self.tokens)
            for length in range(self.shortest, min(self.longest, end) + 1):
                self._next[tuple(self.tokens[end - length :])] = end
            self.tokens.append(token)

    def propose(self, count: int) -> list[int]:
        """Up to `count` tokens."""
        for length in range(min(self.longest, len(self.tokens)), self.shortest - 1, -1):
            start = self._next.get(tuple(self.tokens[-length:]))
            if start is not None:
                return self.tokens[start : start + count]
        return []


class RewindableModel:
    """A model with the KV cache of one sequence, the last tokens of which can be taken back.

    Args:
        model: The model.
        length: How long the sequence may get.
        spare: How many tokens may be taken back at a time.
        autocast: A dtype to compute in, if not that of the weights.
    """

    def __init__(self, model: GPT, length: int, spare: int, autocast: torch.dtype | None) -> None:
        self.model, self.autocast = model, autocast
        self.device = model.transformer.wte.weight.device
        self.new_cache = partial(model.new_cache, 1, length, dtype=autocast, spare=spare)
        self.cache: KVCache | None = None  # has memory from the first token on
        self.length = 0

    def __call__(self, tokens: Tensor, last: int) -> Tensor:
        """Run (T,) tokens after those it has seen, a chunk at a time: (last, V) logits after the last ones."""
        if self.cache is None:
            self.cache = self.new_cache()
        if tokens.numel() > PREFILL_CHUNK:
            *chunks, end = *tokens[:-last].split(PREFILL_CHUNK), tokens[-last:]
            for chunk in chunks:
                self._hidden(chunk, self.cache)
            tokens = end
        hidden = self._hidden(tokens, self.cache)
        with precision(self.device, self.autocast):
            return self.model.logits(hidden[-last:])

    def rewind(self, length: int) -> None:
        """Forgets all from the token at `length` on."""
        if self.cache is not None and length < self.length:
            self.cache.rewind(0, length)
            self.length = length

    def _hidden(self, tokens: Tensor, cache: KVCache) -> Tensor:
        # From the beginning on the model needs no positions, and takes its fastest attention kernel.
        end = self.length + tokens.numel()
        positions = torch.arange(self.length, end, device=self.device)[None] if self.length else None
        self.length = end
        limit_attention(cache, self.length)
        with precision(self.device, self.autocast):
            return self.model.hidden_states(tokens[None], positions, cache=cache)[0]


class SpeculativeEngine(GenerationEngine):
    """An engine that speculates, one request after another. It keeps nothing of a request that is finished.

    Args:
        model: The model whose answers are wanted, as for `Engine`.
        draft: A smaller one with the same tokens; None drafts by prompt lookup.
        count: How many tokens are drafted at a time.
        autocast: As for `Engine`.
        compile: Is not supported.
        fixed_length: How many tokens prompt and answer may have together, at most the model's context.

    Attributes:
        proposed, accepted: How many tokens were drafted so far, and how many of them stayed.
        calls: How often the model was called.
        paused: How many of these times nothing was drafted, since it had not paid. A draft model is paused for greedy
            answers alone.
    """

    max_slots = 1
    cache_bytes = math.inf

    def __init__(
        self,
        model: GPT,
        draft: GPT | None = None,
        *,
        count: int = 3,
        autocast: torch.dtype | None = None,
        compile: bool = False,
        fixed_length: int | None = None,
    ) -> None:
        context = min(fixed_length or model.config.block_size, model.config.block_size)
        super().__init__(model, context=context, autocast=autocast, compiles=compile)
        if count < 1:
            raise ValueError(f"speculative_k={count} is not valid: give 1 or more.")
        if self.compiles:
            raise ValueError(
                "compile=true is not supported here: each length of a draft would be compiled. Leave it out."
            )
        self.draft, self.count = draft, count
        self.proposed = self.accepted = self.calls = self.paused = 0
        self._plain_seconds = plain_times()
        self._numbers = itertools.count()
        self._texts: deque[Speculation] = deque()  # the first is being answered

    @property
    def busy(self) -> bool:
        return bool(self._texts)

    @property
    def running(self) -> int:
        return min(1, len(self._texts))

    @property
    def waiting(self) -> int:
        return len(self._texts) - self.running

    def check(self, request: Request) -> int:
        if request.sampling.has_penalties or request.constraint is not None or request.logprobs is not None:
            raise ValueError(
                "Speculative decoding has no penalties, biases, constraints or log-probabilities. Leave them out, or "
                "decode plainly."
            )
        return super().check(request)

    def submit(self, request: Request) -> int:
        max_new_tokens, number = self.check(request), next(self._numbers)
        sequence = Sequence(request, number, max_new_tokens, self.device, self.model.config.padded_vocab_size)
        pace = DraftPace(self._plain_seconds)
        self._texts.append(Speculation(self.model, self.draft, sequence, self.count, self.autocast, pace))
        return number

    def cancel(self, number: int) -> None:
        self._texts = deque(text for text in self._texts if text.sequence.number != number)

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """One call of the model: one or several tokens for the request whose turn it is."""
        if not self._texts:
            return []
        text = self._texts[0]
        drafts, is_first = not text.is_paced or text.pace.drafts(), not text.sequence.num_generated
        started = perf_counter()
        try:
            tokens, proposed = text.advance(drafts)
        except BaseException:  # KeyboardInterrupt too: some layers have stored their keys, others have not
            self._texts.popleft()
            raise
        if text.is_paced and not is_first:  # the first prefills the prompt
            text.pace.note(perf_counter() - started, proposed, len(tokens))
        self.calls += 1
        self.paused += not drafts and text.pace.is_paused
        self.proposed += proposed
        self.accepted += len(tokens) - 1
        outputs = []
        for token in tokens:
            outputs.append(text.sequence.append(token))
            if outputs[-1].finish_reason is not None:
                self._texts.popleft()
                break
        return outputs

    def clear_prefix_cache(self) -> None:
        """Nothing to do: each request begins anew."""

    @property
    def cache_size(self) -> int:
        models = [model for text in self._texts for model in (text.target, text.draft) if model is not None]
        caches = [model.cache for model in models if model.cache is not None]
        return sum(tensor.numel() * tensor.itemsize for cache in caches for tensor in cache.tensors())

    def bytes_needed(self, length: int) -> int:
        models = [self.model, *([] if self.draft is None else [self.draft])]
        most = min(length, self.context)
        return sum(
            kv_cache_bytes(model, 1, min(most, model.config.block_size), self.autocast, spare=self.count)
            for model in models
        )


class Speculation:
    """The text of one request, and what the two models have seen of it.

    Args:
        target: The model whose tokens are wanted.
        draft: The one that drafts; None for prompt lookup.
        sequence: The request on its way.
        count: How many tokens are drafted at a time.
        autocast: A dtype to compute in, if not that of the weights.
        pace: Whether drafting pays.
    """

    def __init__(
        self,
        target: GPT,
        draft: GPT | None,
        sequence: Sequence,
        count: int,
        autocast: torch.dtype | None,
        pace: DraftPace,
    ) -> None:
        self.sequence, self.count, self.pace = sequence, count, pace
        self.sampling, self.generator = sequence.request.sampling, sequence.generator
        self.ids = list(sequence.request.prompt)
        length = len(self.ids) + sequence.max_new_tokens
        self.target = RewindableModel(target, length, count, autocast)
        self.vocabulary = target.config.padded_vocab_size
        self.draft, self.draft_context = None, length
        if draft is not None:
            self.draft_context = draft.config.block_size
            self.draft = RewindableModel(draft, min(length, self.draft_context), count, autocast)
        self.lookup = PromptLookup()
        self.lookup.extend(self.ids)

    @property
    def is_paced(self) -> bool:
        """Whether it may pause. Where a draft model's tokens are drawn, it may not: these take random numbers too, and
        what comes must follow from the seed, not from the time that something took."""
        return self.draft is None or self.sampling.is_greedy

    def advance(self, drafts: bool = True) -> tuple[list[int], int]:
        """The next tokens of the text, and how many were drafted for that: none unless it `drafts`."""
        proposed, draft = self._proposals(self.count if drafts else 0)
        fresh = torch.tensor(self.ids[self.target.length :], device=self.target.device)
        logits = self.target(torch.cat((fresh, proposed)), proposed.numel() + 1)
        target = probabilities(logits, self.sampling)
        if draft is None:
            count, token = accept_equal(target, proposed, self.generator)
        else:
            count, token = accept(target, draft, proposed, self.generator)
        *tokens, token, count = torch.cat((proposed, token[None], count[None])).tolist()
        new = [*tokens[:count], token]
        for model in filter(None, (self.target, self.draft)):
            model.rewind(len(self.ids) + count)
        self.ids += new
        self.lookup.extend(new)
        return new, proposed.numel()

    def _proposals(self, most: int) -> tuple[Tensor, Tensor | None]:
        """(K,) tokens and (K, V) what they were drawn from, None where they were found; fewer than wanted where the
        room or the draft's context ends, none before the first token, which does not wait for the draft."""
        device = self.target.device
        count = min(most, self.sequence.max_new_tokens - self.sequence.num_generated - 1)
        count = min(count, self.draft_context - len(self.ids) + 1) if self.sequence.num_generated else 0
        if self.draft is None:
            found = self.lookup.propose(count) if count > 0 else []
            return torch.tensor(found, dtype=torch.int64, device=device), None
        if count < 1:
            return torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, self.vocabulary, device=device)
        tokens, rows = [], []
        known = self.draft.model.config.padded_vocab_size - 1  # the target may, if hardly ever, say one of its padding
        fed = torch.tensor(self.ids[self.draft.length :], device=device).clamp(max=known)
        for _ in range(count):
            row = probabilities(self._fitted(self.draft(fed, 1)), self.sampling)  # (1, V)
            fed = draw(row.log(), [self.generator])
            rows.append(row)
            tokens.append(fed)
        return torch.cat(tokens), torch.cat(rows)

    def _fitted(self, logits: Tensor) -> Tensor:
        """The draft's logits on the target's vocabulary: models of one family pad theirs differently."""
        short = self.vocabulary - logits.size(-1)
        return torch.nn.functional.pad(logits, (0, short), value=float("-inf"))  # a negative number cuts off
