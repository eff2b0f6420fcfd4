"""What a run prints: a progress bar on a terminal, plain lines elsewhere, and everything in logs.txt."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tqdm import tqdm

from litgpt.cli.secret import hide

_TERMINALS = [number for number in range(3) if os.isatty(number)]


def let_go_of_lost_terminal() -> bool:
    """Where the terminal that this process was started on is gone, what is written to it goes nowhere from here on;
    otherwise each attempt would be an error. Whether there was one, and it is gone."""
    lost = [number for number in _TERMINALS if not os.isatty(number)]
    for number in lost:
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, number)
        os.close(nowhere)
        _TERMINALS.remove(number)
    return bool(lost)


class Console:
    """Prints on rank 0 only. Lines from before `save_to` are kept and go to the file too.

    Args:
        active: Whether this process is rank 0.
    """

    def __init__(self, active: bool = True) -> None:
        self.active = active
        self.bar: tqdm | None = None
        self._file: Path | None = None
        self._earlier: list[str] = []

    def save_to(self, path: Path, append: bool = False) -> None:
        """Also write all lines to `path`, from the first one on."""
        if self.active:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path
            with open(path, "a" if append else "w", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in self._earlier)
        self._earlier = []

    def print(self, text: str = "") -> None:
        """A line (or several) for people to read."""
        if self.active:
            text = hide(text)
            try:
                tqdm.write(text, file=sys.stdout)  # above the bar, where there is one
                sys.stdout.flush()
            except OSError:
                if not let_go_of_lost_terminal():
                    raise
            self._record(text)

    def start_bar(self, total: int | None, done: int) -> None:
        """Show a progress bar, if there is a terminal to show it on."""
        if self.active and sys.stdout.isatty() and sys.stderr.isatty():
            # Some terminals (of build servers) say they have no columns; nothing would be shown there.
            has_width = os.get_terminal_size(sys.stderr.fileno()).columns > 0
            width = None if has_width else 100
            self.bar = tqdm(total=total, initial=done, unit="step", smoothing=0.1, ncols=width, dynamic_ncols=has_width)

    def step(self, step: int, line: str, **figures: str) -> None:
        """Report a step: by the bar's figures, or as a line."""
        if not self.active:
            return
        if self.bar is None:
            self.print(line)
            return
        self.bar.set_postfix_str(", ".join(f"{name} {value}" for name, value in figures.items()), refresh=False)
        _move(self.bar, step)
        self._record(line)

    def within_step(self, step: int, done: int, of: int) -> None:
        """Move the bar between the end of `step` and that of the next, of whose parts this many are done."""
        if self.bar is not None and done < of:
            _move(self.bar, round(step + done / of, 2))

    def close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _record(self, text: str) -> None:
        if self._file is None:
            self._earlier.append(text)
            return
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(f"{text}\n")


def _move(bar: tqdm, place: float) -> None:
    bar.n = place
    bar.update(0)
