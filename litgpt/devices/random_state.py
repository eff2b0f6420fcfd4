"""Random numbers: seeds, and the state of every generator of a process."""

from __future__ import annotations

from typing import Any

import torch

MAX_SEED = 2**63 - 1  # torch keeps a seed in 64 bits


def check_seed(seed: int) -> None:
    """Raise ValueError where torch has no generator for a seed."""
    if not -MAX_SEED - 1 <= seed <= MAX_SEED:
        raise ValueError(f"seed {seed} is not valid: give -2^63 to 2^63 - 1.")


def following_seed(seed: int, count: int) -> int:
    """The seed `count` after another; after the largest comes the smallest."""
    return (seed + count + MAX_SEED + 1) % (2 * MAX_SEED + 2) - MAX_SEED - 1


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch on every device."""
    import random

    import numpy as np

    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)


def draw_apart(rank: int) -> None:
    """From now on, torch draws other numbers on each rank (dropout, noise), which follow from the seed; rank 0 goes on.

    Called once the initial weights are there, which are the same on all ranks. Python's and numpy's numbers stay the
    same, too: a data module may shuffle by them, and all ranks must read one order.
    """
    if rank:
        torch.manual_seed(torch.initial_seed() + rank)


def rng_state() -> dict[str, Any]:
    """The state of every random number generator of this process, as plain values and tensors."""
    import random

    import numpy as np

    numpy = np.random.get_state(legacy=False)
    keys, position = numpy["state"]["key"], numpy["state"]["pos"]
    state = {
        "python": list(random.getstate()[1]),
        "numpy": [
            numpy["bit_generator"],
            torch.from_numpy(keys.astype(np.int64)),
            int(position),
            int(numpy["has_gauss"]),
            float(numpy["gauss"]),
        ],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put every random number generator of this process where `rng_state` found it."""
    import random

    import numpy as np

    random.setstate((3, tuple(state["python"]), None))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
