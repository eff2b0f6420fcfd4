"""Single values: their types, and what to say about a wrong one."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse.typing import register_type

from litgpt.cli.hints import admits, readable
from litgpt.cli.secret import REDACTED, Secret

register_type(Secret, serializer=str, deserializer=Secret)

BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_NULLS = ("~", "null", "Null", "NULL")
_NUMBER = re.compile(r"[+-]?[\d_]*\.?[\d_]+([eE][+-]?\d+)?")


class HerePath(type(Path())):
    """A relative path that was typed with `./` before it, which `Path` forgets: it means a file, never a Hub id."""

    def __str__(self) -> str:
        text = super().__str__()
        return text if self.is_absolute() else f"./{text}"


def as_hinted(value: Any, hint: Any) -> Any:
    """One value as its type hint wants it, where the two differ in form only: `1e6` for an integer, `yes`, a number
    from YAML where text is wanted.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and admits(hint, Path) and value.startswith("./"):
        return HerePath(value)
    if admits(hint, str, Secret):
        return str(value) if isinstance(value, int | float) and not admits(hint, int, float) else value
    if isinstance(value, str) and admits(hint, bool) and not admits(hint, int):
        return BOOLEANS.get(value.lower(), value)
    if isinstance(value, str | float) and admits(hint, int) and not admits(hint, float):
        return as_integer(value)
    return value


_load = jsonargparse.get_loader("yaml")


def read_value(text: str) -> Any:
    """As jsonargparse reads a value; but what YAML takes for nothing without its being null (a comment, `---`, an
    anchor) is the text that was typed."""
    value = _load(text)
    return text if value is None and text.strip() not in _NULLS else value


jsonargparse.set_loader("yaml", read_value, exceptions=(yaml.YAMLError,))


def as_integer(value: str | float) -> Any:
    """`1e6`, `1_000_000` or 1e6 -> 1000000, exactly; what is no integer stays as it is."""
    text = str(value).strip()
    if not _NUMBER.fullmatch(text):
        return value
    try:
        return int(text)
    except ValueError:
        number = float(text)
        return int(number) if number.is_integer() else value


def explain(error: ArgumentError, option: str, hint_of: Callable[[str], Any]) -> str:
    """jsonargparse's account of a wrong value, in one line.

    Args:
        error: Its message names the setting, and shows the value.
        option: The parameter that the settings stand under, if any.
        hint_of: The type hint of a setting.
    """
    text, prefix = str(error), f"--{option}." if option else "--"
    required = re.search(r'(?:Key|option) "([^"]+)" is required|arguments are required: (.+)', text)
    if required:
        return f"{prefix}{required[1] or required[2]} is missing."
    key = re.search(r'Parser key "([^"]+)"', text)
    values = re.findall(r"(?:Given value|Got value): (.*)", text)
    if not key:
        return f"{prefix}{text}"
    if "surrogates not allowed" in text:  # bytes that Python could not read as text when the program started
        return (
            f"{prefix}{key[1]}: it is no text in UTF-8. Rename the file or directory that it names, or say with "
            "LC_ALL=C.UTF-8 that it is."
        )
    if not values:
        return f"{prefix}{key[1]}: {text[key.end() :].lstrip(': ').strip()}"
    hint = hint_of(key[1])
    if admits(hint, Secret):
        values = [REDACTED]
    values = ["null" if value == "None" else value for value in values]  # as it is typed
    if hint is Any:
        return f"{prefix}{key[1]}: {values[-1]!r} is not of the right type."
    return f"{prefix}{key[1]}: expected {readable(hint)}, got {values[-1]!r}."


def instantiate(parser: ArgumentParser, values: Any) -> Any:
    """Make the dataclasses and nested classes of parsed values."""
    name = "instantiate" if hasattr(parser, "instantiate") else "instantiate_classes"  # its older name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(parser, name)(values)


def read_attribute_docstrings(on: bool) -> None:
    """Whether a string literal under a dataclass field becomes the help of its option: it takes time to find them."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=on)
