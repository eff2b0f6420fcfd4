"""How far the requests are, with the time left."""

from __future__ import annotations

import sys

from tqdm import tqdm


def bar(total: int, what: str, unit: str = "request") -> tqdm:
    """A bar on stderr; where that is a file, a line now and then."""
    seldom = 0.1 if sys.stderr.isatty() else 15
    return tqdm(total=total, desc=what, unit=unit, mininterval=seldom, maxinterval=seldom)
