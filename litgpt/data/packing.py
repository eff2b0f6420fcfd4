"""Samples into rows, rows into batches: one sample per row, padded, or several, packed."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from litgpt.data.sample_file import SampleFile
from litgpt.model import IGNORE_INDEX

NO_DOCUMENT = -1  # document id and position of padding
PADDING_ID = 0  # any id will do: nothing attends to it, and it is never a target


class PackedSample(NamedTuple):
    """One sample in a row."""

    sample: int
    ids: np.ndarray
    targets: np.ndarray


class RowTable(Protocol):
    """The numbers of the samples in each row."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Iterable[int]: ...


class Rows(Dataset):
    """Samples as rows.

    Args:
        samples: The samples.
        rows: The numbers of the samples in each row.
    """

    def __init__(self, samples: SampleFile, rows: RowTable) -> None:
        self.samples = samples
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[PackedSample]:
        return [PackedSample(sample, *self.samples.tokens_of(sample)) for sample in self.rows[index]]


def pack(lengths: np.ndarray, capacity: int, seed: int) -> list[list[int]]:
    """Samples into as few rows as it goes: best-fit decreasing, each sample into the row that it fills most.

    The rows are the same in every epoch (only their order is new), so that an epoch is all samples once, exactly, and a
    run resumes by counting rows. Which samples of one length come together is random.

    Args:
        lengths: Tokens of each sample.
        capacity: Tokens of a row; no sample is longer.
        seed: Decides which samples of one length come together.

    Returns:
        The numbers of the samples in each row.
    """
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # free tokens -> rows
    sizes: list[int] = []  # the keys of with_room, ascending
    for sample in map(int, order):
        length = int(lengths[sample])
        place = bisect_left(sizes, length)
        if place < len(sizes):
            room = sizes[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], sizes[place]
            rows[row].append(sample)
        else:
            room, row = capacity, len(rows)
            rows.append([sample])
        left = room - length
        if left not in with_room:
            with_room[left] = []
            insort(sizes, left)
        with_room[left].append(row)
    return rows


class Collate:
    """Rows into a batch of int64 tensors (B, T + 1), with T the same for all rows of a batch.

    `input_ids` and `labels` (in place, -100 where nothing is to be predicted); of packed rows also `document_ids`
    and `positions`, which begin anew with each sample and are -1 on padding. Beside them, not for the model:
    `num_tokens` (B,), the tokens that are no padding, and `samples` (B, D), the numbers of the samples, -1 for none.

    Args:
        packed: Whether rows may hold several samples.
        multiple: T is padded to a multiple of this.
        longest: ... but never beyond this.
    """

    def __init__(self, packed: bool, multiple: int = 1, longest: int | None = None) -> None:
        self.packed, self.multiple, self.longest = packed, multiple, longest

    def __call__(self, rows: list[list[PackedSample]]) -> dict[str, Tensor]:
        sizes = [sum(len(part.ids) for part in row) for row in rows]
        shape = (len(rows), self._width(max(sizes)))
        batch = {"input_ids": np.full(shape, PADDING_ID), "labels": np.full(shape, IGNORE_INDEX)}
        if self.packed:
            batch |= {name: np.full(shape, NO_DOCUMENT) for name in ("document_ids", "positions")}
        batch["samples"] = np.full((len(rows), max(map(len, rows))), -1)
        for number, row in enumerate(rows):
            batch["samples"][number, : len(row)] = [part.sample for part in row]
            start = 0
            for document, part in enumerate(row):
                place = (number, slice(start, start + len(part.ids)))
                batch["input_ids"][place] = part.ids
                batch["labels"][place] = np.where(part.targets, part.ids, IGNORE_INDEX)
                if self.packed:
                    batch["document_ids"][place] = document
                    batch["positions"][place] = np.arange(len(part.ids))
                start += len(part.ids)
        batch["num_tokens"] = np.array(sizes)
        return {name: torch.from_numpy(values.astype(np.int64, copy=False)) for name, values in batch.items()}

    def _width(self, tokens: int) -> int:
        """T + 1 for rows of up to this many tokens."""
        if self.packed and self.longest is not None:  # all but the last rows are full: one shape for all
            return max(self.longest, tokens - 1) + 1
        inputs = -(-max(tokens - 1, 1) // self.multiple) * self.multiple
        if self.longest is not None:
            inputs = min(inputs, max(self.longest, tokens - 1))
        return inputs + 1
