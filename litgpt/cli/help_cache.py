"""The help of a command, kept for the next time: to make it takes seconds, as its signature names torch's types."""

import hashlib
import io
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from litgpt.cli.resources import cache_directory

PACKAGE = Path(__file__).parents[1]
LIBRARIES = ("jsonargparse", "torch")  # that write it, and whose classes it lists


def cached_help(command: str, print_help: Callable[[], object]) -> str:
    """The text of a command's help.

    Args:
        command: The subcommand.
        print_help: Prints the text; called where it is not kept yet, or was made from other sources.
    """
    kept = cache_directory() / "help" / f"{command}-{_sources(command)}.txt"
    with suppress(OSError, UnicodeDecodeError):
        return kept.read_text(encoding="utf-8")
    with redirect_stdout(io.StringIO()) as printed:
        print_help()
    with suppress(OSError):  # nowhere to keep it
        kept.parent.mkdir(parents=True, exist_ok=True)
        for earlier in kept.parent.glob(f"{command}-*.txt"):
            earlier.unlink()
        half = kept.with_suffix(f".{os.getpid()}")
        half.write_text(printed.getvalue(), encoding="utf-8")
        os.replace(half, kept)
    return printed.getvalue()


def _sources(command: str) -> str:
    """A digest of all that the text depends on; of files their size and time, as reading them takes longer."""
    facts: list[object] = [command, sys.version, shutil.get_terminal_size().columns]
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):
            facts.append(version(library))
    for file in sorted(PACKAGE.rglob("*.py")):
        status = file.stat()
        facts += str(file), status.st_size, status.st_mtime_ns
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
