"""What every way of changing a GPT from outside needs."""

from collections.abc import Callable, Iterator
from typing import Protocol, TypeGuard

import torch
from torch import Tensor, nn


class LinearLayer(Protocol):
    """A linear layer of whatever class: torch's own, a quantised one, one that is adapted already."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def bias(self) -> Tensor | None: ...

    def __call__(self, x: Tensor, /) -> Tensor: ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...


def is_linear(module: nn.Module) -> TypeGuard[LinearLayer]:
    """Whether it is a linear layer, whatever its class."""
    return hasattr(module, "in_features")


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `root` has one of that name, into the same mode (training or evaluation)."""
    parent, _, last = name.rpartition(".")
    module.train(root.get_submodule(name).training)
    setattr(root.get_submodule(parent), last, module)


class KeepsFloat32(nn.Module):
    """A module whose own parameters, unlike those of its children, stay as they are when a model in float32 is
    converted to 16 bits: small updates of trained parameters would be rounded away there."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KeepsFloat32":
        before = {name: p.data for name, p in self.named_parameters(recurse=False)}
        super()._apply(fn, recurse)
        for name, p in self.named_parameters(recurse=False):
            if p.dtype != torch.float32:
                p.data = before[name].to(p.device)
        return self
