"""The validation loss, the same whatever the number of devices."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from litgpt.parallel.ranks import all_reduce
from litgpt.training.batches import MicroBatch, micro_batch
from litgpt.training.loss import loss_module

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@torch.no_grad()
def validate(fabric: Fabric, model: nn.Module, batches: Iterable, max_batches: int) -> list[float]:
    """The loss and its further figures per term (target token) over the first `max_batches` of `batches`, shared out
    among the ranks.

    Args:
        fabric: The devices.
        model: A `LossModule`, set up by `fabric`.
        batches: The same on every rank; each takes its share.
        max_batches: How many batches to use over all ranks.
    """
    was_training = model.training
    model.eval()
    loss = loss_module(model)
    total = torch.zeros(2 + len(loss.figures), dtype=torch.float64)  # terms, loss, figures
    sums: list[Tensor] = []
    rows = loss.gpt.config.padded_vocab_size
    read = (micro_batch(batch).checked(rows) for batch in islice(batches, max_batches))
    for batch in share_out(read, fabric.global_rank, fabric.world_size):
        total[0] += loss.num_terms(batch)
        on_device = batch.to(fabric.device)
        sums.append(model(on_device.idx, on_device.targets, **on_device.inputs).float().reshape(-1))
    if sums:
        total[1:] = torch.stack(sums).cpu().double().sum(dim=0)
    if fabric.world_size > 1:  # MPS has no float64, and never more than one device
        total = all_reduce(fabric, total.to(fabric.device), "sum").cpu()
    model.train(was_training)
    if total[0] == 0:
        raise ValueError(
            "The validation data holds nothing to predict. Add validation data, or leave validation out with a larger "
            "`eval.interval` and eval.final_validation=false."
        )
    return (total[1:] / total[0]).tolist()


def share_out(batches: Iterable[MicroBatch], rank: int, world_size: int) -> Iterable[MicroBatch]:
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
