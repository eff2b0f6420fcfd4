"""Groups whose fields stand at the top: options that several commands have in common, written once."""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any

import docstring_parser


@dataclass(frozen=True)
class Flat:
    """Marks a parameter that is a dataclass, `options: Annotated[Options, Flat()] = Options()`: each field is an
    option of the command itself (`--seed`, not `--options.seed`), its name after the prefix.
    """

    prefix: str = ""


def flattened(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the fields of its `Flat` parameters as parameters of its own, documented by the docstrings
    under the fields. A function without one is returned as it is.
    """
    groups = dict(_groups(function))
    if not groups:
        return function
    hints = typing.get_type_hints(function)
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in groups:
            parameters += _field_parameters(*groups[parameter.name], parameter.default)
        else:
            parameters.append(parameter.replace(annotation=hints.get(parameter.name, Any)))

    # The last: parameters with a default may stand before those without where all are given by name.
    signature = inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters])

    @wraps(function)
    def call(**given: Any) -> Any:
        arguments = signature.bind(**given)
        arguments.apply_defaults()
        values = arguments.arguments
        for name, (cls, prefix) in groups.items():
            values[name] = cls(**{f.name: values.pop(prefix + f.name) for f in dataclasses.fields(cls)})
        return function(**values)

    del call.__wrapped__
    vars(call)["__signature__"] = signature
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    call.__doc__ = _documentation(function, groups, [p.name for p in parameters])
    return call


def spread(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a function by the names of their options: the fields of its `Flat` parameters apart."""
    spread_out = dict(values)
    for name, (cls, prefix) in _groups(function):
        group = spread_out.pop(name)
        spread_out |= {prefix + f.name: getattr(group, f.name) for f in dataclasses.fields(cls)}
    return spread_out


def prefixed_fields(function: Callable[..., Any]) -> dict[str, str]:
    """Field -> option, of the fields of a function's `Flat` parameters that have a prefix."""
    return {
        f.name: prefix + f.name for _, (cls, prefix) in _groups(function) if prefix for f in dataclasses.fields(cls)
    }


def _groups(function: Callable[..., Any]) -> Iterator[tuple[str, tuple[type, str]]]:
    """The `Flat` parameters: name, dataclass and prefix."""
    for name, hint in typing.get_type_hints(function, include_extras=True).items():
        if typing.get_origin(hint) is Annotated:
            for mark in hint.__metadata__:
                if isinstance(mark, Flat):
                    yield name, (hint.__origin__, mark.prefix)


def _field_parameters(cls: type, prefix: str, default: Any) -> Iterator[inspect.Parameter]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield inspect.Parameter(
            prefix + field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=getattr(default, field.name),
            annotation=hints[field.name],
        )


def _documentation(function: Callable[..., Any], groups: dict[str, tuple[type, str]], names: list[str]) -> str:
    """The function's docstring with the fields among its arguments; what it says of a field itself comes first."""
    own = docstring_parser.parse(inspect.getdoc(function) or "")
    texts: dict[str, str] = {}
    for cls, prefix in groups.values():
        for base in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):  # each documents its own fields
            fields = docstring_parser.parse_from_object(base).params
            texts |= {prefix + entry.arg_name: entry.description or "" for entry in fields}
    texts |= {entry.arg_name: entry.description or "" for entry in own.params}
    about = filter(None, (own.short_description, own.long_description))
    arguments = [f"    {name}: {' '.join(texts[name].split())}" for name in names if name in texts]
    return "\n\n".join([*about, "\n".join(["Args:", *arguments])])
