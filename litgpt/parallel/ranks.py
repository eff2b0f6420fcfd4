"""The ranks of a run: which one this is, what one does for all, what each has."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Value = TypeVar("Value")

LONGEST_WORK = timedelta(days=14)  # of one process, while the others wait


def gathered_objects(fabric: Fabric, value: Value) -> list[Value]:
    """What each rank has, in the order of the ranks. Every rank must call this."""
    values = [value] * fabric.world_size
    if fabric.world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def all_reduce(fabric: Fabric, tensor: Tensor, operation: Literal["sum", "min", "max"]) -> Tensor:
    """A tensor's sum, minimum or maximum over the ranks, element by element; the tensor itself where there is one rank.
    With several, it lies on the rank's device and is a tensor of its own. Every rank must call this."""
    if fabric.world_size == 1:
        return tensor
    reduced = fabric.all_reduce(tensor.clone(), reduce_op=operation)
    assert isinstance(reduced, Tensor)  # Fabric takes and gives collections, too
    return reduced


def store_of_ranks() -> torch.distributed.Store:
    """The keys and values on the host of rank 0 over which the processes have met: words between them that go past the
    devices."""
    return torch.distributed.distributed_c10d._get_default_store()


def once_per_node(fabric: Fabric, work: Callable[[], object]) -> None:
    """Do some work in one process of each node, while the others wait for it. Every rank must call this.

    They wait for days if need be: the process group's own barrier ends after 10 to 30 minutes, and downloading and
    tokenising a corpus takes hours.
    """
    others = fabric.world_size > 1
    # On gloo whatever the device: NCCL's watchdog would count the waiting as a hang.
    group = torch.distributed.new_group(backend="gloo", timeout=LONGEST_WORK) if others else None
    if fabric.local_rank == 0:
        work()
    if isinstance(group, torch.distributed.ProcessGroup):
        torch.distributed.barrier(group)
        torch.distributed.destroy_process_group(group)


def rank_from_environment() -> int:
    """This process's rank as the launcher says, before anything is launched."""
    return next((int(os.environ[name]) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), 0)
