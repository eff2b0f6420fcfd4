"""The house keeps its rules: where things are, how they are called, how long a file is."""

import ast
import io
import re
import tokenize
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import litgpt
import litgpt.adaptation.lora

PACKAGE = Path(litgpt.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# One module per format on the way in and on the way out; these implement one interface each.
FORMATS = {"gguf.py", "huggingface.py", "lit.py", "peft.py"}
# What prompts ask of a tokenizer, and the class that is one.
INTERFACES = {"Tokenizer"}
LINES, ENTRIES = 500, 27
# Names that once stood here, and what torch, vLLM and the papers call these things.
WORDS = {
    "add_up": "all_reduce",
    "side_by_side": "all_gather",
    "hand_out": "broadcast",
    "least": "all_reduce_min, or minimum",
    "meet": "rendezvous",
    "of_x": "grad_x",
    "of_w": "grad_w",
    "of_weight": "grad_weight",
    "of_q": "grad_q",
    "HIDDEN": "MASKED",
    "hidden_where": "additive_mask",
    "range_of_rows": "OneSamplePerRow",
    "likeliest": "top_logprobs",
    "most_slots": "max_slots",
    "SLOTS": "MAX_SLOTS",
}


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


def names_in(text: str) -> dict[str, int]:
    """Each identifier of a file's code, and the last line with it; comments, texts and docstrings are not code."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {token.string: token.start[0] for token in tokens if token.type == tokenize.NAME}


def test_things_have_the_names_of_the_field():
    assert names_in('add_up = 1  # meet\n"""least"""\n') == {"add_up": 1}
    for file in FILES:
        names = names_in(file.read_text())
        found = [f"{file}:{names[old]}: {old} -> {new}" for old, new in WORDS.items() if old in names]
        assert not found, "\n".join(found)
        assert file.stem not in WORDS, f"{file} -> {WORDS[file.stem]}"
    for file in PACKAGE.rglob("*.h"):  # whole: the comments of C++ have none of these words either
        found = {name: WORDS[name] for name in re.findall(r"\w+", file.read_text()) if name in WORDS}
        assert not found, (file, found)


def test_classes_have_the_names_of_classes():
    assert [name for name in classes_by_name() if not name.lstrip("_")[:1].isupper()] == []


def test_one_name_one_class():
    twice = {name: files for name, files in classes_by_name().items() if len(files) > 1 and name[0] != "_"}
    assert {name: files for name, files in twice.items() if name not in INTERFACES} == {}
    assert twice.keys() >= INTERFACES


def test_errors_of_library_code_name_fields():
    """`r=0`, or `r` in backticks; the command line alone writes --lora_r 0 (litgpt/cli/option_names.py)."""
    assert options_in("raise ValueError(f'--lora_r {r}: too small')") == ["--lora_r"]
    assert options_in("raise ValueError(f'r={r}: see `litgpt finetune_lora ' '--help`')") == []
    below = [file for file in FILES if file.relative_to(PACKAGE).parts[0] not in ("cli", "commands", "__main__.py")]
    assert {str(file): found for file in below if (found := options_in(file.read_text()))} == {}


def options_in(source: str) -> list[str]:
    """The options that raised texts name, those of a command line in backticks apart."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise):
            parts = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str))
            found += re.findall(r"(?<![\w-])--[a-z_.]+", re.sub(r"`[^`]*`", "", "".join(parts)))
    return found


def classes_by_name() -> dict[str, list[str]]:
    """Where the classes of each name are."""
    places = defaultdict(list)
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(module_of(file))
    return places
