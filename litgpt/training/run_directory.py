"""The directory that a run writes to: who may write there, where its checkpoints are, which one to resume from."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from litgpt.training.run_lock import RunLock
from litgpt.training.state import STATE_FILE, check_checkpoint, saved_step

FINAL = "final"
BEST = "best"
METRICS_FILE = "metrics.csv"
LOGS_FILE = "logs.txt"
PLOT_FILE = "loss.png"
LOGGERS_DIR = "logs"
TENSORBOARD_DIR = "lightning_logs"
TOKENIZER_DIR = "tokenizer"
STEP_DIR = re.compile(r"step-(\d{8,})")


class RunDirectory:
    """`out_dir` of a run: checkpoints `step-00000100/`, ..., `best/`, `final/`, and its records next to them.

    Attributes:
        notes: What to tell the user of it once there is a place to.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.notes: list[str] = []

    def lock(self) -> None:
        """Keep other runs out until the call ends that `unlocks_at_end`, or the process; for one process of a run.

        Raises:
            ValueError: Another run writes there, or nobody can.
        """
        if self.path.is_file():
            raise ValueError(f"out_dir={self.path} is a file. Choose a directory.")
        lock = RunLock(self.path)
        self.notes += [lock.note] if lock.note else []

    @property
    def final(self) -> Path:
        return self.path / FINAL

    @property
    def best(self) -> Path:
        """Where the checkpoint with the lowest validation loss belongs."""
        return self.path / BEST

    def step(self, step: int) -> Path:
        """Where the checkpoint of a step belongs."""
        return self.path / f"step-{step:08d}"

    def logs(self, logger_name: str) -> Path:
        """Where a logger's files belong."""
        return self.path / (TENSORBOARD_DIR if logger_name == "tensorboard" else LOGGERS_DIR)

    def step_checkpoints(self) -> list[Path]:
        """The step-* checkpoints that are there, oldest first."""
        found = [p for p in self.path.glob("step-*") if STEP_DIR.fullmatch(p.name) and (p / STATE_FILE).is_file()]
        return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))

    def newest(self, check: bool = False) -> Path | None:
        """The checkpoint that went furthest.

        Args:
            check: Compare it with its sums, which reads it, and take the next one if it is damaged; `notes` says so.

        Raises:
            ValueError: All are damaged.
        """
        steps: dict[Path, int] = {}
        damage: list[str] = []
        for checkpoint in (self.final, *reversed(self.step_checkpoints()), self.best):
            if (checkpoint / STATE_FILE).is_file():
                try:
                    steps[checkpoint] = _step_of(checkpoint)
                except ValueError as error:
                    damage.append(str(error))
        for checkpoint in sorted(steps, key=steps.__getitem__, reverse=True):
            try:
                if check:
                    check_checkpoint(checkpoint)
            except ValueError as error:
                damage.append(str(error))
            else:
                self.notes += [f"Warning: {line}" for line in damage if check]
                return checkpoint
        if damage and check:
            raise ValueError(
                "\n".join(damage) + f"\nNo checkpoint of the run in {self.path} is whole: there is nothing to resume "
                "from. Start it again with overwrite=true, or elsewhere with `out_dir`."
            )
        return None

    def checkpoints(self) -> list[Path]:
        """What training can go on from, complete or not."""
        return [p for p in self.artifacts() if p.name in (FINAL, BEST) or STEP_DIR.fullmatch(p.name)]

    def results(self) -> list[Path]:
        """What would be lost if a new run were started here. A run that never trained (a typo) has left only logs."""
        return [*self.checkpoints(), *(p for p in self.artifacts() if p.name == METRICS_FILE)]

    def artifacts(self) -> list[Path]:
        """Everything that a run has left here."""
        names = [FINAL, BEST, METRICS_FILE, LOGS_FILE, PLOT_FILE, LOGGERS_DIR, TENSORBOARD_DIR, TOKENIZER_DIR]
        names.append("hyperparameters.yaml")
        steps = [p for p in self.path.glob("step-*") if STEP_DIR.fullmatch(p.name)]
        return [p for p in (self.path / name for name in names) if p.exists()] + steps

    def prepare(
        self, resume: bool | str | Path, overwrite: bool, needed: Iterable[Path] = (), *, is_main: bool = True
    ) -> Path | None:
        """Decide where to begin, and make sure that nothing of another run is lost.

        Args:
            resume: False; True (from the newest checkpoint here); "auto" (the same, or afresh where there is none); or
                a checkpoint directory.
            overwrite: Whether a run that is here may be deleted.
            needed: What the new run reads, such as the model it starts from; that is never deleted.
            is_main: Whether this process is the one to delete it, and to look whether a checkpoint is whole: what it
                finds, the others are told.

        Returns:
            The checkpoint to resume from, None to start afresh.

        Raises:
            FileNotFoundError: There is nothing to resume from.
            ValueError: A run is here and may not be overwritten, or holds what is needed; this directory is itself
                needed; or the checkpoint is damaged.
        """
        checkpoint = self.start(resume, check=is_main)
        if checkpoint is not None:
            inside = checkpoint.resolve().parent == self.path.resolve()
            if not inside and not overwrite and self.results():
                raise ValueError(self._refusal())
            return checkpoint
        # A run killed before its first checkpoint has nothing to lose; `--resume auto` starts it again.
        kept = self.checkpoints() if resume == "auto" else self.results()
        if kept and not overwrite:
            raise ValueError(self._refusal())
        if is_main:
            artifacts = self.artifacts()
            for path in needed:
                place = path.expanduser().resolve()
                if place == self.path.resolve():  # of LoRA's weights, hyperparameters.yaml says what they belong to
                    raise ValueError(
                        f"out_dir={self.path} is what the run starts from: it would write its own settings over those "
                        "there. Choose another `out_dir`."
                    )
                if any(place.is_relative_to(artifact.resolve()) for artifact in artifacts):
                    raise ValueError(
                        f"A new run in '{self.path}' would delete '{path}', which it starts from. "
                        "Choose another `out_dir`."
                    )
            for artifact in artifacts:
                shutil.rmtree(artifact) if artifact.is_dir() else artifact.unlink()
        return None

    def prune(self, keep_last: int | None) -> None:
        """Delete all but the newest `keep_last` step-* checkpoints."""
        if keep_last is not None:
            for checkpoint in self.step_checkpoints()[:-keep_last]:
                shutil.rmtree(checkpoint)

    def start(self, resume: bool | str | Path, check: bool = True) -> Path | None:
        """The checkpoint that a run would begin from; None to begin afresh. See `prepare`, which acts on it."""
        text = str(resume).lower()
        if text in ("false", "none"):
            return None
        if text in ("true", "auto"):
            newest = self.newest(check)
            if newest is None and text == "true":
                raise FileNotFoundError(
                    f"resume=true: there is no checkpoint of a run in {self.path}. Give the `out_dir` of the run, a "
                    "checkpoint directory, or resume=auto to start afresh where there is none."
                )
            return newest
        path = Path(str(resume))
        path = path.parent if path.is_file() else path
        if path.is_dir() and not (path / STATE_FILE).is_file() and (inner := RunDirectory(path)).newest():
            newest = inner.newest(check)
            self.notes += inner.notes
            return newest
        if not (path / STATE_FILE).is_file():
            what = f"it holds no {STATE_FILE}" if path.is_dir() else "there is no such directory"
            raise FileNotFoundError(
                f"resume={resume}: {what}. Give a checkpoint directory of a run, such as out/pretrain/step-00001000; "
                "to train on from other weights, use `initial_checkpoint_dir`."
            )
        if check:
            check_checkpoint(path)
        return path

    def _refusal(self) -> str:
        return (
            f"{self.path} already holds a run ({', '.join(sorted(p.name for p in self.artifacts())[:4])}, ...). "
            "Continue it with resume=auto, write elsewhere with `out_dir`, or delete it with overwrite=true."
        )


def _step_of(checkpoint: Path) -> int:
    match = STEP_DIR.fullmatch(checkpoint.name)
    return int(match[1]) if match else saved_step(checkpoint)
