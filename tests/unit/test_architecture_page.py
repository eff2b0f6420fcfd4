"""tutorials/architecture.md leads to files and functions that exist, through the layers that are checked."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "tutorials/architecture.md"
TEXT = PAGE.read_text(encoding="utf-8")

# [`Engine.step`](../litgpt/generation/engine.py), and the nodes of the diagram: name["generation/engine.py<br/>Engine"]
LINKS = re.findall(r"\[([^\[\]]*)\]\(\.\./(litgpt/[^)]*)\)", TEXT)
STOPS = [(path, name) for words, path in LINKS for name in re.findall(r"`([\w.]+)`", words) if name != Path(path).name]
NODES = [(f"litgpt/{path}", name) for path, name in re.findall(r'\["([^"]*\.py)<br/>([^"]*)"\]', TEXT)]
PATHS = {path for _, path in LINKS} | set(re.findall(r"`(litgpt/[^`]+)`", TEXT))


def defined_in(file: Path) -> set[str]:
    """The names that a file defines at its top level, and those of its classes behind theirs."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        names |= names_of(node)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{name}" for member in node.body for name in names_of(member)}
    return names


def names_of(node: ast.stmt) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def test_there_is_something_to_check():
    assert len(STOPS) > 40
    assert len(NODES) > 10
    assert len(NODES) == TEXT.count("<br/>")


@pytest.mark.parametrize("path", sorted(PATHS))
def test_every_path_exists(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize(("path", "name"), sorted({*STOPS, *NODES}))
def test_every_stop_is_defined_where_the_page_says(path, name):
    assert name in defined_in(ROOT / path)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_the_layers_are_those_that_are_checked():
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    checked = next(contract["layers"] for contract in settings["contracts"] if contract["type"] == "layers")
    table = [re.findall(r"`(\w+)`", row) for row in re.findall(r"^\| (`.*?) \|", TEXT, flags=re.MULTILINE)]
    assert table == [re.findall(r"litgpt\.(\w+)", layer) for layer in checked if layer != "litgpt.__main__"]
