"""A fixed number of damaged files through every reader; `python -m tests.fuzz` tries more."""

import pytest

from tests.fuzz.parsers import PARSERS, Folder
from tests.fuzz.run import fuzz

INPUTS = 100  # for each share


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Folder(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", PARSERS)
def test_damaged_files_end_in_a_clean_error(folder, name):
    parser = PARSERS[name]
    counts = fuzz(parser, folder, INPUTS * parser.share)
    assert not counts.crashes, "\n".join(counts.crashes.values())
    assert counts.refused > counts.inputs // 20  # the damage is found
