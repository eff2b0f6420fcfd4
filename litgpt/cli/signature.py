"""What a command's function takes, as the command line sees it."""

import dataclasses
import enum
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import Any, Literal

from litgpt.cli.classes import ClassChoice
from litgpt.cli.hints import dataclass_hints, without_none
from litgpt.cli.secret import Secret

REQUIRED = inspect.Parameter.empty
SCALARS = (str, int, float, bool, complex, bytes, list, tuple, dict, set, Secret, type(None))


class ConfigOverrides(dict[str, Any]):
    """Fields of `litgpt.Config` by name: the annotation of a parameter that changes some of a model's fields."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a command's function."""

    name: str
    annotation: Any
    """The type hint, without `| None` for a group or a class."""
    default: Any
    """`REQUIRED` where there is none."""
    kind: Literal["value", "group", "class", "overrides"]
    """A plain value; a dataclass, whose fields are options; a class with its init args; fields of Config."""

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    @cached_property
    def fields(self) -> dict[str, Any]:
        """Name -> type hint of what may stand below this parameter (a group's fields, Config's fields)."""
        if self.kind == "overrides":
            from litgpt.config import Config

            return dataclass_hints(Config)
        return dataclass_hints(self.annotation) if self.kind == "group" else {}

    @cached_property
    def choice(self) -> ClassChoice:
        """Which classes a parameter of kind "class" takes."""
        if is_class_spec(self.annotation):
            return ClassChoice.like(self.default.class_path)
        return ClassChoice.subclasses_of(self.annotation)


class Signature:
    """The parameters of a command's function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        hints = typing.get_type_hints(function)
        self.parameters = {
            name: parameter_of(name, hints.get(name, Any), parameter.default)
            for name, parameter in inspect.signature(function).parameters.items()
        }

    @property
    def positionals(self) -> list[str]:
        """Parameters that may be given without their name, in order: those without a default, and the first; where
        others stand after a `*`, those before it.
        """
        kinds = {name: p.kind for name, p in inspect.signature(self.function).parameters.items()}
        named = {name for name, kind in kinds.items() if kind is inspect.Parameter.KEYWORD_ONLY}
        if named and len(named) < len(kinds):
            return [name for name in kinds if name not in named]
        return [p.name for i, p in enumerate(self.parameters.values()) if p.kind == "value" and (p.required or i == 0)]

    def missing(self, given: Mapping[str, Any]) -> list[str]:
        """The required parameters that have no value."""
        return [p.name for p in self.parameters.values() if p.required and given.get(p.name) is None]

    def of_kind(self, *kinds: str) -> Iterator[Parameter]:
        return (parameter for parameter in self.parameters.values() if parameter.kind in kinds)

    def locate(self, path: tuple[str, ...]) -> tuple[str, ...]:
        """The full path of a setting that may be given without its group: `max_steps` -> `train.max_steps`.

        What is not found is returned as it is. Groups come before `Config`'s fields, in the order of the signature.
        """
        if path[0] in self.parameters:
            return path
        for parameter in (*self.of_kind("group"), *self.of_kind("overrides")):
            if path[0] in parameter.fields:
                return (parameter.name, *path)
        return path

    def annotation(self, path: tuple[str, ...]) -> Any:
        """The type hint of the setting at a full path, `Any` where it is not known yet."""
        parameter = self.parameters.get(path[0])
        if parameter is None or parameter.kind == "class":
            return Any
        if len(path) == 1:
            return parameter.annotation
        return parameter.fields.get(path[1], Any) if len(path) == 2 else Any

    def names(self) -> list[str]:
        """Every name that `locate` knows, for a did-you-mean."""
        below = [f"{p.name}.{field}" for p in self.of_kind("group", "overrides") for field in p.fields]
        return [*self.parameters, *below]


def parameter_of(name: str, hint: Any, default: Any) -> Parameter:
    """Find out what kind of parameter a type hint makes."""
    bare = without_none(hint)
    if bare is ConfigOverrides:
        return Parameter(name, bare, default, "overrides")
    plain = not inspect.isclass(bare) or bare is Any or typing.get_origin(bare) is not None  # `list[int]` is no class
    if plain or issubclass(bare, (*SCALARS, PurePath, enum.Enum)):
        return Parameter(name, hint, default, "value")
    if is_class_spec(bare):
        return Parameter(name, bare, default, "class")
    if dataclasses.is_dataclass(bare) and not inspect.isabstract(bare):
        return Parameter(name, bare, default, "group")
    return Parameter(name, bare, default, "class")


def is_class_spec(hint: Any) -> bool:
    """Whether a dataclass stands for a class and its init args, to be made by the command itself."""
    return dataclasses.is_dataclass(hint) and {"class_path", "init_args"} <= {f.name for f in dataclasses.fields(hint)}
