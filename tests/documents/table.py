"""What a row of the tables is, and what rows have in common."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from tests.documents.place import Place
    from tests.shell import Done

Check = Callable[["Place", "Done"], None]
Kind = Literal["shell", "python", "yaml", "json", "options", "output", "prose"]


@dataclass(frozen=True)
class Row:
    """A command, a block of code or data, or what a command prints, as a document has it."""

    typed: str
    """As it stands there, comments on lines of their own left off. Of an `output` or `prose`, the first line."""
    kind: Kind = "shell"
    """`options` are words to put behind a command, and `run` is the whole command. An `output` is what a row before
    prints, whose `then` holds it to what matters; `prose` is neither."""
    run: str | None = None
    """What is evidently meant, where it cannot be run as typed: a comment behind a backslash, a missing backslash, a
    script's name instead of the subcommand's. Where None, it is run as typed."""
    extra: str = ""
    """What the test puts behind the command to scale it down to seconds."""
    then: Check | None = None
    """Holds what came out to what the document says."""
    needs: tuple[str, ...] = ()
    """Files that earlier rows make; made by the place where a row is run alone."""
    code: int = 0
    """The exit code that is expected."""
    stdin: str = ""
    reason: str = ""
    """Why it does not hold as typed, and what a user gets."""
    serves: Callable[..., None] | None = None
    """The command goes on until it is stopped; this asks it something, given the place."""
    names: dict[str, Any] | None = None
    """Of Python, the names that the code finds."""
    off: str = ""
    """The subcommand, data module or recipe that the row waits for."""


def output(first: str) -> Row:
    return Row(first, "output")


def prose(first: str) -> Row:
    return Row(first, "prose")


def without_comments(text: str) -> str:
    """A command whose lines have a comment behind the backslash."""
    return re.sub(r"(\\)?[ \t]+#.*$", lambda found: f" {found[1] or ''}".rstrip(" "), text, flags=re.M)


def lines_of(text: str) -> list[str]:
    """The lines of a block that say something: no empty ones, no comments on lines of their own; spaces as they may be."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "```"))]


def prints(*texts: str) -> Check:
    """The command printed each of these."""

    def check(place: Place, done: Done) -> None:
        for text in texts:
            assert text in done.out + done.err, text

    return check


def makes(*paths: str, says: tuple[str, ...] = ()) -> Check:
    """The files are there now; a `*` stands for anything."""

    def check(place: Place, done: Done) -> None:
        for path in paths:
            assert list(place.directory.glob(path.rstrip("/"))), path
        prints(*says)(place, done)

    return check
