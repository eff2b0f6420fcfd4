"""Run a command's function from words: normalise, parse, call."""

import copy
from collections.abc import Callable
from typing import Any

from litgpt.cli import record
from litgpt.cli.arguments import Arguments, split
from litgpt.cli.classes import class_parser, parse_init_args
from litgpt.cli.config_files import read_config
from litgpt.cli.errors import UsageError
from litgpt.cli.parser import as_hinted, build_parser, check_types, class_options, instantiate
from litgpt.cli.settings import Collector, Layer, default_layer, merge, refuse, settle_classes
from litgpt.cli.signature import ConfigOverrides, Parameter, Signature, is_class_spec


def run(function: Callable[..., Any], argv: list[str], prog: str) -> Any:
    """Parse `argv` by the function's signature and docstring, and call it.

    Args:
        function: Its parameters are the options; those without a default, and the first, may be given by position.
            Dataclasses make groups (`--train.max_steps`), other classes choices (`--data NAME --data.key value`).
        argv: The words after the subcommand.
        prog: What the user typed before them, for the help.

    Returns:
        What the function returns; None where only help or the settings were asked for.

    Raises:
        UsageError: unknown names (all of them at once, with suggestions), wrong types, missing values.
    """
    signature = Signature(function)
    arguments = split(argv, signature)
    if arguments.help:
        print(build_parser(signature, prog).format_help(), end="")
        return None
    if arguments.class_help:
        print(class_help(signature, *arguments.class_help), end="")
        return None
    layer = gather(arguments, signature)
    missing = [p for p in signature.parameters.values() if p.required and layer.get(p.name) is None]
    if missing and not arguments.print_config:
        raise UsageError(missing_message(missing, signature, prog))
    values, settings = resolve(layer, signature, prog)
    if arguments.print_config:
        print(record.as_yaml(prog, record.without_secrets(record.plain(settings))), end="")
        return None
    record.remember(prog, settings)
    try:
        return function(**values)
    finally:
        record.forget()


def gather(arguments: Arguments, signature: Signature) -> Layer:
    """Defaults, then configuration files in their order, then options, in one layer with checked names."""
    layer, problems = default_layer(signature), []
    sources = [(place, list(read_config(place).items())) for place in arguments.configs]
    for origin, settings in [*sources, ("", arguments.settings)]:
        collector = Collector(signature, origin)
        for name, value in settings:
            collector.add(name, value)
        layer = merge(layer, collector.layer)
        problems += collector.problems
    problems += settle_classes(layer, signature)
    refuse(problems)
    return layer


def resolve(layer: Layer, signature: Signature, prog: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Typed values.

    Returns:
        The arguments of the function, and the same as settings to write down; None for what is required and missing.
    """
    missing = [p.name for p in signature.parameters.values() if p.required and layer.get(p.name) is None]
    parser = build_parser(signature, prog, without=missing)
    parsed = check_types(parser, {name: value for name, value in layer.items() if name not in missing}, signature)
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


def make_class(parameter: Parameter, chosen: Layer | None) -> tuple[Any, Any]:
    """The object (or the filled-in spec) for a chosen class, and its settings."""
    if chosen is None:
        return parameter.default if not parameter.required else None, None
    option, cls = parameter.name, parameter.choice.resolve(chosen["class_path"])[1]
    spec = is_class_spec(parameter.annotation)
    init_args, parser = parse_init_args(option, cls, chosen["init_args"], defaults=not spec)
    plain = record.plain(init_args)
    settings = {"class_path": chosen["class_path"], "init_args": plain}
    if spec:
        return parameter.annotation(class_path=chosen["class_path"], init_args=plain), settings
    made = init_args if isinstance(init_args, dict) else vars(instantiate(parser, init_args))
    return cls(**made), settings


def typed_overrides(parameter: Parameter, given: Layer | None) -> ConfigOverrides | None:
    """Fields of Config with their types checked."""
    if given is None:
        return parameter.default if not parameter.required else None
    from litgpt.config import Config

    hinted = {name: as_hinted(value, parameter.fields[name]) for name, value in given.items()}
    values, _ = parse_init_args(parameter.name, Config, hinted, defaults=False)
    return ConfigOverrides(record.plain(values))


def class_help(signature: Signature, name: str, chosen: str | None) -> str:
    """The text of `--data.help NAME`, or the names where none is given."""
    choice = signature.parameters[name].choice
    if chosen is None:
        return "\n".join([f"--{name} takes one of:", *choice.names(), "or your own package.module.Class"]) + "\n"
    path, cls = choice.resolve(chosen)
    return class_options(class_parser(cls, name, prog=path, add_help=False), path)


def missing_message(missing: list[Parameter], signature: Signature, prog: str) -> str:
    """What to type instead."""
    names = ", ".join(p.name for p in missing)
    example = " ".join([prog, *(name.upper() for name in signature.positionals)])
    return f"missing: {names}. Usage: {example} [--option value ...]; `{prog} --help` shows the options."
