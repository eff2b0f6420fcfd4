"""Damaged files through every reader, for as long as one likes: `python -m tests.fuzz --minutes 10`.

Prints how many were tried, how many of them crashed a reader, and the slowest; exits with 1 after a crash.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.parsers import PARSERS, Folder
from tests.fuzz.run import Counts, fuzz

AT_ONCE = 50


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--minutes", type=float, default=10.0, help="how long to try")
    arguments.add_argument("--parser", choices=PARSERS, help="one reader; all by default")
    arguments.add_argument("--start", type=int, default=time.time_ns() % 2**32, help="decides what is tried")
    arguments.add_argument("--keep", type=Path, help="a folder for the inputs that crash, or take over a second")
    given = arguments.parse_args()
    names = [given.parser] if given.parser else list(PARSERS)
    if given.keep:
        given.keep.mkdir(parents=True, exist_ok=True)
    totals = {name: Counts() for name in names}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Folder(Path(temporary))
        start, end = given.start, time.monotonic() + 60 * given.minutes
        while time.monotonic() < end:
            for name in names:
                found = fuzz(PARSERS[name], folder, AT_ONCE * PARSERS[name].share, start, given.keep)
                for crash, trace in found.crashes.items():
                    if crash not in totals[name].crashes:
                        print(f"\n{name}, --start {start}: {crash}\n{trace}", flush=True)
                add(totals[name], found)
            start += 1
    print(f"\n{'':22}{'inputs':>9}{'refused':>9}{'crashes':>9}{'slowest':>11}")
    for name, counts in totals.items():
        line = f"{counts.inputs:9,}{counts.refused:9,}{len(counts.crashes):9,}{counts.slowest:9.2f} s"
        print(f"{name:22}{line}")
    inputs, crashes = (sum(each) for each in zip(*((c.inputs, len(c.crashes)) for c in totals.values()), strict=True))
    slowest = max(counts.slowest for counts in totals.values())
    print(f"{'all':22}{inputs:9,}{sum(c.refused for c in totals.values()):9,}{crashes:9,}{slowest:9.2f} s")
    return 1 if crashes else 0


def add(total: Counts, found: Counts) -> None:
    total.inputs += found.inputs
    total.refused += found.refused
    total.crashes.update(found.crashes)
    total.slowest = max(total.slowest, found.slowest)


if __name__ == "__main__":
    sys.exit(main())
