"""The record of a run: `metrics.csv`, `loss.png`, and how fast it goes."""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from litgpt.checkpoint import atomic_file
from litgpt.model import GPT
from litgpt.quantization.layers import num_parameters
from litgpt.training.loss import NATS_PER_TOKEN

COLUMNS = (
    *("step", "iter", "epoch", "loss", "val_loss", "learning_rate", "tokens"),
    *("tokens_per_sec", "grad_norm", "iter_time", "mfu", "time"),
)


def val_column(figure: str) -> str:
    """The column of a figure on the validation data: the loss, a further one of it (see `LossModule`) or a metric."""
    return f"val_{figure}"


def columns_with(figures: Sequence[str], metrics: Sequence[str] = ()) -> tuple[str, ...]:
    """The columns of a run whose loss gives further figures, or whose answers are scored by metrics: these stand after
    the losses."""
    place = COLUMNS.index("learning_rate")
    return (*COLUMNS[:place], *figures, *map(val_column, (*figures, *metrics)), *COLUMNS[place:])


class MetricsFile:
    """`metrics.csv`: a row per log line, numbers with all their digits, nothing where there is no value.

    Columns: step, iter (forward passes per device), epoch (with its fraction), loss and val_loss (nats per target
    token), learning_rate, tokens (so far, over all devices), tokens_per_sec, grad_norm (before clipping), iter_time
    (seconds per forward and backward pass), mfu (share of the devices' peak), time (seconds since training began).

    Args:
        path: The file.
        after_step: Keep rows up to this step (a resumed run says the later ones again); None starts a new file.
        figures: Names of what the loss gives besides itself.
        metrics: Names of what answers to the validation data are scored by.
    """

    def __init__(
        self, path: Path, after_step: int | None = None, figures: Sequence[str] = (), metrics: Sequence[str] = ()
    ) -> None:
        self.path, self.columns = path, columns_with(figures, metrics)
        kept = [] if after_step is None else [r for r in read_metrics(path) if int(r["step"]) <= after_step]
        with atomic_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; it is on disk when this returns."""
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns).writerow({k: "" if v is None else v for k, v in row.items()})


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The whole rows of a metrics.csv; a last one that was cut off is left out."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row.get("step", "").isdecimal() and row[COLUMNS[-1]] is not None]


def plot_losses(metrics: Path, picture: Path, unit: str = NATS_PER_TOKEN) -> None:
    """Draw the losses in a metrics.csv over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(metrics)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for column, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
        points = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
        points = [(x, y) for x, y in points if math.isfinite(y)]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=4)
    axes.set(xlabel="optimizer step", ylabel=f"loss ({unit})")
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a font without some glyph does not matter here
        FigureCanvasAgg(figure).print_png(str(picture))


def flops_per_token(gpt: GPT, tokens: int) -> float:
    """Operations of a forward and backward pass per token, in sequences of `tokens` (https://arxiv.org/abs/2204.02311,
    appendix B): 6 per weight that multiplies something (4 where it is frozen and gets no gradient), 12 per layer, head,
    head size and token attended to."""
    config = gpt.config
    weights = num_parameters(gpt)
    per_weight = 4 + 2 * gpt.num_parameters(trainable_only=True) / weights
    if not config.tie_embeddings:
        weights -= gpt.transformer.wte.weight.numel()  # a lookup multiplies nothing
    if config.n_expert:  # only the chosen experts work
        experts = sum(p.numel() for n, p in gpt.named_parameters() if ".experts." in n)
        weights -= experts - experts * config.n_expert_per_token // config.n_expert
    attention = 12 * config.n_layer * config.n_head * config.head_size * tokens
    return per_weight * weights + attention
