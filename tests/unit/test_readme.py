"""The README tells the truth about the tree and the subcommands."""

import re
from itertools import product
from pathlib import Path

from litgpt.__main__ import COMMANDS
from litgpt.catalog import known_checkpoints
from litgpt.catalog.table import update

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_table_lists_exactly_the_subcommands():
    assert re.findall(r"^\| `(\w+)` \|", README, flags=re.M) == list(COMMANDS)


def test_every_entry_of_the_annotated_tree_exists():
    tree = README.split("```\nlitgpt/\n")[1].split("```")[0]
    entries = re.findall(r"^( *)(\S+)", tree, flags=re.M)
    missing = [name for indent, name in entries if not (ROOT / ("litgpt" if indent else "") / name).exists()]
    assert not missing


def test_every_module_is_in_the_annotated_tree():
    names = {path.name for path in (ROOT / "litgpt").iterdir() if path.suffix == ".py" or path.is_dir()}
    names -= {"__pycache__", "__init__.py"}
    tree = README.split("```\nlitgpt/\n")[1].split("```")[0]
    assert not [name for name in names if not re.search(rf"^  {re.escape(name)}/? ", tree, flags=re.M)]


def test_table_of_models_is_up_to_date():
    assert update(README) == README, "python -m litgpt.catalog.table README.md"


def test_table_of_models_has_every_checkpoint_once():
    table = README.split("<!-- models")[1].split("<!-- /models -->")[0]
    names = [name for pattern in re.findall(r"`([^`]+/[^`]+)`", table) for name in _expanded(pattern)]
    assert sorted(names) == sorted(known_checkpoints())


def _expanded(pattern: str) -> list[str]:
    """The names that braces stand for, as in a shell."""
    parts = re.split(r"\{(.*?)\}", pattern)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in product(*choices)]
