"""The house keeps its rules: where things are, how they are called, how long a file is."""

import ast
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import litgpt
import litgpt.adaptation.lora

PACKAGE = Path(litgpt.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# One module per format on the way in and on the way out; these implement one interface each.
FORMATS = {"gguf.py", "huggingface.py", "lit.py", "peft.py"}
LINES, ENTRIES = 500, 27


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def test_one_name_one_file():
    places = defaultdict(list)
    for file in FILES:
        places[file.name].append(str(file.relative_to(PACKAGE)))
    twice = {name: found for name, found in places.items() if len(found) > 1}
    assert {name for name in twice if name not in {"__init__.py", *FORMATS}} == set()


def test_the_top_level_can_be_read_at_a_glance():
    entries = [path.name for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "py.typed", "config_hub")]
    assert len(entries) <= ENTRIES, sorted(entries)


def test_a_file_has_one_subject():
    long = {module_of(file): len(file.read_text().splitlines()) for file in FILES}
    # The model is mathematics, and one file on purpose.
    assert {name: lines for name, lines in long.items() if lines > LINES and name != "litgpt.model"} == {}


def imported_by(file: Path, modules: set[str]) -> set[str]:
    """The modules of the package that a file imports anywhere, also within functions and for types alone."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= whole & modules or {node.module}
    return found & modules - {module_of(file)}


def test_no_file_imports_itself_by_a_detour():
    modules = {module_of(file) for file in FILES}
    graph = {module_of(file): imported_by(file, modules) for file in FILES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(
        modules
    )  # raises CycleError, which names the circle


def test_modules_under_the_names_that_litgpt_users_type():
    import litgpt.api
    import litgpt.lora

    assert litgpt.api.LLM is litgpt.LLM
    assert litgpt.lora.merge_lora is litgpt.adaptation.lora.merge_lora
    assert litgpt.lora is litgpt.adaptation.lora
