"""What is said about building and compiling, on stderr and never within an answer."""

from __future__ import annotations

import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager

_speaking = threading.Lock()
_waiting: list[str] | None = None  # notes, while an answer is printed


@contextmanager
def notes_wait() -> Generator[None, None, None]:
    """Within `with` an answer is being printed: a note that goes to stderr would stand in the middle of it, so it waits
    until the end."""
    global _waiting
    with _speaking:
        _waiting = []
    try:
        yield
    finally:
        with _speaking:
            notes, _waiting = _waiting, None
        sys.stdout.flush()
        for note in notes:
            say_note(note)


def say_note(text: str) -> None:
    with _speaking:
        if _waiting is None:
            print(text, file=sys.stderr, flush=True)
        else:
            _waiting.append(text)
