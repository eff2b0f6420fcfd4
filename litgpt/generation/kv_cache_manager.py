"""The rows of the KV cache: which sequence has which, what each holds (the prefix cache), and how much memory all take.

A sequence has a slot: one row of the cache. What the slot holds stays when the sequence is finished, and the next one
that begins with the same tokens, as a conversation does, goes on from there.
"""

from __future__ import annotations

import itertools
from collections import abc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from litgpt.devices.memory import give_back
from litgpt.generation.sequence import Sequence
from litgpt.kv_cache import KVCache
from litgpt.model import GPT

CACHE_STEP = 128  # attention reads the cache in multiples of this, so that few distinct shapes occur
HEADROOM = (
    1024  # tokens of an answer that the cache has room for before it grows; few answers are as long as they may be
)
# Where each shape of the cache is compiled for, there are fewer of them.
COMPILED_STEP, COMPILED_HEADROOM = 1024, 4096
MIN_COPIED_PREFIX = 16  # a beginning that another slot holds is copied from this many tokens on


@dataclass(eq=False)
class Slot:
    """A row of the cache."""

    row: int
    tokens: list[int] = field(default_factory=list)
    """What the cache holds of it."""
    max_length: int = 0
    """How long its sequence may get."""
    released: int = -1
    """When its last sequence was finished; a larger number is later."""


