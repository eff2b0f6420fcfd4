"""Micro-batches in an order that a resumed run continues exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from itertools import chain, islice
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from litgpt.model import IGNORE_INDEX, starts_of_documents
from litgpt.training.steps import samples_in

MANY = 16  # numbers to show at most
PER_TOKEN, PER_ROW = ("document_ids", "positions"), ("reference_log_probs",)  # inputs that a batch may have


class MicroBatch(NamedTuple):
    """What goes into one forward pass on one device."""

    idx: Tensor
    """(B, T) int64 token ids"""
    targets: Tensor
    """(B, T) int64, the id to predict at each place, -100 for none"""
    inputs: dict[str, Tensor]
    """More inputs of the model, each (B, T), and of the loss, each (B,)"""
    num_tokens: int
    """How many of the ids are followed by another: padding is not, nor is a row's end"""
    samples: Tensor | None = None
    """(B, D) int64 numbers of the samples in each row, -1 for none; None where they have no numbers"""

    @property
    def num_targets(self) -> int:
        """How many ids are to be predicted; counted where the batch lies, so call it before moving it to a device."""
        return int((self.targets != IGNORE_INDEX).sum())

    def to(self, device: torch.device) -> MicroBatch:
        inputs = dict(self.inputs)
        if "document_ids" in inputs and device.type != "cpu":  # counted here: there, it would have to be waited for
            starts = starts_of_documents(inputs.get("positions"), inputs["document_ids"])
            inputs |= {} if starts is None else {"document_starts": starts}
        # From pinned memory the copy overlaps with the computation.
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
        idx, targets = (tensor.to(device, non_blocking=True) for tensor in (self.idx, self.targets))
        return self._replace(idx=idx, targets=targets, inputs=inputs)

    def checked(self, num_embeddings: int) -> MicroBatch:
        """The same, once it is certain that all ids are among the rows of the model's embedding; on a GPU, one that is
        not would end the process without a word on the data.

        Raises:
            ValueError: Some are not.
        """
        for ids in (self.idx, self.targets):
            if int(ids.max()) >= num_embeddings or (ids is self.idx and int(ids.min()) < 0):
                wrong = int(ids.max() if int(ids.max()) >= num_embeddings else ids.min())
                raise ValueError(
                    f"The data holds the token id {wrong}, and the model's embedding has {num_embeddings} rows: the "
                    "text was tokenised for another vocabulary. Prepare it with the model's tokenizer, or set "
                    "`model_config.padded_vocab_size`."
                )
        return self

    def without_targets(self) -> MicroBatch:
        """The same with nothing to predict: adds nothing to any sum, and is counted nowhere."""
        samples = None if self.samples is None else torch.full_like(self.samples, -1)
        return self._replace(targets=torch.full_like(self.targets, IGNORE_INDEX), num_tokens=0, samples=samples)

    def described(self) -> str:
        """Which samples these are, in words."""
        if self.samples is not None:
            return f"training sample(s) {_listed(self.samples[self.samples >= 0].tolist())}"
        rows = "; ".join(_listed(row) for row in self.idx[:MANY, :8].tolist())
        return f"sequence(s) that begin with the tokens {rows}"


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:MANY])) + (", ..." if len(numbers) > MANY else "")


def micro_batch(batch: Tensor | dict[str, Tensor]) -> MicroBatch:
    """Read a loader's batch: tokens (B, T + 1), or a dict with `input_ids` and `labels` (B, T + 1), labels in place.

    In the dict, `document_ids` and `positions` are the model's, `reference_log_probs` (B,) the loss's. `num_tokens`
    (B,), the tokens of each row that are no padding, and `samples` (B, D), the samples' numbers, are for the record;
    anything else is left out.
    """
    if isinstance(batch, Tensor):
        return MicroBatch(batch[:, :-1].contiguous(), batch[:, 1:].contiguous(), {}, batch[:, 1:].numel())
    if not (isinstance(batch, dict) and "input_ids" in batch and "labels" in batch):
        what = f"a dict with {', '.join(batch)}" if isinstance(batch, dict) else type(batch).__name__
        raise ValueError(
            f"The data module's loader gave {what}. A batch must be an int64 tensor (B, T + 1), or a dict with "
            "input_ids and labels."
        )
    inputs = {k: batch[k][:, :-1].contiguous() for k in PER_TOKEN if k in batch}
    inputs |= {k: batch[k] for k in PER_ROW if k in batch}
    idx = batch["input_ids"][:, :-1].contiguous()
    # Not the end of a row, whether or not padding follows: the count is the same however rows are put into batches.
    num_tokens = int((batch["num_tokens"] - 1).clamp(min=0).sum()) if "num_tokens" in batch else idx.numel()
    return MicroBatch(idx, batch["labels"][:, 1:].contiguous(), inputs, num_tokens, batch.get("samples"))


class SeekableSampler(Protocol):
    """A batch sampler that starts at any position (see `litgpt.data.StreamSampler`)."""

    num_samples: int

    def set_position(self, position: int, rank: int, world_size: int, end: int | None) -> None: ...


