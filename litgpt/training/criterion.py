"""Which figure of a validation says that a checkpoint is the best so far: `--eval.best_by`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from litgpt.cli.suggest import did_you_mean
from litgpt.training.metrics import val_column

LOSS = "loss"


@dataclass(frozen=True)
class Criterion:
    """A figure of the validation data, by default the loss."""

    name: str = LOSS
    higher_is_better: bool = False

    @property
    def column(self) -> str:
        """Where it stands in metrics.csv."""
        return val_column(self.name)

    @property
    def in_words(self) -> str:
        return "validation loss" if self.name == LOSS else self.column

    def is_better(self, value: float | None, best: float | None) -> bool:
        """Whether a value is better than the best so far; one that is not a number never is."""
        if value is None or not math.isfinite(value):
            return False
        return best is None or (value > best if self.higher_is_better else value < best)


def choose_criterion(name: str, higher_is_better: Mapping[str, bool | None]) -> Criterion:
    """The criterion of `--eval.best_by NAME`.

    Args:
        name: What was asked for.
        higher_is_better: The run's figures besides the loss, and which values of them are the good ones; None where
            that is not certain.

    Raises:
        ValueError: The run has no such figure, or it is not certain which values of it are the good ones.
    """
    if name == LOSS:
        return Criterion()
    if name not in higher_is_better:
        known = [LOSS, *higher_is_better]
        raise ValueError(
            f"eval.best_by={name}: this run has no such figure.{did_you_mean(name, known)} Choose from "
            f"{', '.join(known)}; while finetuning, `eval.metrics` brings more."
        )
    if higher_is_better[name] is None:
        raise ValueError(
            f"eval.best_by={name}: it is not certain which values are the good ones. The metric's class does not say "
            "(higher_is_better), or texts that equal their references score worse than others by what it says. Choose "
            "another figure."
        )
    return Criterion(name, bool(higher_is_better[name]))
