"""Micro-batches in an order that a resumed run continues exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from litgpt.model import starts_of_documents
from litgpt.training.loss import IGNORE_INDEX

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
        # From pinned memory the copy runs beside the computation.
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
                    "--model_config.padded_vocab_size."
                )
        return self

    def without_targets(self) -> MicroBatch:
        """The same with nothing to predict: adds nothing to any sum."""
        return self._replace(targets=torch.full_like(self.targets, IGNORE_INDEX))

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


class BatchStream:
    """An endless stream of this rank's micro-batches, with a position that can be saved.

    A loader whose batch sampler has `set_position` (see `litgpt.data.stream_loader`) starts at once at any position,
    counted in samples over all ranks; `samples_per_epoch` and `order`, what decides which sample a position means, are
    what it says. Any other loader is run through again
    every epoch, each rank taking every world_size-th batch; it resumes by skipping, exactly if its order follows from
    torch's seed alone.
    """

    def __init__(self, loader: Iterable, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0) -> None:
        self.loader = loader
        self.batch_size, self.rank, self.world_size, self.seed = batch_size, rank, world_size, seed
        self.position = 0  # in samples, over all ranks
        self._batches: Iterator[Any] | None = None
        self._sampler = getattr(loader, "batch_sampler", None)
        self._seekable = hasattr(self._sampler, "set_position")
        self.samples_per_epoch: int | None = self._count()
        self.order: str | None = getattr(self._sampler, "order", None)

    def _count(self) -> int | None:
        if self._seekable:
            return self._sampler.num_samples
        try:
            batches = len(self.loader)
        except TypeError:
            return None
        if batches < self.world_size:
            raise ValueError(
                f"The training data has {batches} batch(es) of {self.batch_size} for {self.world_size} device(s). "
                "Add data, or make --train.micro_batch_size smaller."
            )
        return batches // self.world_size * self.world_size * self.batch_size

    @property
    def epoch(self) -> float:
        """Passes over the data so far; 1.5 is the middle of the second."""
        return self.position / self.samples_per_epoch if self.samples_per_epoch else 0.0

    def seek(self, position: int) -> None:
        """Continue at a position that was saved."""
        self.position, self._batches = position, None

    def next(self) -> MicroBatch:
        """The next micro-batch of this rank."""
        if self._batches is None:
            self._batches = self._from_position() if self._seekable else self._by_skipping()
        batch = next(self._batches)
        self.position += self.batch_size * self.world_size
        return micro_batch(batch)

    def _from_position(self) -> Iterator[Any]:
        self._sampler.set_position(self.position, self.rank, self.world_size)
        # The loader draws a seed for its workers; the training's own random numbers must not depend on that.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)  # the CPU's alone: GPUs' are left as they are
            batches = iter(self.loader)
        return batches

    def _by_skipping(self) -> Iterator[Any]:
        skip, epoch = self.position // (self.batch_size * self.world_size), 0
        while True:
            given = 0
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self.seed + epoch)
                batches = iter(self.loader)
                first = list(islice(batches, 1))  # a shuffling sampler draws its seed only now
            mine: list[Any] = []
            for batch in chain(first, batches):
                mine.append(batch)
                if len(mine) < self.world_size:
                    continue
                batch, mine = mine[self.rank], []
                given += 1
                if skip:
                    skip -= 1
                else:
                    yield batch
            if not given:
                raise ValueError("The data module's train_dataloader() gives no batches.")
            epoch += 1
