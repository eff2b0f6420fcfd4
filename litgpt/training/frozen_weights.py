"""Frozen weights in mixed precision, kept in the type that is computed in."""

from __future__ import annotations

from torch import nn

from litgpt.devices.precision import PRECISIONS
from litgpt.model import GPT, Router


def store_frozen_matrices(gpt: GPT, precision: str) -> None:
    """In mixed precision, keep frozen linear layers' weights in the type that is computed in.

    The numbers stay the same, bit for bit: autocast rounds these weights in every forward pass anyway, and, since it
    remembers copies of trained weights only, keeps a copy of each until the backward pass. So a frozen weight takes 2
    bytes instead of 4 + 2. Routers compute in float32, and a tied head is the embedding, too: they stay.

    Args:
        gpt: The model, not yet sharded.
        precision: One of PRECISIONS; nothing happens where it is not mixed.
    """
    _, dtype = PRECISIONS[precision]
    embedding = gpt.transformer.wte.weight
    for layer in gpt.modules():
        if dtype is None or not isinstance(layer, nn.Linear) or isinstance(layer, Router) or layer.weight is embedding:
            continue
        for parameter in layer.parameters(recurse=False):
            if not parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
