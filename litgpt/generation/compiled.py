"""The decode step compiled by torch, for accelerators."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from litgpt.cli.notes import say_note
from litgpt.kv_cache import KVCache
from litgpt.model import GPT


def decoder(model: GPT, say: Callable[[str], None] | None = None) -> Callable[..., Tensor]:
    """A model's forward for decoding: `decoder(tokens (B, 1), positions (B, 1), cache=...) -> (B, 1, V)`.

    Args:
        model: In eval mode, on its device, with its weights. They may change in place, but not be put elsewhere.
        say: Is told what is being compiled; default: prints to stderr.
    """
    # On a GPU launching the kernels one by one takes longest: as a graph they are launched together.
    is_cuda = model.transformer.wte.weight.device.type == "cuda"
    compiled = torch.compile(model, dynamic=False, mode="reduce-overhead" if is_cuda else "default")
    known: set[int] = set()

    def decode(tokens: Tensor, positions: Tensor, *, cache: KVCache) -> Tensor:
        rows = tokens.size(0)
        if rows not in known:
            known.add(rows)
            purpose = f"{rows} answers at a time" if rows > 1 else "one answer at a time"
            (say or say_note)(f"Compiling the writing of {purpose} with torch.compile: its first tokens wait for that.")
        return compiled(tokens, positions, cache=cache)

    return decode
