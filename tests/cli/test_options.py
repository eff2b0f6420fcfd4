"""The options of all commands are what `options.txt` says: a change of a name, a type or a default is a decision."""

import difflib
from pathlib import Path

from tests.cli import options

FROZEN = Path(__file__).with_name("options.txt")


def test_options_are_those_that_were_decided_on():
    decided, found = FROZEN.read_text(encoding="utf-8").splitlines(), options.every_option()
    changes = [
        line for line in difflib.unified_diff(decided, found, lineterm="", n=0) if line[:2] not in ("--", "++", "@@")
    ]
    assert not changes, "\n".join(
        [
            "the options have changed:",
            *changes,
            "If that is meant, write it down: python -m tests.cli.options > tests/cli/options.txt",
        ]
    )
