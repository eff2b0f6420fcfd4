"""How messages about records name what they found."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def listed(names: Iterable[Any]) -> str:
    """Names in quotes, separated by commas."""
    return ", ".join(repr(str(name)) for name in names) or "none"


def value_kind(value: Any) -> str:
    """What kind of value something is, or the value itself where that is short."""
    names = {dict: "an object", list: "an empty list" if value == [] else "a list", str: "a text", type(None): "null"}
    return names.get(type(value), f"{value!r}"[:40])
