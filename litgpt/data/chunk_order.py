"""In which order the blocks of chunks are trained on: shuffled, yet chunk by chunk, and in mixtures. All of it follows
from seed and position, so that any process finds any place in it at once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from litgpt.data.order import KeyedPermutation

WINDOW = 8  # chunks whose blocks are mixed; by default 512 MB
CYCLE = 1024  # samples within which a mixture keeps to its weights
UNIT = 1 << 40  # shares of a mixture are whole numbers of 1 / UNIT, so that they add up exactly


class Place(NamedTuple):
    """A block of a chunk."""

    chunk: int
    block: int


@dataclass(frozen=True)
class Window:
    """Chunks whose blocks come mixed.

    Attributes:
        number: Which window it is, counted over all epochs.
        chunks: The numbers of its chunks.
        ends: How many blocks its first, first two, ... chunks have.
        permutation: Of its blocks.
    """

    number: int
    chunks: list[int]
    ends: list[int]
    permutation: KeyedPermutation

    def place(self, index: int) -> Place:
        """The block that comes as number `index` of the window."""
        block = self.permutation[index]
        which = bisect_right(self.ends, block)
        return Place(self.chunks[which], block - (self.ends[which - 1] if which else 0))


class ChunkOrder:
    """Every epoch all blocks once: the chunks in a new order, and within a window of some consecutive ones all blocks
    mixed. So a few chunks are in use at a time, and those to come are known.

    Args:
        num_blocks: Blocks of each chunk; a chunk without any is left out.
        seed: Decides the order.
        window: Chunks of a window.
    """

    def __init__(self, num_blocks: Sequence[int], seed: int, window: int = WINDOW) -> None:
        self.num_blocks = np.asarray(num_blocks, np.int64)
        self.seed, self.window = seed, window
        self.used = np.flatnonzero(self.num_blocks)
        self.total = int(self.num_blocks.sum())
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._window = lru_cache(maxsize=4)(self._make_window)

    def __reduce__(self) -> tuple:
        return ChunkOrder, (self.num_blocks, self.seed, self.window)

    @property
    def windows_per_epoch(self) -> int:
        return -(-len(self.used) // self.window)

    def place(self, position: int) -> Place:
        """The block at a position, counted from the first epoch on."""
        window, index = self._find(position)
        return window.place(index)

    def window_at(self, position: int) -> Window:
        """The window that a position falls into."""
        return self._find(position)[0]

    def window_after(self, window: Window) -> Window:
        """The one that follows it, in the next epoch after the last."""
        return self._window(*divmod(window.number + 1, self.windows_per_epoch))

    def _find(self, position: int) -> tuple[Window, int]:
        epoch, place = divmod(position, self.total)
        _, ends = self._epoch(epoch)
        number = bisect_right(ends, place)
        return self._window(epoch, number), place - (ends[number - 1] if number else 0)

    def _make_epoch(self, epoch: int) -> tuple[list[int], list[int]]:
        """The chunks in this epoch's order, and how many blocks there are up to the end of each window."""
        order = list(KeyedPermutation(len(self.used), self.seed, epoch))
        chunks = self.used[order]
        ends = [int(end) for end in np.cumsum(self.num_blocks[chunks])[self.window - 1 :: self.window]]
        return [int(chunk) for chunk in chunks], ends if ends and ends[-1] == self.total else [*ends, self.total]

    def _make_window(self, epoch: int, number: int) -> Window:
        chunks = self._epoch(epoch)[0][number * self.window : (number + 1) * self.window]
        ends = list(accumulate(int(self.num_blocks[chunk]) for chunk in chunks))
        permutation = KeyedPermutation(ends[-1], self.seed, epoch, number)
        return Window(epoch * self.windows_per_epoch + number, chunks, ends, permutation)


class Mixture:
    """From which source each sample comes, and which of that source's samples it is.

    Cycles of CYCLE samples (more where a weight is tiny) hold each source's share, rounded so that what all cycles so
    far hold is never more than one sample off; within a cycle the sources are mixed.

    Args:
        weights: Share of each source; they need not add up to 1.
        seed: Decides the order within the cycles.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        total = sum(weights)
        self.weights, self.seed = weights, seed
        self.cycle = max(CYCLE, *(int(4 * total / weight) + 1 for weight in weights))
        shares = [0, *(round(UNIT * ahead / total) for ahead in accumulate(weights))]
        self.shares = [*shares[:-1], UNIT]
        self._cycle = lru_cache(maxsize=2)(self._make_cycle)

    def __reduce__(self) -> tuple:
        return Mixture, (self.weights, self.seed)

    def draw(self, position: int) -> tuple[int, int]:
        """The number of the source of the sample at `position`, and the position of the sample in that source."""
        cycle, index = divmod(position, self.cycle)
        permutation, starts, given = self._cycle(cycle)
        place = permutation[index]
        source = bisect_right(starts, place) - 1
        return source, given[source] + place - starts[source]

    def _make_cycle(self, cycle: int) -> tuple[KeyedPermutation, list[int], list[int]]:
        """The order within a cycle, where each source's part of it starts, and what each has given before."""
        before, after = self._bounds(cycle), self._bounds(cycle + 1)
        starts = [b - a for a, b in zip(before, after, strict=True)]
        given = [b - a for a, b in pairwise(before)]
        return KeyedPermutation(self.cycle, self.seed, cycle), starts[:-1], given

    def _bounds(self, cycle: int) -> list[int]:
        """How many samples the first, first two, ... sources have given in this many cycles, after a 0."""
        return [(share * self.cycle * cycle + UNIT // 2) // UNIT for share in self.shares]
