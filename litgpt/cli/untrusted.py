"""JSON and YAML that came from a stranger: read with a bound on size, depth and number of values.

Whatever is wrong with such a file ends in one `ValueError` that names it. Nothing here imports torch.

A text of n bytes costs time and memory in proportion to n, and no more: Python's own readers recurse once for each
level (so that brackets alone bring them down), and YAML's aliases and merge keys let a few lines stand for gigabytes.
"""

from __future__ import annotations

import json
import math
import re
import stat
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

MAX_DEPTH = 64
"""Levels of lists and objects; files of models have fewer than ten."""
SETTINGS_BYTES = 16 << 20
"""A settings file. The largest known, tokenizer_config.json with its added tokens, have two megabytes."""
LARGE_BYTES = 256 << 20
"""A tokenizer's vocabulary, or the index of a very large model; the largest known have 35 megabytes."""
YAML_BYTES = 1 << 18
"""PyYAML reads 200 KB a second; model_config.yaml has three."""
MAX_VALUES = 4_000_000
"""Values in one file: each takes up to a hundred bytes of memory."""
MAX_YAML_VALUES = 100_000
"""The same in a YAML file, each alias counted as what it stands for."""
MAX_INTEGER = 2**63 - 1

_BRACKET = re.compile(r"[\[\]{}]")
_REPETITION = re.compile(r"[*+]|\{\d*,\}")
NO_JSON = "is not valid JSON"
NO_YAML = "is not valid YAML"
FETCH_AGAIN = "Download it again."


class ExcessError(ValueError):
    """A text is nested too deep, or stands for more than a reader has time and memory for."""


def parse_json(
    text: str | bytes | bytearray, unique_keys: bool = False, deep: bool = False, max_values: int | None = None
) -> Any:
    """What a JSON text says, nested at most MAX_DEPTH levels deep; as quick as `json.loads`.

    Args:
        text: The text; bytes are UTF-8.
        unique_keys: Refuse an object that has a key twice, of which other readers may take the first.
        deep: Only what Python's reader cannot read is nested too deep; saves a pass over a large file of data.
        max_values: How many values it may have at most, counted by their commas and brackets before any is made.

    Raises:
        ValueError: It is not valid, nested too deep, or has too many values.
    """
    if max_values is not None:
        check_count(text, max_values)
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    except RecursionError:
        raise ExcessError(_too_deep()) from None
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) or "digits" not in str(error):
            raise
        raise ExcessError(f"it has an integer of more than {sys.get_int_max_str_digits():,} digits") from None
    brackets = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    if not deep and sum(map(text.count, brackets)) > MAX_DEPTH:
        _check_depth(value)
    return value


def check_count(text: str | bytes | bytearray, at_most: int = MAX_VALUES) -> None:
    """Refuses a text that stands for too many values, by its commas and brackets, before any is made.

    Raises:
        ExcessError: It does.
    """
    marks = (",", "[", "{") if isinstance(text, str) else (b",", b"[", b"{")
    count = sum(map(text.count, marks))
    if count > at_most:
        raise ExcessError(f"it has about {count:,} values, where {at_most:,} are the most")


def parse_json_object(
    text: str | bytes, name: str, remedy: str = FETCH_AGAIN, unique_keys: bool = False
) -> dict[str, Any]:
    """The JSON object in a text; `name` is what errors call it, without quotation marks.

    Raises:
        ValueError: It is not valid, or something else; names it and says the remedy.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")  # some editors put a mark before it
        check_count(text)
        content = parse_json(text, unique_keys)
    except ValueError as error:
        raise _wrong(name, f"{NO_JSON} ({_short(error)})", remedy) from None
    if not isinstance(content, dict):
        raise _wrong(name, f"is {json_kind(content)}, where an object of settings is expected", remedy)
    return content


def read_json_object(path: Path, remedy: str = FETCH_AGAIN, limit: int = SETTINGS_BYTES) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: The file.
        remedy: What errors say is to be done.
        limit: Bytes that such a file can have.

    Raises:
        OSError: It cannot be read; FileNotFoundError where it is not there.
        ValueError: It is not valid, too large, or something else than an object; names it.
    """
    return parse_json_object(read_bounded(path, limit, remedy), str(path), remedy)


