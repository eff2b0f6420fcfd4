"""Pages lead to files and functions that exist; and what stands next to the README says what is so."""

import ast
import os
import re
import sys
from pathlib import Path

import pytest
import yaml

import litgpt

ROOT = Path(__file__).parents[2]
ARCHITECTURE = (ROOT / "tutorials/architecture.md").read_text(encoding="utf-8")
PAGES = ("tutorials/architecture.md", "CONTRIBUTING.md", "SECURITY.md")

# The nodes of the diagram: name["generation/engine.py<br/>Engine"]
NODES = re.findall(r'\["([^"]*\.py)<br/>([^"]*)"\]', ARCHITECTURE)


def links_of(page: str) -> list[tuple[str, str]]:
    """What a page says of files of the package, and which: [`Engine.step`](../litgpt/generation/engine.py)."""
    links = re.findall(r"\[([^\[\]]*)\]\(([^)\s]*)\)", (ROOT / page).read_text(encoding="utf-8"))
    paths = [(words, os.path.normpath(Path(page).parent / link)) for words, link in links if ":" not in link]
    return [(words, path) for words, path in paths if path.startswith("litgpt/")]


def paths_of(page: str) -> set[str]:
    """All files and directories that a page names."""
    code = re.findall(r"`((?:litgpt|tests|extensions)/[\w./]+)`", (ROOT / page).read_text(encoding="utf-8"))
    return {path for _, path in links_of(page)} | set(code)


LINKS = [(path, words) for page in PAGES for words, path in links_of(page)]
STOPS = {(path, name) for path, words in LINKS for name in re.findall(r"`([\w.]+)`", words) if name != Path(path).name}
STOPS |= {(f"litgpt/{path}", name) for path, name in NODES}


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
    assert len(STOPS) > 50
    assert len(NODES) == ARCHITECTURE.count("<br/>") > 10


@pytest.mark.parametrize("page", PAGES)
def test_every_path_of_a_page_exists(page):
    assert paths_of(page)
    assert not [path for path in paths_of(page) if not (ROOT / path).exists()]


@pytest.mark.parametrize(("path", "name"), sorted(STOPS))
def test_every_stop_is_defined_where_a_page_says(path, name):
    assert name in defined_in(ROOT / path)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_the_layers_are_those_that_are_checked():
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    checked = next(contract["layers"] for contract in settings["contracts"] if contract["type"] == "layers")
    table = [re.findall(r"`(\w+)`", row) for row in re.findall(r"^\| (`.*?) \|", ARCHITECTURE, flags=re.MULTILINE)]
    assert table == [re.findall(r"litgpt\.(\w+)", layer) for layer in checked if layer != "litgpt.__main__"]


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what the format asks for
    assert citation["version"] == litgpt.__version__