class KVCacheManager:
    """Gives sequences their slots, and the cache as much memory as they need.

    Args:
        model: Whose keys and values are kept.
        context: The most tokens of a sequence.
        max_slots: How many sequences may have a slot at a time.
        cache_bytes: The most memory for keys and values.
        kept_bytes: How much of it is not given back when no sequence needs it any more.
        dtype: Of keys and values; None for that of the model.
        fixed_length: Whether the cache has room for the whole context from the start.
        compiled: Whether each shape of the cache is compiled for.
        before_resize: Called before the cache moves: nobody may hold on to its memory.

    Attributes:
        cache: The keys and values; None while there are none.
        slots: One for each row of the cache.
        may_shrink: Whether a sequence is finished that perhaps was the last to need so much memory.
    """

    def __init__(
        self,
        model: GPT,
        *,
        context: int,
        max_slots: int,
        cache_bytes: float,
        kept_bytes: float,
        dtype: torch.dtype | None,
        fixed_length: bool,
        compiled: bool,
        before_resize: Callable[[], None],
    ) -> None:
        self.model, self.context, self.dtype = model, context, dtype
        self.max_slots = max_slots
        self.cache_bytes, self.kept_bytes = cache_bytes, kept_bytes
        self.min_length = context if fixed_length else COMPILED_STEP if compiled else CACHE_STEP  # of a cache
        self.headroom = COMPILED_HEADROOM if compiled else HEADROOM
        self.cache: KVCache | None = None
        self.slots: list[Slot] = []
        self.may_shrink = False
        self._slot_of: dict[Sequence, Slot] = {}
        self._before_resize = before_resize
        self._clock = itertools.count()
        self._sizes: dict[tuple[int, int], int] = {}

    @property
    def num_running(self) -> int:
        """How many sequences have a slot."""
        return len(self._slot_of)

    @property
    def size(self) -> int:
        """Bytes of memory that the cache takes now."""
        return 0 if self.cache is None else self.num_bytes(self.cache.batch_size, self.cache.max_length)

    def num_bytes(self, rows: int, length: int) -> int:
        """Bytes of a cache of that shape."""
        if (rows, length) not in self._sizes:
            self._sizes[rows, length] = kv_cache_bytes(self.model, rows, length, self.dtype)
        return self._sizes[rows, length]

    # -- sequences in their slots

    def has(self, sequence: Sequence) -> bool:
        """Whether a sequence has a slot."""
        return sequence in self._slot_of

    def rows(self, sequences: Iterable[Sequence]) -> list[int]:
        """The rows of the cache that sequences have now."""
        return [self._slot_of[sequence].row for sequence in sequences]

    def allocate(self, sequence: Sequence, sources: dict[Sequence, Slot]) -> bool:
        """Give a sequence a slot, with as much of its prompt as is known; False where memory does not suffice yet.

        A sequence is let in where there is memory for all that it and the others may come to, so that each can be
        finished; the cache grows as they do.

        Args:
            sequence: The one to let in.
            sources: What `prefix_sources` found for those who wait: idle slots that keep what they hold if possible.
                The sequence's own is taken out.
        """
        source, busy = sources.pop(sequence, None), self._busy()
        if source is not None and source not in busy:
            source.released = next(self._clock)  # used again: the last to go
        kept = set(sources.values()) - busy
        sequences = [*self._slot_of, sequence]
        longest = max(other.max_length for other in sequences)
        needed = self.num_bytes(len(sequences), min(self.context, round_up(longest)))
        if len(sequences) > 1 and needed > self.cache_bytes:
            return False
        self._resize(*self._shape_for(sequences, len(kept)))
        slot, num_cached = self._free_slot(sequence, kept)
        assert self.cache is not None
        self.cache.rewind(slot.row, num_cached)
        self.cache.lengths[slot.row] = sequence.max_length
        del slot.tokens[num_cached:]
        slot.max_length = sequence.max_length
        self._slot_of[sequence] = slot
        sequence.num_prefilled = sequence.num_cached = num_cached
        return True

    def append(self, sequence: Sequence, tokens: Iterable[int]) -> None:
        """Note what the cache holds more of a sequence, since the model has been called with it."""
        self._slot_of[sequence].tokens += tokens

    def free(self, sequence: Sequence) -> None:
        """Take a sequence's slot; what it holds stays."""
        self.may_shrink = True
        self._slot_of.pop(sequence).released = next(self._clock)

    def discard(self, sequence: Sequence) -> None:
        """Take a sequence's slot, of which nobody knows what it holds."""
        self._slot_of[sequence].tokens = []
        self.free(sequence)

    def _busy(self) -> set[Slot]:
        return set(self._slot_of.values())

    def _free_slot(self, sequence: Sequence, kept: set[Slot]) -> tuple[Slot, int]:
        """A free slot and how many tokens of the prompt it holds already; if possible none of those `kept`.

        The last token is always prefilled: the answer begins with what the model says after it.
        """
        source, known = self._longest_prefix(sequence)
        prefix = source.tokens[:known] if source is not None else []
        busy = self._busy()
        free = [slot for slot in self.slots if slot not in busy]
        if source is not None and known and source in free and (2 * known >= len(source.tokens) or len(free) == 1):
            return source, known
        rows = [slot.row for slot in busy]

        def span(slot: Slot) -> int:  # decoding runs all rows from the first busy one to the last
            return max([*rows, slot.row]) - min([*rows, slot.row])

        slot = min(free, key=lambda slot: (slot in kept, span(slot), slot.released))
        slot.tokens = []
        if self.cache is None or source is None or known < MIN_COPIED_PREFIX:
            return slot, 0
        self.cache.copy_row(source.row, slot.row, known)
        slot.tokens = prefix
        return slot, known

    # -- the prefix cache

    def prefix_sources(self, waiting: Iterable[Sequence]) -> dict[Sequence, Slot]:
        """The slots that hold the beginnings of prompts which are soon to be prefilled."""
        sources = {}
        for sequence in waiting:
            slot, known = self._longest_prefix(sequence)
            if slot is not None and known >= MIN_COPIED_PREFIX:
                sources[sequence] = slot
        return sources

    def prefix_is_coming(self, sequence: Sequence, prefilling: Iterable[Sequence]) -> bool:
        """Whether at least half of what a prompt needs is just being prefilled for another sequence."""
        request = sequence.request
        beginning = request.prompt[: request.num_reusable]
        known: int | None = None
        for other in prefilling:
            if known is None:
                _, known = self._longest_prefix(sequence)
            length = other.request.num_to_prefill
            gain = common_length(beginning, other.request.prompt[:length]) - known
            if 2 * gain >= request.num_to_prefill - known and gain >= MIN_COPIED_PREFIX:
                return self._can_share(self._slot_of[other], length, known + gain, sequence.max_length)
        return False

    def clear_prefix_cache(self) -> None:
        """Have new sequences prefill all of their prompts, whatever slots hold."""
        busy = self._busy()
        for slot in self.slots:
            slot.tokens = [-1] * len(slot.tokens) if slot in busy else []  # as no prompt begins

    def _longest_prefix(self, sequence: Sequence) -> tuple[Slot | None, int]:
        """The slot that can give most to a prompt, and how many tokens."""
        beginning = sequence.request.prompt[: sequence.request.num_reusable]
        known = ((slot, self._num_known(slot, beginning, sequence.max_length)) for slot in self.slots)
        return max(known, key=lambda pair: pair[1], default=(None, 0))

    def _num_known(self, slot: Slot, prompt: abc.Sequence[int], max_length: int) -> int:
        """How many of its first tokens a slot can give to a prompt."""
        known = common_length(slot.tokens, prompt)
        return known if known and self._can_share(slot, len(slot.tokens), known, max_length) else 0

    def _can_share(self, slot: Slot, held: int, known: int, max_length: int) -> bool:
        """Whether a slot that holds `held` tokens can give the first `known` to a sequence of `max_length`."""
        assert self.cache is not None
        if not self.cache.can_rewind(held, known):
            return False  # a sliding window has dropped earlier tokens for later ones
        adjustments = self.model.config.rope_adjustments
        if adjustments is not None and self.model.config.rope_kind == "longrope":
            limit = adjustments["original_max_seq_len"]  # short and long sequences are rotated differently
            return (slot.max_length > limit) == (max_length > limit)
        return True

    # -- memory

    def grow(self, length: int) -> None:
        """Make the cache longer where a sequence of `length` tokens has come to its end."""
        if self.cache is not None and length > self.cache.max_length:
            self._resize(*self._shape_for([*self._slot_of]))

    def shrink(self, waiting: bool) -> None:
        """Give memory back that no sequence needs, but for `kept_bytes`, and what is little of what they need.

        Args:
            waiting: Whether others are about to use it.
        """
        self.may_shrink = False
        size = self.size
        if size <= self.kept_bytes or waiting:
            return
        rows, longest = len(self._slot_of), max(map(self._num_needed_soon, self._slot_of), default=0)
        needed = self._rounded_shape(rows, longest)
        if size <= 2 * self.num_bytes(*needed):
            return
        most, shape = max(self.kept_bytes, self.num_bytes(*needed)), needed if self._slot_of else None
        busy = self._busy()
        idle = [slot for slot in self.slots if slot not in busy and slot.tokens]
        for slot in sorted(idle, key=lambda slot: -slot.released):
            rows, longest = rows + 1, max(longest, len(slot.tokens))
            if self.num_bytes(*self._rounded_shape(rows, longest)) > most:
                break
            shape = self._rounded_shape(rows, longest)
        if shape is not None:
            self._resize(*shape)
        else:
            self._before_resize()
            self.cache, self.slots = None, []
            give_back()

    def _num_needed_soon(self, sequence: Sequence) -> int:
        """How many tokens of a sequence the cache is to have room for now."""
        ahead = min(sequence.max_new_tokens, sequence.num_generated + self.headroom)
        return sequence.request.num_to_prefill + ahead

    def _shape_for(self, sequences: list[Sequence], num_kept: int = 0) -> tuple[int, int]:
        """How many rows of how many tokens the cache is to have for these sequences.

        Where there is memory, `num_kept` idle slots keep what they hold.
        """
        running, soon = len(sequences), max(map(self._num_needed_soon, sequences))
        held_rows, held_length = len(self.slots), self.cache.max_length if self.cache is not None else 0

        def rows(used: int) -> int:
            return min(power_of_two(used), self.max_slots)

        longest = min(self.context, power_of_two(max(soon, self.min_length)))
        # What is there already, and more of it where that takes hardly any memory: every slot keeps what it holds.
        wide = rows(running + num_kept) if running + num_kept > held_rows else held_rows, max(longest, held_length)
        if self.num_bytes(*wide) <= min(max(self.kept_bytes, self.size), self.cache_bytes):
            return wide
        # Beyond that, what sequences need; the idle slots' memory is for them.
        shapes = [
            (rows(running + num_kept), longest),
            (rows(running), longest),
            (running, min(self.context, round_up(soon))),
        ]
        fitting = (shape for shape in shapes if self.num_bytes(*shape) <= self.cache_bytes)
        # For one alone, the last resort: the device says whether it has the memory.
        return next(fitting, (running, soon))

    def _rounded_shape(self, rows: int, longest: int) -> tuple[int, int]:
        """Of a cache of at least this many rows and tokens: few distinct ones."""
        return (
            min(power_of_two(max(rows, 1)), self.max_slots),
            min(self.context, power_of_two(max(longest, self.min_length))),
        )

    def _resize(self, rows: int, length: int) -> None:
        """Give the cache a shape. Busy slots stay, and idle ones as far as there is room."""
        if self.cache is not None and (rows, length) == (self.cache.batch_size, self.cache.max_length):
            return
        self._before_resize()
        busy = self._busy()
        idle = [slot for slot in self.slots if slot not in busy and len(slot.tokens) <= length]
        idle = sorted(idle, key=lambda slot: -slot.released)[: rows - len(busy)]
        slots = sorted((*busy, *idle), key=lambda slot: slot.row)
        before = self.size
        try:
            if self.cache is None or not (busy or any(slot.tokens for slot in slots)):
                self.cache = None  # its memory is free before the next one's
                self.cache = self.model.new_cache(rows, length, dtype=self.dtype)
            else:
                self.cache.resize([slot.row for slot in slots], rows, length)
        except BaseException:  # too little memory: some layers have the new shape, others have not
            for sequence in [*self._slot_of]:
                self.free(sequence)
            self.cache, self.slots = None, []
            raise
        self.slots = slots + [Slot(-1) for _ in range(rows - len(slots))]
        for row, slot in enumerate(self.slots):
            slot.row = row
        if self.size < before:
            give_back()