class BatchStream:
    """A stream of this rank's micro-batches, with a position that can be saved: epoch after epoch, each of them all
    samples once.

    The last optimizer step of an epoch, and of the run where that ends within one, holds what is left of it. All ranks
    go through the same number of micro-batches, since a sharded model needs all of them for each forward pass: those
    for which nothing is left get one without targets.

    A loader whose batch sampler has `set_position` (see `litgpt.data.stream_loader`) starts at once at any position,
    counted in samples over all ranks; `samples_per_epoch` and `order`, what decides which sample a position means, are
    what it says. Any other loader is run through again every epoch, each rank taking every world_size-th batch, all
    batches being counted as full ones; it resumes by skipping, exactly if its order follows from torch's seed alone.
    The last step of an epoch is known only for a loader that has a length.

    Args:
        loader: The training batches, the same on every rank.
        batch_size: Samples in one of them.
        rank: This process's.
        world_size: Number of ranks.
        seed: Decides the order of a loader that draws it from torch.
        epochs: Passes after which the stream ends; None for one without end.
    """

    def __init__(
        self,
        loader: Iterable,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        epochs: float | None = None,
    ) -> None:
        self.loader = loader
        self.batch_size, self.rank, self.world_size, self.seed = batch_size, rank, world_size, seed
        self.position = 0  # in samples, over all ranks
        self._batches: Iterator[Any] | None = None
        sampler = getattr(loader, "batch_sampler", None)
        self._sampler: SeekableSampler | None = sampler if hasattr(sampler, "set_position") else None
        self.samples_per_epoch: int | None = self._count()
        self.end: int | None = None
        """The position at which the stream ends, where it does"""
        if epochs is not None and self.samples_per_epoch is not None:
            end = samples_in(epochs, self.samples_per_epoch)
            if self._sampler is None:
                end = -(-end // batch_size) * batch_size  # whole batches are all there is
            self.end = end
        self.order: str | None = getattr(sampler, "order", None)

    def _count(self) -> int | None:
        if self._sampler is not None:
            return self._sampler.num_samples
        if not isinstance(self.loader, Sized):
            return None
        try:
            batches = len(self.loader)
        except TypeError:  # a DataLoader over a stream has a length that cannot be asked for
            return None
        if not batches:
            raise ValueError("The training data is empty: the data module's train_dataloader() gives no batches.")
        return batches * self.batch_size

    @property
    def epoch(self) -> float:
        """Passes over the data so far; 1.5 is the middle of the second."""
        return self.position / self.samples_per_epoch if self.samples_per_epoch else 0.0

    @property
    def has_ended(self) -> bool:
        return self.end is not None and self.position >= self.end

    def seek(self, position: int) -> None:
        """Continue at a position that was saved."""
        self.position, self._batches = position, None

    def next_step(self, most: int) -> list[MicroBatch]:
        """This rank's micro-batches of the next optimizer step: `most`, fewer where an epoch or the stream ends, but as
        many as every other rank has."""
        batches = [self.next()]
        while len(batches) < most and not self._is_boundary():
            batches.append(self.next())
        return batches

    def next(self) -> MicroBatch:
        """The next micro-batch of this rank."""
        if self._batches is None:
            self._batches = self._by_skipping() if self._sampler is None else self._from_position(self._sampler)
        batch = micro_batch(next(self._batches))
        left = self._left()
        self.position += min(self.batch_size * self.world_size, left)
        return batch if self.rank * self.batch_size < left else batch.without_targets()

    def _left(self) -> int:
        """Samples from the position to the end of the epoch, or of the stream."""
        if self.samples_per_epoch is None:
            return self.batch_size * self.world_size
        left = self.samples_per_epoch - self.position % self.samples_per_epoch
        return left if self.end is None else min(left, self.end - self.position)

    def _is_boundary(self) -> bool:
        """Whether an epoch or the stream ends at the position."""
        return self.has_ended or (self.samples_per_epoch is not None and self.position % self.samples_per_epoch == 0)

    def _from_position(self, sampler: SeekableSampler) -> Iterator[Any]:
        sampler.set_position(self.position, self.rank, self.world_size, self.end)
        # The loader draws a seed for its workers; the training's own random numbers must not depend on that.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)  # the CPU's alone: GPUs' are left as they are
            batches = iter(self.loader)
        return batches

    def _by_skipping(self) -> Iterator[Any]:
        skip, epoch = self._groups_before(self.position), 0
        while True:
            given = 0
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self.seed + epoch)
                batches = iter(self.loader)
                first = list(islice(batches, 1))  # a shuffling sampler draws its seed only now
            together = chain(first, batches)
            while group := list(islice(together, self.world_size)):
                if len(group) < self.world_size and self.samples_per_epoch is None:
                    break  # nobody could say that an epoch ends here
                given += 1
                if skip:
                    skip -= 1
                else:
                    yield group[self.rank if self.rank < len(group) else 0]
            if not given:
                raise ValueError("The data module's train_dataloader() gives no batches.")
            epoch += 1

    def _groups_before(self, position: int) -> int:
        """How often each rank has been given a batch before a position."""
        together = self.batch_size * self.world_size
        if self.samples_per_epoch is None:
            return position // together
        epochs, place = divmod(position, self.samples_per_epoch)
        return epochs * -(-self.samples_per_epoch // together) + place // together
