"""Runs inputs through a parser and counts what becomes of them."""

import shutil
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.parsers import Folder, Parser

CLEAN = (ValueError, OSError)  # what the program shows as one line
LONGEST = 20_000  # characters of a message
SHOWN = 400  # characters of a crash's message


@dataclass
class Counts:
    """What became of the inputs of a parser.

    Attributes:
        inputs: How many there were.
        refused: Those that ended in a clean error.
        crashes: Any other error, one of a kind, by what it was and where.
        slowest: Seconds of the slowest.
    """

    inputs: int = 0
    refused: int = 0
    crashes: dict[str, str] = field(default_factory=dict)
    slowest: float = 0.0

    def add(self, parser: Parser, folder: Folder, draw: Any, keep: Path | None = None) -> None:
        """One more input; one that crashes, or is the slowest of over a second, is kept in a folder of its own."""
        path = parser.damage(draw, folder.fresh())
        self.inputs += 1
        start, crash, trace = time.perf_counter(), None, ""
        try:
            parser.read(path)
        except CLEAN as error:
            self.refused += 1
            if len(str(error)) > LONGEST:
                crash = trace = f"a message of {len(str(error)):,} characters: {str(error)[:200]!r}"
        except BaseException as error:  # a panic of Rust is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            where = traceback.extract_tb(error.__traceback__)[-1]
            crash = f"{type(error).__name__} in {where.filename}, line {where.lineno}: {str(error)[:SHOWN]}"
            trace = traceback.format_exc()
        seconds = time.perf_counter() - start
        kinds = {each.partition(": ")[0] for each in self.crashes}
        is_new = crash is not None and crash.partition(": ")[0] not in kinds
        if keep is not None and (is_new or (seconds > max(1.0, self.slowest))):
            kept = keep / f"{len(list(keep.iterdir()))}"
            for file in folder.changed():
                target = kept / file.relative_to(folder.copies)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)
        if is_new:
            self.crashes[crash] = trace
        self.slowest = max(self.slowest, seconds)


def fuzz(parser: Parser, folder: Folder, inputs: int, start: int | None = None, keep: Path | None = None) -> Counts:
    """Counts of this many inputs: always the same ones, or those that follow from the number `start`."""
    counts = Counts()

    @settings(
        max_examples=inputs,
        derandomize=start is None,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def add(data: st.DataObject) -> None:
        counts.add(parser, folder, data.draw, keep)

    if start is not None:
        add = seed(start)(add)
    add()
    return counts
