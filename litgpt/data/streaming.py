"""Blocks of tokens out of chunks, wherever these lie, in an order that a position alone decides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from litgpt.data.base import StreamSampler
from litgpt.data.chunk_order import ChunkOrder, Mixture, Window
from litgpt.data.chunk_store import ChunkStore
from litgpt.data.document_marks import DocumentMarks
from litgpt.data.order import ORDER_VERSION

NEVER = -1


class DataError(ValueError):
    """Data that cannot be read. It leaves a loader's worker process as the one line that it is.

    The loader makes the error anew from a text with the worker's traceback and this line at its end.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip() or message)


class ChunkBlocks(Dataset):
    """Blocks of T + 1 tokens by their position in the order, from 0 on without end.

    Block i of a chunk holds its tokens i*T to i*T + T, so that every token of a chunk but its first is predicted once;
    what is left at a chunk's end (less than a block) is not used.

    Args:
        sources: Of each source, the folders whose chunks it has. Several sources are mixed.
        weights: Share of each source; None for as much as it has blocks.
        block_size: T, the tokens that go into the model.
        seed: Decides the order.
        marks: What tells documents apart, where attention is to be kept inside them.
        prefetches: Whether chunks that will be needed are fetched ahead.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[ChunkStore]],
        weights: Sequence[float | None],
        block_size: int,
        seed: int,
        marks: DocumentMarks | None = None,
        prefetches: bool = False,
    ) -> None:
        self.block_size, self.seed, self.marks, self.prefetches = block_size, seed, marks, prefetches
        self.chunks = [[(store, n) for store in stores for n in range(len(store.index.chunks))] for stores in sources]
        self.orders = [
            ChunkOrder([self._count(store.index.chunks[n].num_tokens) for store, n in chunks], seed)
            for chunks in self.chunks
        ]
        self.weights = [
            float(order.total) if weight is None else weight for weight, order in zip(weights, self.orders, strict=True)
        ]
        mixes = len(self.orders) > 1 and all(order.total for order in self.orders)
        self.mixture = Mixture(self.weights, seed) if mixes else None
        self.digests = [" ".join(store.digest[:12] for store in stores) for stores in sources]
        self._newest = [NEVER] * len(self.orders)

    def _count(self, tokens: int) -> int:
        return max(0, (tokens - 1) // self.block_size)

    def __len__(self) -> int:
        """Blocks of all sources together: one epoch."""
        return sum(order.total for order in self.orders)

    @property
    def order(self) -> str:
        """What decides the order: equal where the same positions mean the same samples."""
        parts = [
            f"{order.total} blocks of {self.block_size} tokens in chunks {digest}"
            + (f" with weight {weight:g}" if self.mixture else "")
            for order, digest, weight in zip(self.orders, self.digests, self.weights, strict=True)
        ]
        window = self.orders[0].window
        return f"{', '.join(parts)}; shuffled by seed {self.seed} in windows of {window} (version {ORDER_VERSION})"

    def __getitem__(self, index: int) -> Tensor | dict[str, Tensor]:
        """The block at the position `index`, int64 (T + 1,); where documents are isolated, see `DocumentMarks.isolate`.

        Raises:
            DataError: Its chunk is missing or damaged, or cannot be fetched.
        """
        source, place = self.mixture.draw(index) if self.mixture else (0, index)
        order = self.orders[source]
        chunk, block = order.place(place)
        store, number = self.chunks[source][chunk]
        try:
            ids = store.open(number)
        except (OSError, ValueError) as error:
            raise DataError(str(error)) from error
        if self.prefetches:
            self._prefetch(source, order.window_at(place))
        start = block * self.block_size
        tokens = torch.from_numpy(ids[start : start + self.block_size + 1].astype(np.int64))
        return tokens if self.marks is None else self.marks.isolate(tokens)

    def _prefetch(self, source: int, window: Window) -> None:
        """Where a new window begins, have the rest of its chunks and those of the next one fetched."""
        if window.number <= self._newest[source]:
            return
        self._newest[source] = window.number
        worker = get_worker_info()
        turn = worker.id if worker else 0  # each begins elsewhere, so that they fetch different chunks
        wanted = [*_turned(window.chunks, turn), *_turned(self.orders[source].window_after(window).chunks, turn)]
        stores = {id(store): store for store, _ in self.chunks[source]}
        for store in stores.values():
            store.prefetch([n for owner, n in map(self.chunks[source].__getitem__, wanted) if owner is store])


def _turned(chunks: list[int], turn: int) -> list[int]:
    turn %= len(chunks)
    return chunks[turn:] + chunks[:turn]


class PositionSampler(StreamSampler):
    """Endless batches of positions, for a data set that knows its own order."""

    def __init__(self, blocks: ChunkBlocks, batch_size: int) -> None:
        super().__init__(len(blocks), batch_size, shuffle=False)
        self._blocks_order = blocks.order

    @property
    def order(self) -> str:
        return self._blocks_order

    def _sample(self, position: int) -> int:
        return position
