"""The one generation engine: prompts in, token ids out as they come.

Requests enter and leave at any step (continuous batching, https://www.usenix.org/conference/osdi22/presentation/yu).
Each has a slot: a row of the KV cache, at a position of its own. A step gives every running request one token (decode)
and reads one chunk of the prompts of those that came in (prefill). What a slot holds stays when its request is done,
and the next one that begins with the same tokens, as a conversation does, need not read them again.

Shapes: B rows, T tokens of a chunk, C the width of the model, V the padded vocabulary.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from litgpt.distributed import give_back, memory_free
from litgpt.generation.compiled import CompiledDecoder, decoder
from litgpt.generation.request import Output, Progress, Request, TokenLogprob
from litgpt.generation.sampling import Sampler
from litgpt.model import GPT, KVCache

__all__ = ["Engine", "Output", "Request", "share_memory"]

SLOTS = 32  # requests that run at a time
CACHE_STEP = 128  # attention reads the cache in multiples of this, so that few distinct shapes occur
AHEAD = 1024  # tokens of an answer that the cache has room for before it grows; few answers are as long as they may be
AHEAD_COMPILED = 4096  # the same where each shape is compiled
PREFILL_CHUNK = 1024  # tokens of prompts that are read in a step
MOST_PADDING = 0.25  # of the tokens of prompts that are read together
FREE_PADDING = 128  # tokens of padding that cost less than another call
# Of the memory that is left, for keys and values; the rest is for what a step computes. That of a CPU is not for one
# program alone.
CACHE_SHARE, CACHE_SHARE_ON_CPU = 0.9, 0.5
KEPT_BYTES = 256 * 2**20  # of keys and values that no request needs any more, and another may go on from
WORTH_COPYING = 16  # a beginning that another slot holds is copied from this many tokens on
SCORED_AT_ONCE = 256  # tokens of prompts whose logits are there at a time


class Engine:
    """Generates with one model. Not for several threads at a time: these share one through a `Worker`.

    Args:
        model: in eval mode, on its device, in its dtype.
        slots: how many requests run at a time; others wait. The cache grows up to that as it is needed.
        prefill_chunk: how many tokens of the prompts are read in a step; bounds the memory of a long prompt, and how
            long it holds up the requests that are running.
        compile: compile the decode step: on a CPU in the background, on a GPU the first tokens wait for it.
        autocast: a dtype to compute in where the weights are kept in another (mixed precision).
        cache_bytes: the most memory for keys and values; by default nine tenths of what the device has left, half of
            it on a CPU. Requests wait where it is not enough for all of them.
        kept_bytes: how much of it is not given back when no request needs it, so that a prompt that begins as an
            earlier one need not be read again; by default 256 MiB on a CPU, all of it on other devices.
        fixed_length: how many tokens prompt and answer may have together, at most the model's context. The cache has
            room for so many from the start, and does not grow.
    """

    def __init__(
        self,
        model: GPT,
        *,
        slots: int = SLOTS,
        prefill_chunk: int = PREFILL_CHUNK,
        compile: bool = False,
        autocast: torch.dtype | None = None,
        cache_bytes: float | None = None,
        kept_bytes: float | None = None,
        fixed_length: int | None = None,
    ) -> None:
        self.model = model
        self.device = model.transformer["wte"].weight.device  # the head may have been replaced
        self.context = min(fixed_length or math.inf, model.config.block_size)
        self._decoder: Callable[..., Tensor] = decoder(model) if compile else model
        # What torch.compile makes is for the shapes that it has seen.
        self._one_shape = compile and not isinstance(self._decoder, CompiledDecoder)
        self._hidden_states = model.hidden_states
        if isinstance(self._decoder, CompiledDecoder):
            self._hidden_states = self._decoder.hidden_states
            self._decoder.load(sorted({min(1 << power, slots) for power in range(slots.bit_length() + 1)}))
        self._shortest = self.context if fixed_length else 1024 if self._one_shape else CACHE_STEP  # of caches
        self._ahead = AHEAD_COMPILED if self._one_shape else AHEAD
        self.most_slots = slots
        self.prefill_chunk = prefill_chunk
        self.autocast = autocast
        self.compiles = compile
        self._numbers = itertools.count()
        self._waiting: deque[Progress] = deque()
        self._reading: deque[Slot] = deque()  # part of their prompt is not read yet
        self._writing: list[Slot] = []  # get a token each step
        self._slots: list[Slot] = []
        self._cache: KVCache | None = None
        self._sizes: dict[tuple[int, int], int] = {}
        self.cache_bytes = cache_bytes
        if cache_bytes is None:
            share_memory([self])
        # What others could use is given back. A new shape of the cache costs nothing there, either.
        shared = self.device.type == "cpu" and not fixed_length
        self.kept_bytes = kept_bytes if kept_bytes is not None else KEPT_BYTES if shared else math.inf
        self._may_shrink = False  # a request is done that perhaps was the last to need so much
        self._batch: Batch | None = None  # that of the last step

    # -- one by one

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._waiting or self._reading or self._writing or self._may_shrink)

    @property
    def running(self) -> int:
        """How many requests have a slot."""
        return sum(slot.progress is not None for slot in self._slots)  # true in the middle of a step, too

    @property
    def waiting(self) -> int:
        """How many requests have none yet."""
        return len(self._waiting)

    def submit(self, request: Request) -> int:
        """Queues a request, and returns the number that its outputs bear.

        Raises:
            ValueError: the prompt is empty or leaves no room in the context.
        """
        room = self.check(request)
        number = next(self._numbers)
        self._waiting.append(Progress(request, number, room, self.device, self.model.config.padded_vocab_size))
        return number

    def cancel(self, number: int) -> None:
        """Forgets a request, wherever it is; its slot is free at once."""
        for progress in self._waiting:
            if progress.number == number:
                self._waiting.remove(progress)
                return
        for slot in (*self._reading, *self._writing):
            if slot.progress.number == number:
                self._release(slot)
                return

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Gives every running request a token, and reads one chunk of the prompts of new ones.

        After an exception in the middle of it (Ctrl-C, too little memory) the requests that took part are gone.
        """
        self._admit()
        self._grow()
        outputs = self._write()
        outputs += self._read()
        if self._may_shrink:
            self._shrink()
        return outputs

    def forget(self) -> None:
        """Has new requests read all of their prompts, whatever slots hold."""
        for slot in self._slots:
            slot.tokens = [] if slot.progress is None else [-1] * len(slot.tokens)  # as no prompt begins

    # -- all at once

    def generate(self, requests: Sequence[Request]) -> Iterator[Output]:
        """Runs the requests and yields what comes, step by step, until all are finished.

        Closing the iterator ends the generation. Meanwhile nobody else may call `step`.

        Raises:
            ValueError: a prompt is empty or leaves no room in the context.
        """
        for request in requests:
            self.check(request)
        index_of = {self.submit(request): index for index, request in enumerate(requests)}
        try:
            while index_of:
                for output in self.step():
                    if output.request in index_of:
                        index = index_of[output.request]
                        if output.finish_reason is not None:
                            del index_of[output.request]
                        yield replace(output, request=index)
        finally:
            for number in index_of:
                self.cancel(number)

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

    # -- slots

    def check(self, request: Request) -> int:
        """How many tokens the context leaves for the answer, at most max_new_tokens. Safe from any thread.

        Raises:
            ValueError: the prompt is empty or leaves no room, or there is nothing to do.
        """
        length, scores = len(request.prompt), request.score_from is not None
        if request.max_new_tokens < (0 if scores else 1):
            raise ValueError(f"max_new_tokens {request.max_new_tokens} is not possible: give 1 or more.")
        if length == 0:
            raise ValueError("The prompt is empty, and the tokenizer puts no token before it. Give it some text.")
        if scores and not 0 < request.score_from < length:
            raise ValueError(
                f"score_from {request.score_from} is not possible with a prompt of {length} tokens: give 1 to "
                f"{length - 1}."
            )
        if request.max_new_tokens == 0:
            if request.num_to_read > self.context:
                raise ValueError(
                    f"The prompt has {length} tokens, and the model's context of {self.context} tokens must hold all "
                    "but the last. Shorten it, or take a model with a longer context."
                )
            return 0
        if length >= self.context:
            raise ValueError(
                f"The prompt has {length} tokens, and the model's context of {self.context} tokens must hold it and at "
                "least one new token. Shorten the prompt, or take a model with a longer context."
            )
        return min(request.max_new_tokens, self.context - length)

    def bytes_needed(self, length: int) -> int:
        """Memory for the keys and values of one request of so many tokens, answer included. Safe from any thread."""
        return self._size(1, min(self.context, _rounded(length)))

    @property
    def cache_size(self) -> int:
        """Bytes of memory that keys and values take now."""
        cache = self._cache
        return 0 if cache is None else self._size(cache.batch_size, cache.max_length)

    def _admit(self) -> None:
        """Gives slots to those who wait, in their order.

        One whose prompt begins as one that is just being read lets the next ones pass until that beginning is there to
        be copied; a slot is kept free for it.
        """
        delayed, sources = 0, self._sources()
        while delayed < len(self._waiting) and self.running + delayed < self.most_slots:
            progress = self._waiting[delayed]
            if self._is_being_read(progress):
                delayed += 1
                continue
            request = progress.request
            if (source := sources.pop(progress.number, None)) is not None and source.progress is None:
                source.released = next(self._numbers)  # used again: the last to go
            kept = {slot for slot in sources.values() if slot.progress is None}
            length = request.num_to_read + progress.room
            shape = self._shape_for(len(kept), progress)
            if shape is None:
                return
            self._resize(*shape)
            del self._waiting[delayed]
            slot, known = self._slot_for(request, length, kept)
            self._cache.rewind(slot.row, known)
            self._cache.lengths[slot.row] = length
            del slot.tokens[known:]
            slot.length, slot.progress = length, progress
            progress.read = progress.cached = known
            self._reading.append(slot)

    def _sources(self) -> dict[int, Slot]:
        """The slots that hold the beginnings of prompts which are soon to be read, by the number of the request."""
        sources = {}
        for progress in itertools.islice(self._waiting, self.most_slots):
            slot, known = self._longest_known(progress.request, progress.request.num_to_read + progress.room)
            if known >= WORTH_COPYING:
                sources[progress.number] = slot
        return sources

    def _is_being_read(self, progress: Progress) -> bool:
        """Whether at least half of what would have to be read of a prompt is just being read for another request."""
        if not self._reading:
            return False
        request, length = progress.request, progress.request.num_to_read + progress.room
        beginning = request.prompt[: request.num_reusable]
        _, known = self._longest_known(request, length)
        for slot in self._reading:
            other = slot.progress.request
            gain = common_length(beginning, other.prompt[: other.num_to_read]) - known
            if 2 * gain >= request.num_to_read - known and gain >= WORTH_COPYING:
                return self._can_share(slot, other.num_to_read, known + gain, length)
        return False

    def _grow(self) -> None:
        """Makes the cache longer where an answer has come to its end."""
        if self._writing and max(slot.progress.length for slot in self._writing) > self._cache.max_length:
            self._resize(*self._shape_for())

    def _soon(self, progress: Progress) -> int:
        """How many tokens of a request the cache is to have room for now."""
        return progress.request.num_to_read + min(progress.room, progress.produced + self._ahead)

    def _shape_for(self, kept: int = 0, new: Progress | None = None) -> tuple[int, int] | None:
        """How many slots of how many tokens the cache is to have for those that run and perhaps a new request.

        A request is let in where there is memory for all that it and the others may come to, so that each can be
        finished; the cache grows as they do. None where others have to end before. Where there is memory, so many idle
        slots besides keep what they hold.
        """
        slots = [slot for slot in self._slots if slot.progress is not None]
        requests = [slot.progress for slot in slots] + ([new] if new is not None else [])
        running, most = len(requests), self.most_slots
        whole = max(progress.request.num_to_read + progress.room for progress in requests)
        if running > 1 and self._size(running, min(self.context, _rounded(whole))) > self.cache_bytes:
            return None
        soon = max(map(self._soon, requests))
        held_rows, held_length = len(self._slots), self._cache.max_length if self._cache is not None else 0

        def rows(used: int) -> int:
            return min(_power_of_two(used), most)

        longest = min(self.context, _power_of_two(max(soon, self._shortest)))
        # What is there already, and more of it where that takes hardly any memory: everybody keeps what he holds.
        wide = rows(running + kept) if running + kept > held_rows else held_rows, max(longest, held_length)
        if self._size(*wide) <= min(max(self.kept_bytes, self.cache_size), self.cache_bytes):
            return wide
        # Beyond that, what requests need; the others' memory is for them.
        shapes = [
            (rows(running + kept), longest),
            (rows(running), longest),
            (running, min(self.context, _rounded(soon))),
        ]
        fitting = (shape for shape in shapes if self._size(*shape) <= self.cache_bytes)
        return next(
            fitting, (running, soon)
        )  # for one alone, the last resort: the device says whether it has the memory

    def _resize(self, rows: int, longest: int) -> None:
        """Gives the cache a shape. Busy slots stay, and idle ones as far as there is room."""
        if self._cache is not None and (rows, longest) == (self._cache.batch_size, self._cache.max_length):
            return
        self._batch = None
        busy = [slot for slot in self._slots if slot.progress is not None]
        idle = [slot for slot in self._slots if slot.progress is None and len(slot.tokens) <= longest]
        idle = sorted(idle, key=lambda slot: -slot.released)[: rows - len(busy)]
        slots = sorted((*busy, *idle), key=lambda slot: slot.row)
        before = self.cache_size
        try:
            if self._cache is None or not (busy or any(slot.tokens for slot in slots)):
                self._cache = None  # its memory is free before the next one's
                self._cache = self.model.new_cache(rows, longest, dtype=self.autocast)
            else:
                self._cache.resize([slot.row for slot in slots], rows, longest)
        except BaseException:  # too little memory: some layers have the new shape, others have not
            for slot in busy:
                self._release(slot)
            self._cache, self._slots = None, []
            raise
        self._slots = slots + [Slot(-1) for _ in range(rows - len(slots))]
        for row, slot in enumerate(self._slots):
            slot.row = row
        if self.cache_size < before:
            give_back()

    def _shrink(self) -> None:
        """Gives memory back that no request needs, but for `kept_bytes`, and what is little of what they need."""
        self._may_shrink = False
        size = self.cache_size
        if size <= self.kept_bytes or self._waiting:
            return
        busy = [slot for slot in self._slots if slot.progress is not None]
        rows, longest = len(busy), max((self._soon(slot.progress) for slot in busy), default=0)
        needed = self._shape(rows, longest)
        if size <= 2 * self._size(*needed):
            return
        most, shape = max(self.kept_bytes, self._size(*needed)), needed if busy else None
        idle = [slot for slot in self._slots if slot.progress is None and slot.tokens]
        for slot in sorted(idle, key=lambda slot: -slot.released):
            rows, longest = rows + 1, max(longest, len(slot.tokens))
            if self._size(*self._shape(rows, longest)) > most:
                break
            shape = self._shape(rows, longest)
        if shape is not None:
            self._resize(*shape)
        else:
            self._batch, self._cache, self._slots = None, None, []
            give_back()

    def _shape(self, rows: int, longest: int) -> tuple[int, int]:
        """Of a cache, of the few that there are."""
        return (
            min(_power_of_two(max(rows, 1)), self.most_slots),
            min(self.context, _power_of_two(max(longest, self._shortest))),
        )

    def _size(self, rows: int, length: int) -> int:
        """Bytes of a cache."""
        if (rows, length) not in self._sizes:
            cache = self.model.new_cache(rows, length, device="meta", dtype=self.autocast)
            self._sizes[rows, length] = sum(tensor.numel() * tensor.itemsize for tensor in cache.tensors())
        return self._sizes[rows, length]

    def _slot_for(self, request: Request, length: int, kept: set[Slot]) -> tuple[Slot, int]:
        """A free slot and how many tokens of the prompt it holds already; if possible none of those `kept`.

        The last token is always read anew: the answer begins with what the model says after it.
        """
        source, known = self._longest_known(request, length)
        free = [slot for slot in self._slots if slot.progress is None]
        if known and source in free and (2 * known >= len(source.tokens) or len(free) == 1):
            return source, known
        busy = [slot.row for slot in (*self._reading, *self._writing)]

        def span(slot: Slot) -> int:  # decoding runs all rows from the first busy one to the last
            return max([*busy, slot.row]) - min([*busy, slot.row])

        slot = min(free, key=lambda slot: (slot in kept, span(slot), slot.released))
        if known < WORTH_COPYING:
            slot.tokens = []
            return slot, 0
        self._cache.copy_row(source.row, slot.row, known)
        slot.tokens = source.tokens[:known]
        return slot, known

    def _longest_known(self, request: Request, length: int) -> tuple[Slot | None, int]:
        """The slot that can give most to a prompt, and how many tokens."""
        beginning = request.prompt[: request.num_reusable]
        known = ((slot, self._known(slot, beginning, length)) for slot in self._slots)
        return max(known, key=lambda pair: pair[1], default=(None, 0))

    def _known(self, slot: Slot, prompt: Sequence[int], length: int) -> int:
        """How many of its first tokens a slot can give to a prompt."""
        known = common_length(slot.tokens, prompt)
        return known if known and self._can_share(slot, len(slot.tokens), known, length) else 0

    def _can_share(self, slot: Slot, held: int, known: int, length: int) -> bool:
        """Whether a slot that holds so many tokens can give the first ones to a sequence of such a length."""
        if not self._cache.can_rewind(held, known):
            return False  # a sliding window has dropped earlier tokens for later ones
        if self.model.config.rope_kind == "longrope":  # short and long sequences are rotated differently
            limit = self.model.config.rope_adjustments["original_max_seq_len"]
            return (slot.length > limit) == (length > limit)
        return True

    def _release(self, slot: Slot) -> None:
        """Its request is done; what it holds stays."""
        self._may_shrink = True
        slot.progress = None
        slot.released = next(self._numbers)
        if slot in self._reading:
            self._reading.remove(slot)
        if slot in self._writing:
            self._writing.remove(slot)

    # -- the model

    def _read(self) -> list[Output]:
        """Reads one chunk of the prompts that are not read yet, and draws the first token of those that then are."""
        if not self._reading:
            return []
        slots = self._next_to_read()
        requests, starts = [slot.progress.request for slot in slots], [slot.progress.read for slot in slots]
        chunks = [
            list(request.prompt[start : min(start + self.prefill_chunk, request.num_to_read)])
            for request, start in zip(requests, starts, strict=True)
        ]
        width = max(map(len, chunks))
        idx = torch.tensor([[*chunk, *[0] * (width - len(chunk))] for chunk in chunks], device=self.device)
        # Where all prompts are whole and as long, the model needs no positions, and takes its fastest attention kernel.
        is_empty = not any(starts)
        positions = None
        if not is_empty or any(len(chunk) < width for chunk in chunks):
            places = ([*range(start, start + len(chunk))] for start, chunk in zip(starts, chunks, strict=True))
            positions = torch.tensor(
                [[*of_row, *[-1] * (width - len(of_row))] for of_row in places], device=self.device
            )
        rows = [slot.row for slot in slots]
        cache = self._cache.select(
            slice(rows[0], rows[0] + 1) if len(rows) == 1 else torch.tensor(rows, device=self.device), is_empty
        )
        with self._running(cache, max(starts) + width, slots, chunks):
            hidden = self._hidden_states(idx, positions, cache=cache)  # (B, T, C)
        self._score(hidden, slots, chunks)
        for slot, chunk in zip(slots, chunks, strict=True):
            slot.progress.read += len(chunk)
        done = [index for index, slot in enumerate(slots) if slot.progress.read == requests[index].num_to_read]
        self._reading.extend(slot for index, slot in enumerate(slots) if index not in done)
        outputs = []
        for slot in [slots[index] for index in done if not slots[index].progress.room]:
            outputs.append(slot.progress.finish_reading())
            self._release(slot)
        done = [index for index in done if slots[index].progress is not None]
        if not done:
            return outputs
        ends = torch.stack([hidden[index, len(chunks[index]) - 1] for index in done])  # (B', C)
        with self._precision():
            logits = self.model.logits(ends)
        ready = [slots[index] for index in done]
        self._writing += ready
        tokens, logprobs = self._draw(logits, ready, self._sampler(ready))
        return outputs + self._take(ready, tokens.tolist(), logprobs)

    def _score(self, hidden: Tensor, slots: list[Slot], chunks: list[list[int]]) -> None:
        """Notes the log-probabilities that requests ask for of tokens which come after these.

        Args:
            hidden: (B, T, C) what the model says after each token that was read.
            slots: The rows.
            chunks: What was read of them.
        """
        rows, columns, scored = [], [], []  # of the tokens that predict, and those that are predicted
        for row, (slot, chunk) in enumerate(zip(slots, chunks, strict=True)):
            request, start = slot.progress.request, slot.progress.read
            if request.score_from is None:
                continue
            first, end = max(start + 1, request.score_from), min(start + len(chunk) + 1, len(request.prompt))
            wanted = [(place, request.prompt[place]) for place in range(first, end)]
            if end == len(request.prompt):
                wanted += [(end - 1, token) for token in request.alternatives]
            for place, token in wanted:
                rows.append(row)
                columns.append(place - 1 - start)
                scored.append(token)
        count = max((slots[row].progress.request.logprobs or 0 for row in rows), default=0)
        for first in range(0, len(rows), SCORED_AT_ONCE):
            part = slice(first, first + SCORED_AT_ONCE)
            with self._precision():
                logits = self.model.logits(hidden[rows[part], columns[part]])  # (N, V)
            logprobs = _logprobs(logits.float(), torch.tensor(scored[part], device=self.device), count)
            for row, logprob in zip(rows[part], logprobs, strict=True):
                slots[row].progress.prompt_logprobs.append(logprob)

    def _next_to_read(self) -> list[Slot]:
        """Takes the first off the queue, and with it those whose next chunks fit into one call, padded to the longest:
        the most alike in length first, as long as not too much of the call is padding."""

        def width(slot: Slot) -> int:
            return min(self.prefill_chunk, slot.progress.request.num_to_read - slot.progress.read)

        first, *others = self._reading
        slots, widths = [first], [width(first)]
        for slot in sorted(others, key=lambda slot: abs(width(slot) - widths[0])):
            wider = [*widths, width(slot)]
            padded = max(wider) * len(wider)
            padding = padded - sum(wider)
            if padded <= self.prefill_chunk and padding <= max(FREE_PADDING, MOST_PADDING * padded):
                slots, widths = [*slots, slot], wider
        for slot in slots:
            self._reading.remove(slot)
        return slots

    def _write(self) -> list[Output]:
        """One more token for each request whose prompt is read."""
        if not self._writing:
            return []
        if self._batch is None or self._batch.numbers != [slot.progress.number for slot in self._writing]:
            self._batch = self._new_batch(list(self._writing))
        batch = self._batch
        longest = max(slot.progress.length for slot in batch.slots)
        with self._running(batch.cache, longest, batch.slots, [[slot.progress.last] for slot in batch.slots]):
            logits = self._decoder(batch.tokens, batch.positions, cache=batch.cache)[:, -1]  # (B, V)
        tokens, logprobs = self._draw(logits if batch.is_full else logits[batch.rows], batch.slots, batch.sampler)
        batch.tokens[batch.rows, 0] = tokens
        batch.positions[batch.rows, 0] += 1
        return self._take(batch.slots, tokens.tolist(), logprobs)

    def _new_batch(self, slots: list[Slot]) -> Batch:
        """The rows from the first of these slots to the last, their number a power of two: few distinct shapes."""
        first, last = min(slot.row for slot in slots), max(slot.row for slot in slots)
        count = min(_power_of_two(last - first + 1), len(self._slots))
        first = min(first, len(self._slots) - count)
        tokens, positions = torch.zeros(count, 1, dtype=torch.int64), torch.full((count, 1), -1)
        for slot in slots:
            tokens[slot.row - first] = slot.progress.last
            positions[slot.row - first] = slot.progress.length - 1
        return Batch(
            slots,
            self._cache.select(slice(first, first + count)),
            tokens.to(self.device),
            positions.to(self.device),
            torch.tensor([slot.row - first for slot in slots], device=self.device),
            self._sampler(slots),
        )

    def _sampler(self, slots: list[Slot]) -> Sampler:
        samplings = [slot.progress.request.sampling for slot in slots]
        return Sampler(samplings, [slot.progress.generator for slot in slots], self.device)

    def _draw(self, logits: Tensor, slots: list[Slot], sampler: Sampler) -> tuple[Tensor, list[TokenLogprob | None]]:
        """The next token of each slot, (B,) on the device, from (B, V) logits."""
        logits = logits.float()
        changed = logits
        if any(slot.progress.changes_logits for slot in slots):
            changed = torch.stack([slot.progress.changed(row) for slot, row in zip(slots, logits, strict=True)])
        tokens = sampler(changed)
        for slot, token in zip(slots, tokens, strict=True):
            slot.progress.note(token)
        counts = [slot.progress.request.logprobs for slot in slots]
        return tokens, [
            None if count is None else _logprobs(row[None], token[None], count)[0]
            for count, row, token in zip(counts, logits, tokens, strict=True)
        ]

    def _take(self, slots: list[Slot], tokens: list[int], logprobs: list[TokenLogprob | None]) -> list[Output]:
        outputs = []
        for slot, token, logprob in zip(list(slots), tokens, logprobs, strict=True):
            outputs.append(slot.progress.take(token, logprob))
            if outputs[-1].finish_reason is not None:
                self._release(slot)
        return outputs

    @contextlib.contextmanager
    def _running(self, cache: KVCache, length: int, slots: list[Slot], fed: list[list[int]]) -> Iterator[None]:
        """A call of the model that makes the longest row `length` tokens long, and feeds each slot some tokens.

        Attention reads that much of the cache, rounded up; all of it where there is to be one shape.
        """
        whole = self._one_shape or length > cache.max_length - CACHE_STEP
        cache.read_only(None if whole else -(-length // CACHE_STEP) * CACHE_STEP)
        try:
            with self._precision():
                yield
        except BaseException:  # KeyboardInterrupt too: some layers have stored their keys, others have not
            for slot in slots:
                slot.tokens = []
                self._release(slot)
            raise
        for slot, tokens in zip(slots, fed, strict=True):
            slot.tokens += tokens

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast)


@dataclass(eq=False)
class Slot:
    """A row of the cache."""

    row: int
    tokens: list[int] = field(default_factory=list)
    """What the cache holds of it."""
    progress: Progress | None = None
    """The request that has it."""
    length: int = 0
    """How long its sequence may get."""
    released: int = -1
    """When its last request was done; a larger number is later."""


@dataclass
class Batch:
    """The rows that one decode step runs, and what it needs of them on the device. It serves until others run."""

    slots: list[Slot]
    cache: KVCache
    tokens: Tensor
    """(B, 1) the last token of each row."""
    positions: Tensor
    """(B, 1) where it stands, -1 for rows between the slots that are idle."""
    rows: Tensor
    """(slots,) which of the rows are those of the slots."""
    sampler: Sampler

    def __post_init__(self) -> None:
        self.numbers = [slot.progress.number for slot in self.slots]
        self.is_full = self.rows.tolist() == list(range(self.tokens.size(0)))


def share_memory(engines: Sequence[Engine], total: float | None = None) -> None:
    """Gives each of some engines on one device an equal part of what it has left for keys and values, or of `total`
    bytes.

    Equal, not first come, first served: one engine's busy hour would leave the others without any.
    """
    if total is None:
        share = CACHE_SHARE_ON_CPU if engines[0].device.type == "cpu" else CACHE_SHARE
        total = share * (memory_free(engines[0].device) or math.inf)
    for engine in engines:
        engine.cache_bytes = total / len(engines)


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    limit = min(len(a), len(b))
    start = 0
    while start < limit and [*a[start : start + 64]] == [*b[start : start + 64]]:  # by 64: lists compare in C
        start += 64
    for index in range(start, min(start + 64, limit)):
        if a[index] != b[index]:
            return index
    return limit


def _rounded(length: int) -> int:
    """Up to where attention reads."""
    return -(-length // CACHE_STEP) * CACHE_STEP


def _power_of_two(number: int) -> int:
    """The smallest that is at least so large."""
    return 1 << (number - 1).bit_length()


def _logprobs(logits: Tensor, tokens: Tensor, count: int) -> list[TokenLogprob]:
    """What to tell of (N,) tokens where the (N, V) logits stood, and of the so many likeliest in their places."""
    # Not `logsumexp`, though that is nearer to the truth: on a CPU the sums of `log_softmax` are 1e-5 off for each
    # token, all to one side, and figures are compared with those of others, who use it.
    logprobs = logits.log_softmax(dim=-1)
    # A maximum takes a fraction of the time of a selection.
    values, ids = logprobs.max(dim=-1, keepdim=True) if count == 1 else logprobs.topk(count)
    chosen = logprobs.gather(1, tokens[:, None])[:, 0]
    likeliest = zip(ids.tolist(), values.tolist(), strict=True)
    return [
        TokenLogprob(token, logprob, list(zip(*pair, strict=True)))
        for token, logprob, pair in zip(tokens.tolist(), chosen.tolist(), likeliest, strict=True)
    ]
