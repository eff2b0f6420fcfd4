"""Turns a run's progress into lines, metrics.csv, loggers and a progress bar."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

from litgpt.training.console import Console
from litgpt.training.loggers import Logger
from litgpt.training.loss import LossModule
from litgpt.training.metrics import MetricsFile, plot_losses
from litgpt.training.run_directory import METRICS_FILE, PLOT_FILE, RunDirectory
from litgpt.training.state import Progress


class Recorder:
    """Used on every rank; only rank 0 writes.

    Args:
        console: Where lines go.
        directory: Where metrics.csv and loss.png go.
        logger: Where metrics go besides that; None for nowhere (and on ranks other than 0).
        flops_per_token: Operations of a forward and backward pass per token, for the MFU.
        peak_flops: Operations per second of all devices; None where it is not known, and then there is no MFU.
        loss: Says what the loss is in, and which figures come with it.
        metrics: Names of what answers to the validation data are scored by.
    """

    def __init__(
        self,
        console: Console,
        directory: RunDirectory,
        logger: Logger | None = None,
        *,
        flops_per_token: float = 0.0,
        peak_flops: float | None = None,
        loss: LossModule | type[LossModule] = LossModule,
        metrics: Sequence[str] = (),
    ) -> None:
        self.console, self.directory, self.logger = console, directory, logger
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.figures, self.unit, self.metrics = loss.figures, loss.unit, metrics
        self._metrics: MetricsFile | None = None
        self._iterations = self._tokens = 0
        self._window_start = self._start = time.perf_counter()
        self._earlier = 0.0

    @contextmanager
    def running(self, progress: Progress, total_steps: int | None, resumed: bool) -> Generator[None]:
        """Training happens inside, from `progress` on. However it ends, the losses are drawn."""
        self._earlier, self._start = progress.seconds, time.perf_counter()
        if self.console.active:
            path = self.directory.path / METRICS_FILE
            self._metrics = MetricsFile(path, progress.step if resumed else None, self.figures, self.metrics)
            self.console.start_bar(total_steps, progress.step)
        self._window_start = time.perf_counter()
        try:
            yield
        finally:
            self.console.close_bar()
            if self._metrics is not None:
                plot_losses(self._metrics.path, self.directory.path / PLOT_FILE, self.unit)

    def finish(self) -> None:
        """Nothing more will be logged."""
        if self.logger is not None:
            self.logger.finish()

    @property
    def seconds(self) -> float:
        """Time since training began, in earlier parts of the run too."""
        return self._earlier + time.perf_counter() - self._start

    def count(self, iterations: int, tokens: int) -> None:
        """Forward passes and tokens done since the last call."""
        self._iterations += iterations
        self._tokens += tokens

    @contextmanager
    def off_the_clock(self) -> Generator[None]:
        """What happens inside does not count as training time in tokens per second and iteration time."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._window_start += time.perf_counter() - before

    def step(
        self, progress: Progress, epoch: float, *, loss: float, learning_rate: float, grad_norm: float | None
    ) -> dict[str, Any]:
        """The figures of a step, and of the time since the last call. The device must have finished the step."""
        elapsed = max(time.perf_counter() - self._window_start, 1e-9)
        rate = self._tokens / elapsed
        mfu = rate * self.flops_per_token / self.peak_flops if self.peak_flops else None
        row = {
            "step": progress.step,
            "iter": progress.iteration,
            "epoch": epoch,
            "loss": loss,
            "learning_rate": learning_rate,
            "tokens": progress.tokens,
            "tokens_per_sec": rate,
            "grad_norm": grad_norm,
            "iter_time": elapsed / max(1, self._iterations),
            "mfu": mfu,
            "time": self.seconds,
        }
        self._iterations = self._tokens = 0
        self._window_start = time.perf_counter()
        return row

    def write(self, row: dict[str, Any], last_val_loss: float | None) -> None:
        """Put a row into metrics.csv and the logger, and say it on the console."""
        if not self.console.active:
            return
        assert self._metrics is not None
        with self.off_the_clock():
            self._metrics.add(row)
            if self.logger is not None:
                numbers = {k: v for k, v in row.items() if k != "step" and v is not None}
                self.logger.log_metrics(numbers, row["step"])
            if row.get("loss") is not None:
                self._say(row, last_val_loss)

    def _say(self, row: dict[str, Any], last_val_loss: float | None) -> None:
        val = "n/a" if last_val_loss is None else f"{last_val_loss:.3f}"
        # The epoch that the step's last sample was of: 1.0 is the end of the first.
        epoch = max(1, -int(-row["epoch"] // 1))
        line = (
            f"Epoch {epoch} | iter {row['iter']} step {row['step']} | loss train: {row['loss']:.3f}, val: {val}"
            f"{figures_in_words({name: row[name] for name in self.figures})} | "
            f"iter time: {row['iter_time'] * 1000:.2f} ms (step)"
        )
        figures = {"loss": f"{row['loss']:.3f}", "val": val, "tok/s": f"{row['tokens_per_sec']:,.0f}"}
        if row["mfu"] is not None:
            figures["MFU"] = f"{row['mfu']:.1%}"
        self.console.step(row["step"], line, **figures)


def figures_in_words(figures: dict[str, float]) -> str:
    """Further figures of the loss, to follow it on a line; nothing where there are none."""
    return "".join(f", {name.replace('_', ' ')}: {value:.3f}" for name, value in figures.items())


def metrics_in_words(metrics: dict[str, float | None]) -> str:
    """Metrics on a line of their own, by the names that `--eval.best_by` takes."""
    return ", ".join(f"{name}: {'n/a' if value is None else f'{value:.3f}'}" for name, value in metrics.items())
