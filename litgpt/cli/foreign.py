"""Settings that came from a web address: they choose among what is here, and name no code to run."""

import os
import re
import sys
from collections.abc import Iterable, Iterator
from importlib.machinery import PathFinder
from typing import Any

import yaml

from litgpt.cli.untrusted import ExcessError, load_yaml
from litgpt.cli.usage_error import UsageError

OWN = ("litgpt", "torch", "torchmetrics")  # packages whose classes the options choose from
DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
CLASS = "class_path"


def refused_code(settings: Iterable[tuple[str, Any]], own: Iterable[Any]) -> list[str]:
    """What settings from an address name that would be imported, and the user has not named as well.

    Args:
        settings: (name, value) pairs, as they were read; nothing of them is imported here.
        own: Values that the user gave: on the command line and in files of this machine.

    Returns:
        One message for each.
    """
    vouched = {text for value in own for _, text in _texts("", value)}
    return [
        f"{name}: {text} is code, and settings from a web address name none. If you trust it, name it on the command "
        f"line, too: --{name.removesuffix('.' + CLASS)} {text}"
        for setting, value in settings
        for name, text in _texts(setting, value)
        if text not in vouched and _is_code(name, text)
    ]


def _texts(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every text in a value, by the name of its setting; of a text that is YAML itself, the texts in that."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _texts(f"{name}.{key}", entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _texts(name, entry)
    elif isinstance(value, str) and (held := _held(name, value)) is not None:
        yield from _texts(name, held)
    elif isinstance(value, str):
        yield name, value.strip()


def _held(name: str, text: str) -> Any:
    """The mapping or list that a text writes out; None where it is just a text.

    Raises:
        UsageError: It stands for more than the parser of values can go through.
    """
    if not any(mark in text for mark in ":{["):
        return None
    try:
        held = load_yaml(text)
    except ExcessError:
        raise UsageError(f"{name}: this text is nested or repeated too much for a setting.") from None
    except (yaml.YAMLError, ValueError, TypeError):
        return None  # nobody else can read it either
    return held if isinstance(held, dict | list) else None


def _is_code(name: str, text: str) -> bool:
    """Whether an option might import what a text names: a class by its path, or any name of a module that is here."""
    if not DOTTED.fullmatch(text) or text.partition(".")[0] in OWN:
        return False
    return name.rpartition(".")[2] == CLASS or _is_importable(text.split(".")[:-1])


def _is_importable(module: list[str]) -> bool:
    """Whether there is code by that name, here or in the working directory; imports nothing."""
    if module[0] in sys.modules or module[0] in sys.builtin_module_names:
        return True
    path = [*sys.path, os.getcwd()]
    for end in range(1, len(module) + 1):
        spec = PathFinder.find_spec(".".join(module[:end]), path)
        if spec is None:
            return False
        if spec.loader is not None and spec.origin is not None:
            return True
        path = list(spec.submodule_search_locations or ())  # a mere folder: no code by itself
    return False
