"""A GPT whose blocks lie on several devices, one after another, for models larger than one of them; from outside.

The first device also has the embedding, the last norm and the head: token ids come in and logits come out there. Each
block's keys and values lie next to its weights. The devices work in turn, so this makes room and not speed.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from litgpt.kv_cache import AttentionPlan
from litgpt.model import GPT, Rotation

KINDS = 6  # more than a model has of plans, one for each size of window, and of rotations together
BLOCK = re.compile(r"transformer\.h\.(\d+)\.")


def place_blocks(gpt: GPT, count: int) -> list[int]:
    """Which of `count` devices each block goes to, so that all hold about the same.

    Args:
        gpt: The model; it needs no memory.
        count: How many devices there are.

    Raises:
        ValueError: There are more devices than blocks.
    """
    blocks = gpt.transformer.h
    if count > len(blocks):
        raise ValueError(
            f"devices={count}: {gpt.config.name or 'the model'} has {len(blocks)} blocks, which is the most devices "
            "that it can be laid on. Take fewer."
        )
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    whole = gpt.num_parameters()
    before = whole - sum(sizes)  # embedding and head are on the first device
    places = []
    for index, size in enumerate(sizes):
        wanted = int((before + size / 2) * count / whole)
        # Every device gets a block: neither one is left out, nor are too few blocks left for those to come.
        minimum = max(places[-1] if places else 0, count - len(sizes) + index)
        places.append(min(max(wanted, minimum), places[-1] + 1 if places else 0))
        before += size
    return places


def placed_weights(places: Sequence[int], devices: Sequence[torch.device]) -> Callable[[str], torch.device]:
    """Where each weight goes, by its name."""

    def place(name: str) -> torch.device:
        block = BLOCK.match(name)
        return devices[places[int(block[1])] if block else 0]

    return place


def connect_blocks(gpt: GPT, places: Sequence[int], devices: Sequence[torch.device]) -> None:
    """Has the activations follow the blocks from device to device.

    Args:
        gpt: The model, its weights placed.
        places: Of each block, which of the devices.
        devices: The devices.
    """
    movers = [Mover(device) for device in devices]
    for block, place in zip(gpt.transformer.h, places, strict=True):
        if place:
            block.register_forward_pre_hook(movers[place].move_block)
    gpt.transformer.ln_f.register_forward_pre_hook(movers[0].move_input)


Shared = TypeVar("Shared")


class Mover:
    """Brings what a device's blocks read to it; what they have in common (who sees whom, rotations) once in a call."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._moved: deque[tuple[Any, Any]] = deque(maxlen=KINDS)  # pairs of one type each

    def move_block(self, block: nn.Module, args: tuple) -> tuple:
        """Before each block."""
        x, rotation, plan, *cache = args
        return x.to(self.device), self._once(rotation, self._rotation), self._once(plan, self._plan), *cache

    def move_input(self, module: nn.Module, args: tuple) -> tuple:
        return (args[0].to(self.device),)

    def _once(self, value: Shared, copied: Callable[[Shared], Shared]) -> Shared:
        for original, moved in self._moved:
            if original is value:
                return moved
        moved = copied(value)
        self._moved.append((value, moved))
        return moved

    def _rotation(self, rotation: Rotation | None) -> Rotation | None:
        if rotation is None:
            return None
        cos, sin, scale = rotation
        return Rotation(cos.to(self.device), sin.to(self.device), None if scale is None else scale.to(self.device))

    def _plan(self, plan: AttentionPlan) -> AttentionPlan:
        moved = copy(plan)
        for name, part in vars(plan).items():
            if isinstance(part, Tensor):
                setattr(moved, name, part.to(self.device))
        return moved
