"""Typed values out of a layer of settings, by jsonargparse."""

import copy
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from litgpt.cli import record
from litgpt.cli.classes import parse_init_args
from litgpt.cli.hints import admits
from litgpt.cli.settings import Layer
from litgpt.cli.signature import ConfigOverrides, Parameter, Signature, is_class_spec
from litgpt.cli.usage_error import UsageError
from litgpt.cli.values import as_hinted, explain, instantiate


def resolve(layer: Layer, signature: Signature) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check the types, fill in the defaults, make the objects.

    Returns:
        The arguments of the function, and the same as settings to write down; None for what is required and missing.
    """
    missing = signature.missing(layer)
    plain = [p.name for p in signature.of_kind("value", "group") if p.name not in missing]
    parser = ArgumentParser(exit_on_error=False)
    skip: set[str | int] = {name for name in signature.parameters if name not in plain}
    parser.add_function_arguments(signature.function, skip=skip, fail_untyped=False, sub_configs=False)
    parsed = check_types(parser, {name: value for name, value in layer.items() if name in plain}, signature)
    made = instantiate(parser, copy.deepcopy(parsed))
    values, settings = {}, {}
    for name, parameter in signature.parameters.items():
        if name in missing:
            values[name] = settings[name] = None
        elif parameter.kind == "class":
            values[name], settings[name] = make_class(parameter, layer.get(name))
        elif parameter.kind == "overrides":
            values[name] = settings[name] = typed_overrides(parameter, layer.get(name))
        else:
            values[name], settings[name] = made[name], parsed[name]
    return values, settings


def check_types(parser: ArgumentParser, layer: Layer, signature: Signature) -> Namespace:
    """Have jsonargparse check plain values and groups.

    Raises:
        UsageError: a value of a wrong type.
    """
    try:
        return parser.parse_object(in_form(layer, signature))
    except ArgumentError as error:
        raise UsageError(explain(error, "", lambda name: signature.annotation(tuple(name.split("."))))) from None


def in_form(layer: Layer, signature: Signature, path: tuple[str, ...] = ()) -> Layer:
    """A layer with each value in the form that its type hint wants."""
    result = {}
    for name, value in layer.items():
        hint = signature.annotation((*path, name))
        group = isinstance(value, dict) and not admits(hint, dict)
        result[name] = in_form(value, signature, (*path, name)) if group else as_hinted(value, hint)
    return result


def make_class(parameter: Parameter, chosen: Layer | None) -> tuple[Any, Any]:
    """The object (or the filled-in spec) for a chosen class, and its settings."""
    if chosen is None:
        return parameter.default, None
    cls = parameter.choice.resolve(chosen["class_path"])[1]
    spec = is_class_spec(parameter.annotation)
    init_args, parser = parse_init_args(parameter.name, cls, chosen["init_args"], defaults=not spec)
    plain = record.plain(init_args)
    settings = {"class_path": chosen["class_path"], "init_args": plain}
    if spec:
        return parameter.annotation(class_path=chosen["class_path"], init_args=plain), settings
    made = init_args if isinstance(init_args, dict) else vars(instantiate(parser, copy.deepcopy(init_args)))
    return cls(**made), settings


def typed_overrides(parameter: Parameter, given: Layer | None) -> ConfigOverrides | None:
    """Fields of Config with their types checked."""
    if given is None:
        return parameter.default
    from litgpt.config import Config

    values, _ = parse_init_args(parameter.name, Config, given, defaults=False)
    return ConfigOverrides(record.plain(values))
