"""The validation loss, the same whatever the number of devices."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import nn

from litgpt.training.batches import MicroBatch, micro_batch

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@torch.no_grad()
def validate(fabric: Fabric, model: nn.Module, batches: Iterable, max_batches: int) -> float:
    """The loss per target token over the first `max_batches` of `batches`, shared out among the ranks.

    Args:
        fabric: The devices.
        model: A `NextTokenLoss`, set up by `fabric`.
        batches: The same on every rank; each takes its share.
        max_batches: How many batches to use over all ranks.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)  # loss, targets
    losses, targets = [], 0
    for batch in _share(map(micro_batch, islice(batches, max_batches)), fabric.global_rank, fabric.world_size):
        targets += batch.num_targets
        on_device = batch.to(fabric.device)
        losses.append(model(on_device.idx, on_device.targets, **on_device.inputs).float())
    if losses:
        total = torch.tensor([torch.stack(losses).cpu().double().sum().item(), targets], dtype=torch.float64)
    total = _sum_over_ranks(fabric, total)
    model.train(was_training)
    if total[1] == 0:
        raise ValueError(
            "The validation data holds no token to predict. Add validation data, or leave validation out with a larger "
            "--eval.interval and --eval.final_validation false."
        )
    return (total[0] / total[1]).item()


def _share(batches: Iterable[MicroBatch], rank: int, world_size: int) -> Iterable[MicroBatch]:
    """Every world_size-th batch from `rank` on. All ranks get equally many, since a sharded model needs all of them
    for each forward pass: a rank that has run out gets a batch without targets."""
    group: list[MicroBatch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == world_size:
            yield group[rank]
            group = []
    if group:
        yield group[rank] if rank < len(group) else group[0].without_targets()


def _sum_over_ranks(fabric: Fabric, values: torch.Tensor) -> torch.Tensor:
    if fabric.world_size == 1:
        return values
    # MPS has no float64; there is only ever one MPS device, so this is reached on cuda and cpu alone.
    return fabric.all_reduce(values.to(fabric.device), reduce_op="sum").cpu()
