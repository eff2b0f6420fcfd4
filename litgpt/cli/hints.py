"""Questions about type hints."""

import dataclasses
import inspect
import types
import typing
from pathlib import Path
from typing import Any, Literal

WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}


def members(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the hint itself."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(member for part in typing.get_args(hint) for member in members(part))
    return (hint,)


def without_none(hint: Any) -> Any:
    """`X | None` -> `X`; other unions as they are."""
    rest = [member for member in members(hint) if member is not type(None)]
    return rest[0] if len(rest) == 1 else hint


def admits(hint: Any, *wanted: type) -> bool:
    """Whether one of the types is a member of the hint."""
    return any((typing.get_origin(member) or member) in wanted for member in members(hint))


def readable(hint: Any) -> str:
    """What a type hint admits, in words: `a number (or null)`."""
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    parts = members(hint)
    rest = [readable(part) if part is not hint else _name(part) for part in parts if part is not type(None)]
    return " or ".join(rest) + (" (or null)" if type(None) in parts and rest else "")


def _name(hint: Any) -> str:
    if hint in WORDS:
        return WORDS[hint]
    return hint.__name__ if inspect.isclass(hint) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def dataclass_hints(cls: type) -> dict[str, Any]:
    """Field name -> type hint of a dataclass, of what its constructor takes."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def constructor_hints(cls: type) -> dict[str, Any]:
    """Init arg -> type hint, as far as they can be told."""
    try:
        # Of a dataclass, each field's hint is read where that field is written: it may be inherited.
        return dataclass_hints(cls) if dataclasses.is_dataclass(cls) else typing.get_type_hints(cls.__init__)
    except (NameError, TypeError):  # hints for type checkers only, or a constructor in C
        return {}
