"""One sample, two samples."""

import pytest

from litgpt.cli.plural import counted


@pytest.mark.parametrize(
    ("number", "words", "expected"),
    [
        (0, ("sample",), "0 samples"),
        (1, ("sample",), "1 sample"),
        (1234, ("token",), "1,234 tokens"),
        (1, ("reply", "replies"), "1 reply"),
        (2, ("reply", "replies"), "2 replies"),
    ],
)
def test_things_are_counted(number, words, expected):
    assert counted(number, *words) == expected
