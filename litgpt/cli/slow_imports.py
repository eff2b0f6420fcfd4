"""A line on the terminal while a large library is imported: seconds, on a slow disk or a busy machine."""

import sys
import threading
from typing import Any

LARGE = {"torch": "PyTorch", "lm_eval": "lm-evaluation-harness", "transformers": "transformers", "datasets": "datasets"}
PATIENCE = 2.0  # seconds


class Announcer:
    """Looks on while modules are imported (an entry of `sys.meta_path`), and finds none itself.

    Args:
        patience: Seconds after which something is said.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self.patience = patience

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Called before each import."""
        if name in LARGE:
            timer = threading.Timer(self.patience, self._say, [name])
            timer.daemon = True
            timer.start()

    def _say(self, name: str) -> None:
        spec = getattr(sys.modules.get(name), "__spec__", None)
        if getattr(spec, "_initializing", False):  # importlib's own mark
            print(f"Starting: importing {LARGE[name]} ...", file=sys.stderr, flush=True)


def announce() -> None:
    """From here on, says which import one waits for. Where nobody watches, as in a log file, it says nothing."""
    if sys.stderr.isatty():
        sys.meta_path.insert(0, Announcer())