def kv_cache_bytes(model: GPT, rows: int, length: int, dtype: torch.dtype | None, spare: int = 0) -> int:
    """Bytes of memory for the keys and values of `rows` sequences of up to `length` tokens; arguments as of
    `GPT.new_cache`."""
    cache = model.new_cache(rows, length, device="meta", dtype=dtype, spare=spare)
    return sum(tensor.numel() * tensor.itemsize for tensor in cache.tensors())


def limit_attention(cache: KVCache, length: int) -> None:
    """Have attention read no more of the cache than the longest row's `length` tokens, rounded up."""
    cache.read_only(None if length > cache.max_length - CACHE_STEP else round_up(length))


def round_up(length: int) -> int:
    """To the next multiple of what attention reads of the cache."""
    return -(-length // CACHE_STEP) * CACHE_STEP


def power_of_two(number: int) -> int:
    """The smallest that is at least so large."""
    return 1 << (number - 1).bit_length()


def common_length(a: abc.Sequence[int], b: abc.Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    limit = min(len(a), len(b))
    start = 0
    while start < limit and [*a[start : start + 64]] == [*b[start : start + 64]]:  # by 64: lists compare in C
        start += 64
    for index in range(start, min(start + 64, limit)):
        if a[index] != b[index]:
            return index
    return limit
