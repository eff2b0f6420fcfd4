"""How many samples a run takes, and how many optimizer steps they make."""

from __future__ import annotations

import math
from fractions import Fraction


def samples_in(epochs: float, samples_per_epoch: int) -> int:
    """The samples of this many passes over the data; of a part of a pass, the last one counts whole."""
    return math.ceil(Fraction(str(epochs)) * samples_per_epoch)  # 0.1 of 30 is 3: in floats it is a little more


def steps_in(samples: int, samples_per_step: int, samples_per_epoch: int | None) -> int:
    """The optimizer steps that this many samples make, where no step reaches into the next epoch: the last one of each
    is smaller, unless `samples_per_step` divides the epoch. None for `samples_per_epoch`: it is not known where they
    end.
    """
    if not samples_per_epoch:
        return math.ceil(samples / samples_per_step)
    epochs, rest = divmod(samples, samples_per_epoch)
    return epochs * math.ceil(samples_per_epoch / samples_per_step) + math.ceil(rest / samples_per_step)
