"""Parameters spread over devices (FSDP2), and the whole of them where it is needed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from litgpt.model import Block


def shard_module(module: nn.Module, mesh: Any) -> nn.Module:
    """Shard a module's parameters over `mesh["data_parallel"]`, block by block (FSDP2,
    https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html)."""
    from torch.distributed.fsdp import fully_shard

    data_parallel = mesh["data_parallel"]
    for block in [m for m in module.modules() if isinstance(m, Block)]:
        fully_shard(block, mesh=data_parallel)
    fully_shard(module, mesh=data_parallel)
    return module


@contextmanager
def whole_parameters(module: nn.Module) -> Generator[None]:
    """Inside, each device has all parameters of a module that `shard_module` may have sharded, so that a rank can run
    it without the others. Every rank must call this, after the module's first forward pass."""
    from torch.distributed.fsdp import FSDPModule

    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    # The hooks around each part's forward pass would let go of its parameters again, and remember the pass for a
    # backward one: the ranks then gather the parameters of different parts, and wait for each other forever.
    hooks = [(part, part._forward_pre_hooks, part._forward_hooks) for part in parts]
    for part in parts:
        part.unshard()
        part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for part, before, after in hooks:
            part._forward_pre_hooks, part._forward_hooks = before, after
            part.reshard()


def own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters by name, each as an optimizer has it: of one that `shard_module` has sharded, the sharded one. (A
    forward pass without a backward one leaves whole ones in its place.)"""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    return list(module.named_parameters())


def is_sharded(module: nn.Module) -> bool:
    """Whether some parameters are spread over devices."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) for p in module.parameters())


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded. Every rank must call this for the same tensors in the same order."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def copy_into(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded, and then keeps only its part."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(target, DTensor):
        whole = source.to(target.device, target.dtype)
        target.copy_(distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None))
    else:
        target.copy_(source)