def read_yaml_mapping(
    path: Path, remedy: str = "Correct it, or copy it again from where it came.", limit: int = YAML_BYTES
) -> dict[Any, Any]:
    """The `key: value` lines of a YAML file. As `read_json_object`; an empty file is an error, too."""
    content = parse_yaml(read_bounded(path, limit, remedy), str(path), remedy)
    if not isinstance(content, dict):
        raise _wrong(path, f"is {json_kind(content)}, where `key: value` lines are expected", remedy)
    return content


def parse_yaml(text: str | bytes, name: str, remedy: str) -> Any:
    """What a YAML text says, in plain Python types; `name` is what errors call it.

    Raises:
        ValueError: It is not valid, or stands for more than it says; names it.
    """
    try:
        return load_yaml(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:  # of a date, an integer, a key
        raise _wrong(name, f"{NO_YAML} ({_short(error)})", remedy) from None


def load_yaml(text: str) -> Any:
    """As `yaml.safe_load`, which takes a bomb for what it says.

    Raises:
        ExcessError: It is nested too deep, or stands for too many values.
        yaml.YAMLError: It is not valid.
        ValueError, TypeError: A date, a number or a key is none.
    """
    _check_brackets(text)
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node)
        return loader.construct_document(node)
    except RecursionError:
        raise ExcessError(_too_deep()) from None
    finally:
        loader.dispose()


def read_bounded(path: Path, limit: int = SETTINGS_BYTES, remedy: str = FETCH_AGAIN) -> bytes:
    """The bytes of a regular file, which may be a link to one, as in the Hub's cache.

    Raises:
        OSError: It cannot be read; FileNotFoundError where it is not there.
        ValueError: It has more than `limit` bytes, or is a device or pipe.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise _wrong(path, "is not a file", remedy)
    with path.open("rb") as file:
        content = file.read(limit + 1) if status.st_size <= limit else b""
    if status.st_size > limit or len(content) > limit:
        raise _wrong(path, f"has {status.st_size:,} bytes, where such a file has {limit:,} at most", remedy)
    return content


def read_text(path: Path, limit: int = SETTINGS_BYTES, remedy: str = FETCH_AGAIN) -> str:
    """The same as UTF-8 text."""
    content = read_bounded(path, limit, remedy)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _wrong(path, f"is not UTF-8 text ({error.reason} at byte {error.start:,})", remedy) from None


def is_count(value: Any, at_most: int = MAX_INTEGER) -> bool:
    """Whether it is an integer from 0 on, which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= at_most


def json_kind(value: Any) -> str:
    """What a value is called in JSON, with its article."""
    kinds: Iterable[tuple[type, str]] = (
        (bool, "a boolean"),
        (int, "a number"),
        (float, "a number"),
        (str, "a text"),
        (list, "a list"),
        (dict, "an object"),
    )
    return "empty" if value is None else next((name for kind, name in kinds if isinstance(value, kind)), "a value")


def shown(value: Any, at_most: int = 60) -> str:
    """A value for a message: its beginning alone where it is long, without making the whole of it."""
    if isinstance(value, str | bytes):
        text = repr(value[:at_most])
    elif isinstance(value, list | tuple):
        text = f"[{', '.join(shown(each, 20) for each in value[:4])}{', ...' if len(value) > 4 else ''}]"
    elif isinstance(value, dict):
        text = f"an object of {len(value)} entries"
    elif isinstance(value, int) and abs(value) > MAX_INTEGER:
        text = f"an integer of {value.bit_length()} bits"
    else:
        text = repr(value)
    return text if len(text) <= at_most else f"{text[:at_most]}..."


def _wrong(name: str | Path, what: str, remedy: str) -> ValueError:
    return ValueError(f"'{name}' {what}. {remedy}".removesuffix(". "))


def _too_deep() -> str:
    return f"it is nested more than {MAX_DEPTH} levels deep"


