"""Run a command's function from words: normalise, parse, call."""

from collections.abc import Callable
from typing import Any

from litgpt.cli import option_names, record
from litgpt.cli.config_files import is_address, read_config
from litgpt.cli.flat import flattened
from litgpt.cli.foreign import refused_code
from litgpt.cli.help import class_help, help_text
from litgpt.cli.resolve import resolve
from litgpt.cli.settings import Collector, Layer, default_layer, merge, refuse, settle_classes
from litgpt.cli.signature import Signature
from litgpt.cli.usage_error import UsageError
from litgpt.cli.words import Arguments, split


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
    command, function = function, flattened(function)
    signature = Signature(function)
    arguments = split(argv, signature)
    if arguments.help:
        print(help_text(signature, prog), end="")
        return None
    if arguments.class_help:
        print(class_help(signature, *arguments.class_help), end="")
        return None
    layer = gather(arguments, signature)
    option_names.remember(command, signature, chosen_classes(layer, signature))
    missing = signature.missing(layer)
    if missing and not arguments.print_config:
        raise UsageError(missing_message(missing, signature, prog))
    values, settings = resolve(layer, signature)
    if arguments.print_config:
        print(record.as_yaml(prog, record.without_secrets(record.plain(settings))), end="")
        return None
    defaults = {p.name: None if p.required else record.plain(p.default) for p in signature.parameters.values()}
    record.remember(prog, settings, layer, defaults)
    try:
        return function(**values)
    finally:
        record.forget()


def gather(arguments: Arguments, signature: Signature) -> Layer:
    """Defaults, then configuration files in their order, then options, in one layer with checked names."""
    layer, problems = default_layer(signature), []
    sources = [(place, list(read_config(place).items())) for place in arguments.configs]
    own = [value for place, settings in sources if not is_address(place) for _, value in settings]
    own += [value for _, value in arguments.settings]
    for place, settings in sources:
        if is_address(place):
            refuse([f"{place}: {problem}" for problem in refused_code(settings, own)])  # before any is imported
    for origin, settings in [*sources, ("", arguments.settings)]:
        collector = Collector(signature, origin, reads_files=not is_address(origin))
        for name, value in settings:
            collector.add(name, value)
        layer = merge(layer, collector.layer)
        problems += collector.problems
    problems += settle_classes(layer, signature)
    refuse(problems)
    return layer


def chosen_classes(layer: Layer, signature: Signature) -> list[tuple[str, str]]:
    """The options that name a class, and what each names."""
    chosen = ((parameter.name, layer.get(parameter.name)) for parameter in signature.of_kind("class"))
    return [(name, value["class_path"]) for name, value in chosen if value and value.get("class_path")]


def missing_message(missing: list[str], signature: Signature, prog: str) -> str:
    """What to type instead."""
    missing = [name if name in signature.positionals else f"--{name}" for name in missing]
    example = " ".join([prog, *(name.upper() for name in signature.positionals)])
    return f"missing: {', '.join(missing)}. Usage: {example} [--option value ...]; `{prog} --help` shows the options."
