"""Where a model goes: the devices that a user names, and what loads it over several of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from litgpt.convert import Source, load_model
from litgpt.convert.source import meta_model
from litgpt.distributed import accelerator as best_accelerator
from litgpt.model import GPT
from litgpt.sequential import connect_blocks, place_blocks, placed_weights


def load_over(devices: Sequence[torch.device]) -> Callable[..., GPT]:
    """What loads a model in place of `load_model`, some of its blocks on each of several devices."""

    def load(source: Source, device: Any, **how: Any) -> GPT:
        places = place_blocks(meta_model(source.config), len(devices))
        model = load_model(source, device=placed_weights(places, devices), **how)
        connect_blocks(model, places, devices)
        return model

    return load


def named_device(kind: str) -> torch.device:
    """The device of an accelerator's name.

    Raises:
        ValueError: There is none.
    """
    best = best_accelerator()
    kind = {"auto": best, "gpu": "cuda"}.get(kind, kind)
    if kind not in ("cpu", best):
        raise ValueError(f"accelerator={kind!r}: there is none here. Give 'cpu' or 'auto', which is {best!r}.")
    return torch.device(kind)