def _short(error: Exception) -> str:
    """The first line of what a library says; YAML's with its place."""
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"{getattr(error, 'problem', None) or 'not readable'}, line {mark.line + 1}"[:200]
    return str(error).partition("\n")[0][:200]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("it has a key twice")
    return content


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inner(outer)]
        if not level:
            return
    raise ExcessError(_too_deep())


def _inner(value: Any) -> Iterable[Any]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [each for each in values if isinstance(each, dict | list)]


def _check_brackets(text: str) -> None:
    """PyYAML looks ahead as far as brackets are open, so that it takes seconds before it gives up."""
    depth = 0
    for bracket in _BRACKET.finditer(text):
        depth += 1 if bracket[0] in "[{" else -1 if depth else 0
        if depth > MAX_DEPTH:
            raise ExcessError(_too_deep())


def _check_nodes(root: yaml.Node) -> None:
    """Counts what a document stands for, each alias as what it is an alias of, without following it twice."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()
    stack: list[tuple[yaml.Node, bool]] = [(root, False)]
    while stack:
        node, is_done = stack.pop()
        children = _children(node)
        if is_done:
            open_nodes.discard(id(node))
            sizes[id(node)] = size = 1 + sum(sizes[id(child)] for child in children)
            if size > MAX_YAML_VALUES:
                raise ExcessError(f"it stands for more than {MAX_YAML_VALUES:,} values")
        elif id(node) in open_nodes:
            raise ExcessError("an alias in it stands for itself")
        elif id(node) not in sizes:
            if len(open_nodes) >= MAX_DEPTH:
                raise ExcessError(_too_deep())
            open_nodes.add(id(node))
            stack.append((node, True))
            stack += [(child, False) for child in children]


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def is_slow(pattern: str, alternatives: bool = False) -> bool:
    """Whether a regular expression repeats something that repeats itself, as `(a+)+`: a search for it can take a time
    that doubles with every letter.

    Args:
        pattern: The expression; those of Python, Oniguruma and Rust are alike in what is looked at here.
        alternatives: Count a choice that is repeated, as `(a|b)*`, and more than four repetitions, too.
    """
    groups, last_group, repetitions, i = [False], False, 0, 0
    while i < len(pattern):
        letter = pattern[i]
        repeated = _REPETITION.match(pattern, i)
        closed, last_group = last_group, False
        if letter == "\\":
            i += 2
            continue
        if letter == "[":
            i = _end_of_class(pattern, i)
            continue
        if repeated:
            repetitions += 1
            if closed:
                return True
            groups[-1] = True
            i = repeated.end()
            continue
        if letter == "(":
            groups.append(False)
            i += 2 if pattern.startswith("(?", i) else 1  # that question mark repeats nothing
            continue
        if letter == ")" and len(groups) > 1:
            last_group = groups.pop()
            groups[-1] |= last_group
        elif letter == "|" and alternatives and len(groups) > 1:
            groups[-1] = True
        i += 1
    return alternatives and repetitions > 4


def _end_of_class(pattern: str, start: int) -> int:
    """The place behind a class of characters, in which there may be others."""
    depth, i = 0, start
    while i < len(pattern):
        if pattern[i] == "\\":
            i += 1
        elif pattern[i] == "[" and not (depth and pattern[i - 1] == "["):
            depth += 1
        elif pattern[i] == "]" and i > start + 1 and pattern[i - 2 : i] != "[^":
            depth -= 1
            if depth == 0:
                return i + 1
        i += 1
    return i


def number_of(value: Any, fractions: bool) -> int | float | None:
    """A number that a file holds as one or as text; None where it is none, or has a fraction where it may not."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        value = float(value) if isinstance(value, str) else value
    except ValueError:
        return None
    if not is_finite(value):
        return None
    if fractions:
        return value
    return int(value) if float(value).is_integer() else None


def is_finite(value: Any) -> bool:
    """Whether it is a number that a float can hold, which neither infinity nor true is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= MAX_INTEGER if isinstance(value, int) else math.isfinite(value)
