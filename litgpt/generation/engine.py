"""The generation engine: prompts in, token ids out as they come. Here is its scheduler.

Requests enter and leave at any step (continuous batching, https://www.usenix.org/conference/osdi22/presentation/yu).
Each becomes a `Sequence` with a row of the KV cache, at a position of its own. A step gives every running sequence one
token (decode) and runs one chunk of the prompts of those that came in (prefill).

    Engine            which sequences run, and in which order: this file
    KVCacheManager    where their keys and values are, what is known of earlier prompts, how much memory all take
    ModelRunner       the calls of the model and the tokens drawn from its logits

Shapes: S sequences, T tokens of a chunk, C the width of the model.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import abc, deque
from collections.abc import Generator

import torch

from litgpt.devices.memory import memory_free
from litgpt.generation.interface import MAX_SLOTS, GenerationEngine
from litgpt.generation.kv_cache_manager import KVCacheManager, round_up
from litgpt.generation.model_runner import ModelRunner
from litgpt.generation.request import Output, Request, TokenLogprob
from litgpt.generation.sequence import Sequence
from litgpt.kv_cache import KVCache
from litgpt.model import GPT

__all__ = ["Engine", "Output", "Request", "share_memory"]

PREFILL_CHUNK = 1024  # tokens of prompts that are prefilled in a step
MAX_PADDING = 0.25  # of the tokens of prompts that are prefilled together
FREE_PADDING = 128  # tokens of padding that cost less than another call
# Of the memory that is left, for keys and values; the rest is for what a step computes. That of a CPU is not for one
# program alone.
CACHE_SHARE, CACHE_SHARE_ON_CPU = 0.9, 0.5
KEPT_BYTES = 256 * 2**20  # of keys and values that no request needs any more, and another may go on from


class Engine(GenerationEngine):
    """Answers many requests at a time. Not for several threads: these share one through a `Worker`.

    Args:
        model: In eval mode, on its device, in its dtype.
        max_slots: How many requests run at a time; others wait. The cache grows up to that as it is needed.
        prefill_chunk: How many tokens of the prompts are prefilled in a step; bounds the memory of a long prompt, and
            how long it holds up the requests that are running.
        compile: Compile the decode step: on a CPU in the background, on a GPU the first tokens wait for it.
        autocast: A dtype to compute in where the weights are kept in another (mixed precision).
        cache_bytes: The most memory for keys and values; by default nine tenths of what the device has left, half of
            it on a CPU. Requests wait where it is not enough for all of them.
        kept_bytes: How much of it is not given back when no request needs it, so that a prompt that begins as an
            earlier one need not be prefilled again; by default 256 MiB on a CPU, all of it on other devices.
        fixed_length: How many tokens prompt and answer may have together, at most the model's context. The cache has
            room for all of them from the start, and does not grow.
    """

    def __init__(
        self,
        model: GPT,
        *,
        max_slots: int = MAX_SLOTS,
        prefill_chunk: int = PREFILL_CHUNK,
        compile: bool = False,
        autocast: torch.dtype | None = None,
        cache_bytes: float | None = None,
        kept_bytes: float | None = None,
        fixed_length: int | None = None,
    ) -> None:
        context = min(fixed_length or model.config.block_size, model.config.block_size)
        super().__init__(model, context=context, autocast=autocast, compiles=compile)
        self.prefill_chunk = prefill_chunk
        # What others could use is given back. A new shape of the cache costs nothing there, either.
        shared = self.device.type == "cpu" and not fixed_length
        self.runner = self.make_runner(max_slots)
        self.cache_manager = KVCacheManager(
            model,
            context=context,
            max_slots=max_slots,
            cache_bytes=math.inf if cache_bytes is None else cache_bytes,
            kept_bytes=kept_bytes if kept_bytes is not None else KEPT_BYTES if shared else math.inf,
            dtype=autocast,
            fixed_length=bool(fixed_length),
            compiled=self.runner.has_one_shape,
            before_resize=self.runner.release_batch,
        )
        if cache_bytes is None:
            share_memory([self])
        self._numbers = itertools.count()
        self._waiting: deque[Sequence] = deque()
        self._prefilling: deque[Sequence] = deque()  # the model has not seen all of their prompt yet
        self._decoding: list[Sequence] = []  # get a token each step

    def make_runner(self, max_slots: int) -> ModelRunner:
        """What calls the model; an engine that shares a model with others has its own."""
        return ModelRunner(self.model, compile=self.compiles, autocast=self.autocast, max_slots=max_slots)

    # -- one by one

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._prefilling or self._decoding or self.cache_manager.may_shrink)

    @property
    def running(self) -> int:
        return self.cache_manager.num_running  # true in the middle of a step, too

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, request: Request) -> int:
        max_new_tokens, number = self.check(request), next(self._numbers)
        vocab_size = self.model.config.padded_vocab_size
        self._waiting.append(Sequence(request, number, max_new_tokens, self.device, vocab_size))
        return number

    def cancel(self, number: int) -> None:
        for sequence in self._waiting:
            if sequence.number == number:
                self._waiting.remove(sequence)
                return
        for sequence in (*self._prefilling, *self._decoding):
            if sequence.number == number:
                self._finish(sequence)
                return

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Give every running sequence a token, and prefill one chunk of the prompts of new ones.

        After an exception in the middle of it (Ctrl-C, too little memory) the requests that took part are gone.
        """
        try:
            self._admit()
            self._grow()
            outputs = self._decode()
            outputs += self._prefill()
            self._shrink()
        except BaseException:
            self._prefilling = deque(filter(self.cache_manager.has, self._prefilling))
            self._decoding = list(filter(self.cache_manager.has, self._decoding))
            raise
        return outputs

    def _admit(self) -> None:
        """Give slots to those who wait, in their order.

        One whose prompt begins as one that is just being prefilled lets the next ones pass until that beginning is
        there to be copied; a slot is kept free for it.
        """
        delayed, sources = 0, self.cache_manager.prefix_sources(itertools.islice(self._waiting, self.max_slots))
        while delayed < len(self._waiting) and self.running + delayed < self.max_slots:
            sequence = self._waiting[delayed]
            if self.cache_manager.prefix_is_coming(sequence, self._prefilling):
                delayed += 1
                continue
            if not self.cache_manager.allocate(sequence, sources):
                return  # others have to end before
            del self._waiting[delayed]
            self._prefilling.append(sequence)

    def _grow(self) -> None:
        """Make the cache longer where an answer has come to its end."""
        if self._decoding:
            self.cache_manager.grow(max(sequence.length for sequence in self._decoding))

    def _decode(self) -> list[Output]:
        """One more token for each sequence whose prompt is prefilled."""
        sequences = list(self._decoding)
        if not sequences:
            return []
        with self._discarding_on_error(sequences):
            tokens, logprobs = self.runner.decode(self._cache, sequences, self.cache_manager.rows(sequences))
        for sequence in sequences:
            self.cache_manager.append(sequence, [sequence.last_token])
        return self._take(sequences, tokens, logprobs)

    def _prefill(self) -> list[Output]:
        """Prefill one chunk of the prompts that are waiting for it, and draw the first token of those that then are
        whole."""
        if not self._prefilling:
            return []
        sequences = self._next_to_prefill()
        chunks, rows = list(map(self._next_chunk, sequences)), self.cache_manager.rows(sequences)
        with self._discarding_on_error(sequences):
            hidden = self.runner.prefill(self._cache, sequences, rows, chunks)  # (S, T, C)
            self.runner.score_prompts(hidden, sequences, chunks)
            for sequence, chunk in zip(sequences, chunks, strict=True):
                self.cache_manager.append(sequence, chunk)
                sequence.num_prefilled += len(chunk)
            scored = [sequence for sequence in sequences if sequence.is_prefilled and not sequence.max_new_tokens]
            begun = [sequence for sequence in sequences if sequence.is_prefilled and sequence.max_new_tokens]
            ends = {
                sequence: row[len(chunk) - 1] for sequence, row, chunk in zip(sequences, hidden, chunks, strict=True)
            }
            tokens, logprobs = self.runner.first_tokens([ends[sequence] for sequence in begun], begun)
        self._prefilling += [sequence for sequence in sequences if not sequence.is_prefilled]
        self._decoding += begun
        outputs = [
            Output(sequence.number, [], num_prefilled=sequence.num_prefilled)
            for sequence in sequences
            if sequence.request.reports_prefill and not sequence.is_prefilled
        ]
        for sequence in scored:
            outputs.append(sequence.finish_scoring())
            self._finish(sequence)
        return outputs + self._take(begun, tokens, logprobs)

    def _next_to_prefill(self) -> list[Sequence]:
        """Take the first off the queue, and with it those whose next chunks fit into one call, padded to the longest:
        the most alike in length first, as long as not too much of the call is padding."""

        def width(sequence: Sequence) -> int:
            return min(self.prefill_chunk, sequence.request.num_to_prefill - sequence.num_prefilled)

        first, *others = self._prefilling
        sequences, widths = [first], [width(first)]
        for sequence in sorted(others, key=lambda sequence: abs(width(sequence) - widths[0])):
            wider = [*widths, width(sequence)]
            padded = max(wider) * len(wider)
            padding = padded - sum(wider)
            if padded <= self.prefill_chunk and padding <= max(FREE_PADDING, MAX_PADDING * padded):
                sequences, widths = [*sequences, sequence], wider
        for sequence in sequences:
            self._prefilling.remove(sequence)
        return sequences

    def _next_chunk(self, sequence: Sequence) -> list[int]:
        """The tokens of the prompt that come next."""
        start, end = sequence.num_prefilled, sequence.request.num_to_prefill
        return list(sequence.request.prompt[start : min(start + self.prefill_chunk, end)])

    def _take(self, sequences: list[Sequence], tokens: list[int], logprobs: list[TokenLogprob | None]) -> list[Output]:
        """Give each sequence its next token; those that it ends are finished."""
        outputs = []
        for sequence, token, logprob in zip(sequences, tokens, logprobs, strict=True):
            outputs.append(sequence.append(token, logprob))
            if outputs[-1].finish_reason is not None:
                self._finish(sequence)
        return outputs

    def _shrink(self) -> None:
        """Give memory back that no sequence needs any more."""
        if self.cache_manager.may_shrink:
            self.cache_manager.shrink(waiting=bool(self._waiting))

    def _finish(self, sequence: Sequence) -> None:
        """Take a running sequence off its queue; its slot is free, and what that holds stays."""
        self.cache_manager.free(sequence)
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)
        if sequence in self._decoding:
            self._decoding.remove(sequence)

    @property
    def _cache(self) -> KVCache:
        assert self.cache_manager.cache is not None  # there is one as long as a sequence runs
        return self.cache_manager.cache

    @contextlib.contextmanager
    def _discarding_on_error(self, sequences: list[Sequence]) -> Generator[None, None, None]:
        """Within, these are in the middle of a call of the model."""
        try:
            yield
        except BaseException:  # KeyboardInterrupt too: some layers have stored their keys, others have not
            for sequence in sequences:
                self.cache_manager.discard(sequence)
            raise

    # -- slots and memory

    def prepare(self) -> None:
        self.runner.prepare()

    def clear_prefix_cache(self) -> None:
        self.cache_manager.clear_prefix_cache()

    @property
    def max_slots(self) -> int:
        """How many requests run at a time."""
        return self.cache_manager.max_slots

    @max_slots.setter
    def max_slots(self, slots: int) -> None:
        self.cache_manager.max_slots = slots

    @property
    def cache_bytes(self) -> float:
        """The most memory for keys and values."""
        return self.cache_manager.cache_bytes

    @cache_bytes.setter
    def cache_bytes(self, num_bytes: float) -> None:
        self.cache_manager.cache_bytes = num_bytes

    @property
    def kept_bytes(self) -> float:
        """How much of it is not given back when no request needs it."""
        return self.cache_manager.kept_bytes

    @kept_bytes.setter
    def kept_bytes(self, num_bytes: float) -> None:
        self.cache_manager.kept_bytes = num_bytes

    @property
    def cache_size(self) -> int:
        """Bytes of memory that keys and values take now."""
        return self.cache_manager.size

    def bytes_needed(self, length: int) -> int:
        """Memory for the keys and values of one request of `length` tokens, answer included. Safe from any thread."""
        return self.cache_manager.num_bytes(1, min(self.context, round_up(length)))


def share_memory(engines: abc.Sequence[GenerationEngine], total: float | None = None) -> None:
    """Give each of some engines on one device an equal part of what it has left for keys and values, or of `total`
    bytes.

    Equal, not first come, first served: one engine's busy hour would leave the others without any.
    """
    if total is None:
        share = CACHE_SHARE_ON_CPU if engines[0].device.type == "cpu" else CACHE_SHARE
        total = share * (memory_free(engines[0].device) or math.inf)
    for engine in engines:
        engine.cache_bytes = total / len(engines)
