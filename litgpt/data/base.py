"""What a data module is, and the batches' order that survives a restart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from litgpt.cli.secret import is_secret
from litgpt.data.order import ORDER_VERSION, KeyedPermutation
from litgpt.devices.accelerator import usable_cores

if TYPE_CHECKING:
    from litgpt.tokenizer.tokenizer import Tokenizer


class DataModule:
    """Where training and validation batches come from. Subclass it for data of your own.

    A command calls, in this order: `connect` (in every process), `prepare_data` (in one process of each node: download,
    tokenise), `setup` (in every process), `train_dataloader` and `val_dataloader`.

    A batch is either an int64 tensor (B, T + 1) of tokens, or a dict of int64 tensors (B, T) with `input_ids` and
    `labels` (-100: no loss), and `document_ids` where sequences are packed. Any torch `DataLoader` will do; one made by
    `stream_loader` also resumes at once at any position, with any number of workers and ranks.
    """

    def connect(
        self, tokenizer: Tokenizer | None = None, batch_size: int = 1, max_seq_length: int | None = None
    ) -> None:
        """Take what is known only once the model and the training settings are.

        Args:
            tokenizer: Tokenizer of the model; None where the run has none.
            batch_size: Sequences per batch on one device.
            max_seq_length: Longest sequence, in tokens, to train on.
        """

    def prepare_data(self) -> None:
        """Download or convert what is needed; runs in one process per node."""

    def setup(self, stage: str = "") -> None:
        """Open the data; runs in every process."""

    def train_dataloader(self) -> DataLoader:
        """Batches to train on."""
        raise TypeError(f"{type(self).__name__} has no train_dataloader(): a data module must define it.")

    def val_dataloader(self) -> DataLoader | list:
        """Batches to validate on; an empty list where there are none."""
        return []

    def tokenizer_dir(self) -> Path | None:
        """The tokenizer that goes with the data, where it is tokenised already; called before anything else."""
        return None

    @classmethod
    def choose(cls, settings: dict[str, Any], choices: Sequence[str]) -> str | None:
        """Which of some classes is meant by settings that all of them take; None where that cannot be told."""
        from litgpt.data.detection import module_for

        return module_for(settings, choices)

    @classmethod
    def option_for(cls, name: str) -> str | None:
        """The options that somebody means who gave the name of a file, or the like, in place of a class's name."""
        from litgpt.data.detection import option_for

        return option_for(name)

    def training_texts(self) -> Iterator[str] | None:
        """The raw training text, piece by piece, for training a tokenizer on it; None where there is no text."""
        return None

    def describe(self) -> str:
        """A line to print once the data is set up."""
        return f"Data: {self!r}"

    def content(self) -> dict[str, str]:
        """Words for the data of `train` and of `val`, once it is set up: the same where their samples are the same.

        A run is resumed on the same data alone. Where nothing is said here, only the order of samples is compared.
        """
        return {}

    def settings(self) -> dict[str, Any]:
        """The options that this module was made with, as plain values, without secrets."""
        public = {k: v for k, v in vars(self).items() if not k.startswith("_") and not is_secret(k, v)}
        return {k: str(v) if isinstance(v, Path) else v for k, v in public.items()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.settings().items())})"


