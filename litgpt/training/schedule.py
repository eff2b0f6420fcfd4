"""The learning rate as a pure function of the optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.optim import Optimizer

from litgpt.training.arguments import TrainArgs


@dataclass(frozen=True)
class Schedule:
    """Linear warmup to the peak, then half a cosine down to `min_lr` (https://arxiv.org/abs/1608.03983), then flat.

    Args:
        warmup_steps: Steps of the warmup; the last of them is at the peak, the first already above zero.
        decay_steps: Steps from the start of training to the end of the decay; None stays at the peak.
        min_lr: Learning rate at the end of the decay, never above the peak.
    """

    warmup_steps: int = 0
    decay_steps: int | None = None
    min_lr: float = 0.0

    @classmethod
    def of(cls, train: TrainArgs, total_steps: int | None) -> Schedule:
        """The schedule of a run of `total_steps` steps (None: its length is not known beforehand)."""
        warmup = train.lr_warmup_steps or 0
        if train.lr_warmup_fraction is not None:
            if total_steps is None:
                raise ValueError(
                    "train.lr_warmup_fraction needs a run whose length is known: "
                    "set --train.max_steps or --train.max_tokens, or use --train.lr_warmup_steps."
                )
            warmup = math.ceil(train.lr_warmup_fraction * total_steps)
        return cls(warmup, train.lr_decay_iters or total_steps, train.min_lr)

    def learning_rate(self, step: int, peak: float) -> float:
        """The learning rate of `step` (from 0) where the peak is `peak`."""
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        if self.decay_steps is None:
            return peak
        low = min(self.min_lr, peak)
        progress = (step - self.warmup_steps) / max(1, self.decay_steps - 1 - self.warmup_steps)
        return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def apply(self, optimizer: Optimizer, step: int) -> float:
        """Set every parameter group's learning rate for `step`; returns the first group's."""
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))
            group["lr"] = self.learning_rate(step, group["initial_lr"])
        return optimizer.param_groups[0]["lr"]
