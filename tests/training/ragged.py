"""Samples of very different lengths, some of them with few tokens to predict, as finetuning has them."""

from __future__ import annotations

import numpy as np
from torch.utils.data import DataLoader

from litgpt.data.base import DataModule, LengthGroupedSampler, stream_loader
from litgpt.data.packing import Collate, PackedSample, pack

LONGEST = 33


def ragged_samples(count: int, seed: int) -> list[PackedSample]:
    """Samples of 2 to 33 tokens below 250; of each, the first part is not to be predicted."""
    random = np.random.default_rng(seed)
    samples = []
    for number in range(count):
        ids = random.integers(0, 250, size=random.integers(2, LONGEST + 1))
        samples.append(PackedSample(number, ids, np.arange(len(ids)) > random.integers(0, len(ids) - 1)))
    return samples


class Ragged(DataModule):
    """Args:
    packed: Several samples in a row; else one, padded, batches grouped by length.
    count: Training samples.
    per_step: Of them in an optimizer step.
    """

    def __init__(self, packed: bool = False, count: int = 48, per_step: int = 8) -> None:
        self.packed, self.count, self.per_step = packed, count, per_step

    def connect(self, tokenizer=None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
        self._batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        rows = self._rows(self.count, seed=1)
        lengths = [sum(len(part.ids) for part in row) for row in rows]
        sampler = LengthGroupedSampler(lengths, self._batch_size, samples_per_step=self.per_step)
        return stream_loader(rows, self._batch_size, seed=42, collate_fn=Collate(self.packed), sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        # 9 samples alone, or in 5 rows: a number that neither batches nor ranks divide
        return DataLoader(self._rows(9, seed=2), self._batch_size, collate_fn=Collate(self.packed))

    def _rows(self, count: int, seed: int) -> list[list[PackedSample]]:
        samples = ragged_samples(count, seed)
        if not self.packed:
            return [[sample] for sample in samples]
        lengths = np.array([len(sample.ids) for sample in samples])
        return [[samples[i] for i in row] for row in pack(lengths, LONGEST, seed=0)]
