"""What every way of changing a GPT from outside needs."""

import torch
from torch import nn


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `root` has one of that name, into the same mode (training or evaluation)."""
    parent, _, last = name.rpartition(".")
    module.train(root.get_submodule(name).training)
    setattr(root.get_submodule(parent), last, module)


class KeepsFloat32(nn.Module):
    """A module whose own parameters, unlike those of its children, stay as they are when a model in float32 is
    converted to 16 bits: small updates of trained parameters would be rounded away there."""

    def _apply(self, fn, recurse=True):
        before = {name: p.data for name, p in self.named_parameters(recurse=False)}
        super()._apply(fn, recurse)
        for name, p in self.named_parameters(recurse=False):
            if p.dtype != torch.float32:
                p.data = before[name].to(p.device)
        return self
