"""The one generation engine: prompts in, token ids out as they come.

A prompt is read in chunks (prefill), then every step gives each row of the batch one token (decode). The rows stand at
different positions, and each stops on its own. Shapes: B rows, T tokens of a chunk, V the padded vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from litgpt.generation.sampling import Sampling, next_tokens
from litgpt.model import GPT, KVCache

CACHE_STEP = 128  # cache lengths are multiples of this, so that few distinct shapes occur
PREFILL_CHUNK = 1024  # tokens of a prompt that are read at a time


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


@dataclass(frozen=True)
class Output:
    """What one step gave one request."""

    request: int
    """Index of the request."""
    token_ids: list[int]
    """New tokens: usually one; none while they may be the beginning of a stop sequence, then several at once."""
    finish_reason: str | None = None
    """None while it goes on; "stop" at a stop sequence, "length" at max_new_tokens or the end of the context."""


class Engine:
    """Generates with one model.

    Args:
        model: in eval mode, on its device, in its dtype.
        prefill_chunk: how many tokens of the prompts are read at a time; bounds the memory of a long prompt.
        compile: compile the decode step with torch.compile. The first tokens wait for it.
        autocast: a dtype to compute in where the weights are kept in another (mixed precision).
        keep_prefix: keep the cache of a lone request, for the next one that begins with the same tokens, as in a chat.
    """

    def __init__(
        self,
        model: GPT,
        *,
        prefill_chunk: int = PREFILL_CHUNK,
        compile: bool = False,
        autocast: torch.dtype | None = None,
        keep_prefix: bool = False,
    ) -> None:
        self.model = model
        self.device = model.transformer["wte"].weight.device  # the head may have been replaced
        self.context = model.config.block_size
        self.prefill_chunk = prefill_chunk
        self.autocast = autocast
        self.compiles = compile
        self._forward: Callable[..., Tensor] = _compiled(model, self.device) if compile else model
        self._prefix = _Prefix() if keep_prefix else None

    def generate(self, requests: Sequence[Request]) -> Iterator[Output]:
        """Runs the requests as one batch and yields what comes, row by row in each step, until all are finished.

        Closing the iterator ends the generation.

        Raises:
            ValueError: a prompt is empty or leaves no room in the context.
        """
        rows = [_Row(request, self._room(request), self.device) for request in requests]
        if not rows:
            return
        cache, known = self._cache_for(rows)
        logits = self._prefill(rows, cache, known)  # (B, V)
        samplings, generators = [row.request.sampling for row in rows], [row.generator for row in rows]
        positions = torch.tensor([[len(row.request.prompt)] for row in rows], device=self.device)  # (B, 1)
        while True:
            tokens = self._sample(logits, samplings, generators)  # (B,)
            for index, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
                if row.finish_reason is None:
                    yield Output(index, row.take(token), row.finish_reason)
                    if row.finish_reason is not None:
                        positions[index] = -1
            if all(row.finish_reason is not None for row in rows):
                return
            logits = self._decode(tokens[:, None], positions, cache, rows)
            positions = torch.where(positions < 0, positions, positions + 1)

    def stream(self, request: Request) -> Iterator[int]:
        """The token ids of one request as they come."""
        for output in self.generate([request]):
            yield from output.token_ids

    def complete(self, requests: Sequence[Request]) -> list[list[int]]:
        """The token ids of each request, when all are finished."""
        results: list[list[int]] = [[] for _ in requests]
        for output in self.generate(requests):
            results[output.request] += output.token_ids
        return results

    # -- inside

    def _room(self, request: Request) -> int:
        """How many tokens the context leaves for the answer, at most max_new_tokens."""
        length = len(request.prompt)
        if request.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {request.max_new_tokens} is not possible: give 1 or more.")
        if length == 0:
            raise ValueError("The prompt is empty, and the tokenizer puts no token before it. Give it some text.")
        if length >= self.context:
            raise ValueError(
                f"The prompt has {length} tokens, and the model's context of {self.context} tokens must hold it and at "
                "least one new token. Shorten the prompt, or take a model with a longer context."
            )
        return min(request.max_new_tokens, self.context - length)

    def _cache_for(self, rows: list[_Row]) -> tuple[KVCache, int]:
        """A cache that holds the batch to its end, and how many tokens of a lone prompt it already knows."""
        longest = max(len(row.request.prompt) + row.room for row in rows)
        if self._prefix is not None and len(rows) == 1:
            known = self._prefix.find(rows[0].request.prompt, longest)
            if known:
                return self._prefix.cache, known
            longest *= 2  # the conversation goes on
        if self.compiles:  # another length compiles anew
            longest = max(1024, 1 << (longest - 1).bit_length())
        length = min(self.context, -(-longest // CACHE_STEP) * CACHE_STEP)
        cache = self.model.new_cache(len(rows), length, dtype=self.autocast)
        if self._prefix is not None and len(rows) == 1:
            self._prefix.begin(cache)
        return cache, 0

    @torch.inference_mode()
    def _prefill(self, rows: list[_Row], cache: KVCache, known: int) -> Tensor:
        """Reads the prompts from token `known` on; the (B, V) logits after each prompt's last token."""
        prompts = [row.request.prompt for row in rows]
        ends: list[Tensor] = [torch.empty(0)] * len(rows)  # (C,) hidden state of each prompt's last token
        for start in range(known, max(map(len, prompts)), self.prefill_chunk):
            chunks = [prompt[start : start + self.prefill_chunk] for prompt in prompts]
            width = max(map(len, chunks))
            idx = torch.tensor([[*chunk, *[0] * (width - len(chunk))] for chunk in chunks], device=self.device)
            counts = torch.tensor([[len(chunk)] for chunk in chunks], device=self.device)  # (B, 1)
            columns = torch.arange(width, device=self.device)
            # Where no row is padded the model needs no positions at the start, and takes its fastest attention kernel.
            plain = start == 0 and all(len(chunk) == width for chunk in chunks)
            positions = None if plain else torch.where(columns < counts, columns + start, -1)  # (B, T)
            with self._running(cache, start + width, rows, chunks):
                hidden = self.model.hidden_states(idx, positions, cache=cache)  # (B, T, C)
            for row, chunk in enumerate(chunks):
                if chunk and start + len(chunk) == len(prompts[row]):
                    ends[row] = hidden[row, len(chunk) - 1]
        with self._precision():
            return self.model.logits(torch.stack(ends))

    @torch.inference_mode()
    def _decode(self, tokens: Tensor, positions: Tensor, cache: KVCache, rows: list[_Row]) -> Tensor:
        """One token of each row, (B, 1), at its position, -1 where the row is finished -> (B, V) logits."""
        for row in rows:
            row.length += row.finish_reason is None
        with self._running(cache, max(row.length for row in rows), rows, [[row.last] for row in rows]):
            return self._forward(tokens, positions, cache=cache)[:, -1]

    @torch.inference_mode()
    def _sample(self, logits: Tensor, samplings: list[Sampling], generators: list[torch.Generator]) -> Tensor:
        return next_tokens(logits, samplings, generators)

    @contextlib.contextmanager
    def _running(self, cache: KVCache, length: int, rows: list[_Row], fed: list[Sequence[int]]) -> Iterator[None]:
        """A call of the model that makes the longest row `length` tokens long.

        Attention reads that much of the cache, rounded up; a compiled step reads all of it, to keep one shape.
        """
        whole = self.compiles or length > cache.max_length - CACHE_STEP
        cache.read_only(None if whole else -(-length // CACHE_STEP) * CACHE_STEP)
        keeps = self._prefix is not None and self._prefix.cache is cache
        try:
            with self._precision():
                yield
        except BaseException:  # KeyboardInterrupt too: some layers have stored their keys, others have not
            if keeps:
                self._prefix.forget()
            raise
        if keeps:
            self._prefix.tokens += fed[0]

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast)


class _Row:
    """A request on its way: its generator, and what it has produced."""

    def __init__(self, request: Request, room: int, device: torch.device) -> None:
        self.request = request
        self.room = room
        self.length = len(request.prompt)
        self.last = -1
        self.produced = 0
        self.pending: list[int] = []  # the beginning of what may become a stop sequence
        self.finish_reason: str | None = None
        self.generator = torch.Generator(device)
        seed = request.seed if request.seed is not None else int(torch.randint(2**62, ()))
        self.generator.manual_seed(seed)

    def take(self, token: int) -> list[int]:
        """Counts the next token in, and returns those that are certain to be part of the output."""
        self.last = token
        self.produced += 1
        self.pending.append(token)
        for stop in self.request.stops:
            if len(stop) and self.pending[-len(stop) :] == list(stop):
                self.finish_reason = "stop"
                return self._release(len(self.pending) - len(stop))
        if self.produced >= self.room:
            self.finish_reason = "length"
            return self._release(len(self.pending))
        return self._release(len(self.pending) - self._held_back())

    def _held_back(self) -> int:
        """Length of the longest end of `pending` that begins a stop sequence."""
        longest = max((len(stop) for stop in self.request.stops), default=0) - 1
        for length in range(min(longest, len(self.pending)), 0, -1):
            if any(list(stop[:length]) == self.pending[-length:] for stop in self.request.stops if len(stop) > length):
                return length
        return 0

    def _release(self, count: int) -> list[int]:
        released, self.pending = self.pending[:count], self.pending[count:]
        return released


class _Prefix:
    """The cache of the last lone request and the tokens it holds."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.cache: KVCache | None = None
        self.tokens: list[int] = []

    def begin(self, cache: KVCache) -> None:
        self.cache, self.tokens = cache, []

    def find(self, prompt: Sequence[int], length: int) -> int:
        """How many tokens of the prompt are known; the cache is then wound back to these. 0 where it cannot serve.

        The last token is always read anew: the answer begins with what the model says after it.
        """
        if self.cache is None or length > self.cache.max_length:
            return 0
        common = 0
        for known, wanted in zip(self.tokens, prompt[:-1], strict=False):
            if known != wanted:
                break
            common += 1
        return common if common and self._wind_back(common) else 0

    def _wind_back(self, length: int) -> bool:
        """Forgets the tokens from `length` on; False where a sliding window has dropped earlier ones for them."""
        rings = self.cache.rings.values()
        if len(self.tokens) > length and any(len(self.tokens) > ring.length for ring in rings):
            return False
        for ring in rings:
            ring.positions.masked_fill_(ring.positions >= length, -1)
        del self.tokens[length:]
        return True


def _compiled(model: GPT, device: torch.device) -> Callable[..., Tensor]:
    """The model's forward for decoding; on a GPU as a graph, because launching kernels one by one takes longest."""
    if device.type == "cpu":
        return torch.compile(model, dynamic=False)
    return torch.compile(model, dynamic=False, mode="reduce-overhead")
