"""The learning rate as a pure function of the optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch.optim import Optimizer

from litgpt.training.arguments import TrainArgs

# What is left of the way down after a part of it, from 1 to 0.
CURVES: dict[str, Callable[[float], float]] = {
    "cosine": lambda part: 0.5 * (1 + math.cos(math.pi * part)),  # https://arxiv.org/abs/1608.03983
    "linear": lambda part: 1 - part,
}
COOLDOWN = 0.1  # share of a warmup-stable-decay run (https://arxiv.org/abs/2404.06395, section 4.3)


@dataclass(frozen=True)
class Schedule:
    """Linear warmup to the peak, flat for a while where wanted, then down to `min_lr` along a curve, then flat.

    Args:
        warmup_steps: Steps of the warmup; the last of them is at the peak, the first already above zero.
        decay_steps: Steps from the start of training to the end of the decay; None stays at the peak.
        min_lr: Learning rate at the end of the decay, never above the peak.
        curve: One of CURVES.
        stable_until: The step up to which the peak is held, at least the end of the warmup.
    """

    warmup_steps: int = 0
    decay_steps: int | None = None
    min_lr: float = 0.0
    curve: str = "cosine"
    stable_until: int = 0

    @classmethod
    def of(cls, train: TrainArgs, total_steps: int | None) -> Schedule:
        """The schedule of a run of `total_steps` steps (None: its length is not known beforehand)."""
        warmup = train.lr_warmup_steps or 0
        if train.lr_warmup_fraction is not None:
            if total_steps is None:
                raise ValueError(
                    "`train.lr_warmup_fraction` needs a run whose length is known: "
                    "set `train.max_steps` or `train.max_tokens`, or use `train.lr_warmup_steps`."
                )
            warmup = math.ceil(train.lr_warmup_fraction * total_steps)
        end = train.lr_decay_iters or total_steps
        if train.lr_schedule == "constant":
            return cls(warmup)
        if train.lr_schedule != "warmup-stable-decay":
            return cls(warmup, end, train.min_lr, train.lr_schedule)
        if end is None:
            raise ValueError(
                "train.lr_schedule=warmup-stable-decay needs to know when the run ends: "
                "set `train.max_steps` or `train.lr_decay_iters`."
            )
        fraction = COOLDOWN if train.lr_cooldown_fraction is None else train.lr_cooldown_fraction
        return cls(warmup, end, train.min_lr, "linear", stable_until=end - math.ceil(fraction * end))

    def learning_rate(self, step: int, peak: float) -> float:
        """The learning rate of `step` (from 0) where the peak is `peak`."""
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        if self.decay_steps is None:
            return peak
        start = max(self.warmup_steps, self.stable_until)
        part = (step - start) / max(1, self.decay_steps - 1 - start)
        low = min(self.min_lr, peak)
        return low + (peak - low) * CURVES[self.curve](min(1.0, max(0.0, part)))

    def apply(self, optimizer: Optimizer, step: int) -> float:
        """Set every parameter group's learning rate for `step`; returns the first group's.

        `min_lr` is the first group's, too: the others keep their ratio to it all the way.
        """
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))
        peak = optimizer.param_groups[0]["initial_lr"]
        rate = self.learning_rate(step, peak)
        for group in optimizer.param_groups:
            group["lr"] = rate * (group["initial_lr"] / peak if peak else 1.0)
        return rate
