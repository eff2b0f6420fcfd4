"""The share of generated texts that are the reference. Imported only where it is used: torchmetrics takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class ExactMatch(Metric):
    """The share of texts that equal their reference, character by character; white space around either counts for
    nothing. torchmetrics itself has this for classes only."""

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    matches: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("matches", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Sequence[str], target: Sequence[str]) -> None:
        """Take in some texts and their references."""
        self.matches += sum(one.strip() == other.strip() for one, other in zip(preds, target, strict=True))
        self.total += len(preds)

    def compute(self) -> Tensor:
        """Between 0 and 1, scalar; NaN where there were no texts."""
        return self.matches / self.total