class StreamSampler(Sampler[list[int]]):
    """Batches of sample numbers without end: every epoch all samples once, in an order of its own.

    Everything follows from `position`, the number of samples that all ranks together have been given since the run
    began. So a run resumes exactly, and which samples an optimizer step sees depends neither on the number of ranks
    nor on the micro-batch size. No batch straddles two epochs: the last batches of one hold what is left of it, and a
    rank for which nothing is left gets one of the samples that another rank has, to pass over (`BatchStream` takes its
    targets away). Neither memory nor time grows with the number of samples.

    Args:
        num_samples: Samples in one epoch.
        batch_size: Samples per batch on one rank.
        shuffle: Whether each epoch has a new order; otherwise all have the natural one.
        seed: Decides the orders.
    """

    def __init__(self, num_samples: int, batch_size: int, *, shuffle: bool = True, seed: int = 42) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank, self.world_size, self.position = 0, 1, 0
        self.end: int | None = None
        self._epoch, self._permutation = 0, KeyedPermutation(num_samples, seed, 0)

    @property
    def order(self) -> str:
        """What decides the order: a position that was saved means the same sample where this is the same."""
        shuffled = f"shuffled by seed {self.seed} (version {ORDER_VERSION})" if self.shuffle else "unshuffled"
        return f"{self.num_samples} samples {shuffled}"

    def set_position(self, position: int, rank: int = 0, world_size: int = 1, end: int | None = None) -> None:
        """Start the next iteration at `position`, give only `rank`'s share of each batch of all ranks, and nothing from
        the position `end` on."""
        self.position, self.rank, self.world_size, self.end = position, rank, world_size, end

    def stop(self, position: int) -> int:
        """Up to where samples may go together with the one at `position`: the end of its epoch, or of the run."""
        epoch_end = position - position % self.num_samples + self.num_samples
        return epoch_end if self.end is None else min(epoch_end, self.end)

    def __iter__(self) -> Iterator[list[int]]:
        position, first = self.position, self.rank * self.batch_size
        while self.end is None or position < self.end:
            together = range(position, min(position + self.batch_size * self.world_size, self.stop(position)))
            own = together[first : first + self.batch_size] or together[:1]
            yield [self._sample(place) for place in own]
            position = together.stop

    def _sample(self, position: int) -> int:
        epoch, place = divmod(position, self.num_samples)
        if not self.shuffle:
            return place
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, KeyedPermutation(self.num_samples, self.seed, epoch)
        return self._permutation[place]


class LengthGroupedSampler(StreamSampler):
    """The same samples in every optimizer step as with `StreamSampler`; within a step, the longest first.

    So a batch holds samples of similar length, and little padding, while what a step learns from stays as random as
    it was, and depends on neither the number of ranks nor the micro-batch size. (Grouping over more than one step would
    save more padding, but each step would then see samples of one length only.)

    Args:
        lengths: Of each sample.
        samples_per_step: Samples of one optimizer step, over all ranks.
    """

    def __init__(
        self, lengths: Sequence[int] | np.ndarray, batch_size: int, samples_per_step: int, *, seed: int = 42
    ) -> None:
        super().__init__(len(lengths), batch_size, seed=seed)
        self.lengths, self.samples_per_step = lengths, samples_per_step
        self._step, self._step_samples = range(0), list[int]()

    @property
    def order(self) -> str:
        return f"{super().order}, grouped by length in steps of {self.samples_per_step} within each epoch"

    def _sample(self, position: int) -> int:
        # Steps begin where the iteration or an epoch does; the last one of either holds what is left.
        begin = max(self.position, position - position % self.num_samples)
        first = position - (position - begin) % self.samples_per_step
        step = range(first, min(first + self.samples_per_step, self.stop(first)))
        if step != self._step:
            samples = [super(LengthGroupedSampler, self)._sample(place) for place in step]
            self._step, self._step_samples = step, sorted(samples, key=lambda sample: -int(self.lengths[sample]))
        return self._step_samples[position - first]


class Samples(Protocol):
    """What `stream_loader` asks of data: how many samples there are, and each of them by its number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def stream_loader(
    dataset: Samples,
    batch_size: int,
    *,
    seed: int,
    num_workers: int = 0,
    shuffle: bool = True,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    sampler: StreamSampler | None = None,
) -> DataLoader:
    """A loader without end over `dataset` in the order of `sampler`, by default a `StreamSampler`, with at most one
    worker per CPU core."""
    sampler = sampler or StreamSampler(len(dataset), batch_size, shuffle=shuffle, seed=seed)
    return DataLoader(
        cast("Dataset[Any]", dataset),  # torch declares its own class, and asks for no more than this
        batch_sampler=sampler,
        num_workers=min(num_workers, usable_cores()),
        collate_fn=collate_fn,
        pin_memory=torch.cuda.is_available(),
    )
