"""Directories of files that are made from something else, for as long as the process lives."""

import tempfile
from pathlib import Path

_KEPT: list[tempfile.TemporaryDirectory] = []  # removed at exit: a tokenizer reads its files when it needs them


def kept_directory(prefix: str) -> Path:
    """A new, empty directory that is removed when the process ends."""
    temporary = tempfile.TemporaryDirectory(prefix=prefix)
    _KEPT.append(temporary)
    return Path(temporary.name)
