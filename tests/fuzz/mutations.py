"""Damage to valid files, drawn by hypothesis: to what a file says, to how it says it, and to its bytes."""

import copy
import json
import struct
from collections.abc import Callable
from typing import Any

import yaml
from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy], Any]

NUMBERS = [
    0,
    -1,
    1,
    2,
    3,
    7,
    255,
    2**15,
    10_001,
    2**24,
    2**31,
    2**32 - 1,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    10**12,
    10**400,
]
FRACTIONS = [0.0, -0.0, 0.5, -1.5, 1e-320, 1e30, float("inf"), float("-inf"), float("nan")]
TEXTS = [
    "",
    "x",
    "1",
    "../x",
    "/etc/passwd",
    "\0",
    "\ud800",
    "a" * 3000,
    "linear",
    "yarn",
    "default",
    "F32",
    "(a+)+",
    "{{",
]
NESTED: list[Any] = [
    [],
    [1],
    [[]],
    ["a"],
    [None],
    [-1],
    [[1, 2]],
    {},
    {"a": 1},
    {"content": 3},
    {"type": "x"},
    {"String": ""},
]
ANYTHING = st.sampled_from([None, True, False, *NUMBERS, *FRACTIONS, *TEXTS, *NESTED]).map(copy.deepcopy)
# What a length, an offset, a count or a type number of a binary file may be taken for.
WORDS = [0, 1, 2, 3, 4, 7, 8, 9, 12, 31, 33, 2**16, 2**31 - 1, 2**31, 2**32 - 1]
LONG_WORDS = [*WORDS, 2**40, 2**60, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def values(draw: Draw, content: Any) -> Any:
    """The same as `content` (of JSON's types) but for one to three entries."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        parent, key = _place(draw, content)
        if parent is None:
            continue
        change = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "move", "deepen"]))
        if change == "remove":
            del parent[key]
        elif change == "move":
            other, place = _place(draw, content)
            parent[key] = copy.deepcopy(other[place]) if other is not None else draw(ANYTHING)
        elif change == "deepen":
            for _ in range(draw(st.sampled_from([1, 2, 60, 70, 200]))):
                parent[key] = [parent[key]] if draw(st.booleans()) else {"a": parent[key]}
        elif change == "add" and isinstance(parent, dict):
            parent[draw(st.sampled_from(["x", "", "type", "n_layer", "\0", *map(str, list(parent)[:5])]))] = draw(
                ANYTHING
            )
        else:
            parent[key] = draw(ANYTHING)
    return content


def _place(draw: Draw, content: Any) -> tuple[Any, Any]:
    """A list or object within `content`, and a key in it."""
    parent, key = None, None
    while isinstance(content, dict | list) and content and (parent is None or draw(st.integers(0, 3))):
        keys = list(content) if isinstance(content, dict) else range(len(content))
        parent, key = content, keys[draw(st.integers(0, len(keys) - 1))]
        content = parent[key]
    return parent, key


def json_file(draw: Draw, content: Any) -> bytes:
    """A JSON file that says nearly the same as `content`, or whose text is damaged."""
    text = json.dumps(values(draw, content)) if draw(st.integers(0, 5)) else json.dumps(content)
    return raw(draw, text.encode(), 1) if not draw(st.integers(0, 4)) else text.encode()


def yaml_file(draw: Draw, content: Any) -> bytes:
    """The same of YAML."""
    text = yaml.safe_dump(values(draw, content)).encode("utf-8", "replace")
    return raw(draw, text, 1) if not draw(st.integers(0, 3)) else text


IN_PLACE = ["flip", "word", "long"]


def raw(draw: Draw, content: bytes, most: int = 3, head: int | None = None, in_place: bool = False) -> bytes:
    """The same as `content` but for some bytes.

    Args:
        draw: Draws.
        content: The bytes.
        most: How many changes there are at most.
        head: Most of them are within this many bytes.
        in_place: What follows a change stays where it was.
    """
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, most))):
        size = min(len(changed), head) if head and draw(st.integers(0, 4)) else len(changed)
        place = draw(st.integers(0, max(0, size - 1)))
        change = draw(st.sampled_from(IN_PLACE if in_place else [*IN_PLACE, "cut", "remove", "repeat", "insert"]))
        if change == "flip" and changed:
            changed[place] ^= 1 << draw(st.integers(0, 7))
        elif change == "word":
            changed[place : place + 4] = struct.pack("<I", draw(st.sampled_from(WORDS)))
        elif change == "long":
            changed[place : place + 8] = struct.pack("<Q", draw(st.sampled_from(LONG_WORDS)))
        elif change == "cut":
            del changed[place:]
        elif change == "remove":
            del changed[place : place + draw(st.integers(1, 40))]
        elif change == "repeat":
            changed[place:place] = changed[place : place + draw(st.integers(1, 200))]
        else:
            changed[place:place] = draw(
                st.sampled_from([b"\xff", b"\0", b"[" * 70, b"{" * 2000, b'"', b"&a *a", b"9" * 5000])
            )
    return bytes(changed)
