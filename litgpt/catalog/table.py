"""The README's table of the known checkpoints: `python -m litgpt.catalog.table README.md` brings it up to date."""

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from litgpt.catalog import KnownCheckpoint, known_checkpoints

HEADER = "| series | checkpoints | parameters | context | licence | architecture |\n|---|---|---|---|---|---|"
MARKED = re.compile(r"(<!-- models[^>]*-->\n).*?(<!-- /models -->)", re.DOTALL)
SIZE = re.compile(r"(?<![a-z\d.])(\d+x)?\d+(\.\d+)?[bm](-a\d+b)?(?![a-z\d.])", re.IGNORECASE)
UNKNOWN = "see its page"


def models_table() -> str:
    """Markdown: one row for each series."""
    series: dict[str, list[KnownCheckpoint]] = {}
    for checkpoint in known_checkpoints().values():
        series.setdefault(checkpoint.series, []).append(checkpoint)
    return "\n".join([HEADER, *(_row(name, members) for name, members in series.items())])


def update(text: str) -> str:
    """A document with the table between its markers as it is now."""
    return MARKED.sub(lambda marks: f"{marks[1]}{models_table()}\n{marks[2]}", text)


def _row(series: str, members: list[KnownCheckpoint]) -> str:
    cells = (
        series,
        "<br>".join(f"`{pattern}`" for pattern in collapsed(member.repo_id for member in members)),
        _distinct(sorted(member.parameters for member in members), _rounded),
        _distinct(sorted(member.config.get("block_size", 4096) for member in members), _context),
        _distinct((member.license for member in members), lambda license: license or UNKNOWN),
        _distinct((member.architecture for member in members), "`{}`".format),
    )
    return f"| {' | '.join(cells)} |"


def collapsed(names: Iterable[str]) -> list[str]:
    """Names in the shell's notation: `org/x-{1B,3B}{,-Instruct}` stands for four of them."""
    sizes: dict[tuple[str, str], list[str]] = {}  # by what stands before and after them
    for name in names:
        size = SIZE.search(name)
        start, end = size.span() if size else (len(name), len(name))
        sizes.setdefault((name[:start], name[end:]), []).append(name[start:end])
    suffixes: dict[tuple[str, tuple[str, ...]], list[str]] = {}  # by what stands before them
    for (before, after), between in sizes.items():
        suffixes.setdefault((before, tuple(between)), []).append(after)
    return [before + _braces(between) + _braces(after) for (before, between), after in suffixes.items()]


def _braces(choices: Iterable[str]) -> str:
    choices = list(choices)
    return choices[0] if len(choices) == 1 else f"{{{','.join(choices)}}}"


def _distinct(values: Iterable[Any], form: Callable[[Any], str]) -> str:
    return ", ".join(dict.fromkeys(form(value) for value in values))


def _rounded(parameters: int) -> str:
    """Three digits and a unit: 1.24B."""
    rounded = float(f"{parameters:.3g}")
    unit, letter = next(pair for pair in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1, "")) if rounded >= pair[0])
    return f"{rounded / unit:g}{letter}"


def _context(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(update(path.read_text(encoding="utf-8")), encoding="utf-8")
