"""Less memory for more time: blocks whose activations are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

from litgpt.model import GPT, Block

_Returned = TypeVar("_Returned")


def checkpoint_blocks(gpt: GPT, choice: str | int) -> None:
    """Keep of some blocks only the input until the backward pass (https://arxiv.org/abs/1604.06174).

    The blocks stay the modules they are, with their names and hooks: so it goes before sharding (FSDP2 then gathers a
    block's weights once for both computations), and before or after compiling.

    Args:
        gpt: The model, not yet sharded.
        choice: "none", "full" for all blocks, or N for the first and every N-th from there.
    """
    for block in checkpointed_blocks(gpt, choice):
        block.forward = _computed_again(block.forward)


def checkpointed_blocks(gpt: GPT, choice: str | int) -> list[Block]:
    """The blocks that `choice` means."""
    return [] if choice == "none" else list(gpt.transformer.h)[:: 1 if choice == "full" else int(choice)]


def _computed_again(forward: Callable[..., _Returned]) -> Callable[..., _Returned]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> _Returned:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)  # draws the same random numbers again

    return run
