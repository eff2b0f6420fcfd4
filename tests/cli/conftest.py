from collections.abc import Callable
from typing import NamedTuple

import pytest

from litgpt.__main__ import main


class Result(NamedTuple):
    """What the program left: its exit code and the two streams."""

    code: int
    out: str
    err: str


@pytest.fixture
def litgpt(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """The program, run in this process: `litgpt("download", "list")`."""

    def run(*argv: object) -> Result:
        capsys.readouterr()
        code = main([str(word) for word in argv])
        return Result(code, *capsys.readouterr())

    return run
