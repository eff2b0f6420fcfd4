"""Every option of every command, a line each, as `options.txt` has them.

    python -m tests.cli.options > tests/cli/options.txt

A command's first line says what may be given without a name; the others are `command --option: type = default`, without
a default where a value must be given. What a data module takes stands once, under `--data NAME`.
"""

import dataclasses
import inspect
from argparse import SUPPRESS, Action
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser

from litgpt.__main__ import COMMANDS, load
from litgpt.cli.classes import ClassChoice, class_parser
from litgpt.cli.flat import flattened
from litgpt.cli.help import help_parser, usage
from litgpt.cli.hints import dataclass_hints, members
from litgpt.cli.signature import Parameter, Signature


def every_option() -> list[str]:
    """All lines, in alphabetical order."""
    lines, choices = [], {}
    for command in sorted(COMMANDS):
        signature = Signature(flattened(load(COMMANDS[command].target)))
        lines += [usage(signature, command), *(f"{command} {option}" for option in options_of_command(signature))]
        choices |= {p.name: p.choice for p in signature.of_kind("class") if p.choice.package.startswith("litgpt.")}
    return [line for name, choice in sorted(choices.items()) for line in options_of_classes(name, choice)] + lines


def options_of_command(signature: Signature) -> list[str]:
    """What the parser that writes the help has, and which classes are the defaults."""
    classes = {p.name: f" = {class_by_default(p)}" for p in signature.of_kind("class")}
    actions = shown(help_parser(signature, ""))
    return sorted(described(action) + classes.get(action.dest, "") for action in actions)


def options_of_classes(name: str, choice: ClassChoice) -> Iterator[str]:
    """The init args of our own classes that an option takes."""
    for short_name in choice.names():
        cls = choice.resolve(short_name)[1]
        # jsonargparse does not find all types of inherited fields.
        hints = dataclass_hints(cls) if dataclasses.is_dataclass(cls) else {}
        actions = [action for action in shown(class_parser(cls, name, add_help=False)) if "." in action.dest]
        yield from sorted(
            f"--{name} {short_name} {described(action, hints.get(action.dest.partition('.')[2]))}" for action in actions
        )


def shown(parser: ArgumentParser) -> list[Action]:
    return [action for action in parser._actions if action.help != SUPPRESS and not action.dest.endswith(".help")]


def described(action: Action, hint: Any = None) -> str:
    """`--option: type = default`; the type is the parser's unless it is given."""
    # jsonargparse takes `--option+`, too, for a list; here the option is repeated.
    text = "/".join(option for option in action.option_strings if not option.endswith("+"))
    hint = hint or getattr(action, "_typehint", None)
    if hint is not None:
        text += f": {type_name(hint)}"
        if not action.required:
            default = action.default
            text += f" = {str(default) if isinstance(default, PurePath) else default!r}"
    return text


def class_by_default(parameter: Parameter) -> str:
    """`package.Class(lr=0.1)`, or None."""
    spec = parameter.default
    if not hasattr(spec, "class_path"):
        return repr(spec)
    return f"{spec.class_path}({', '.join(f'{name}={value!r}' for name, value in spec.init_args.items())})"


def type_name(hint: Any) -> str:
    """A type hint as one writes it, the same in every version of Python."""
    if len(members(hint)) > 1:
        return " | ".join(map(type_name, members(hint)))
    if get_origin(hint) is Literal:
        return f"Literal[{', '.join(map(repr, get_args(hint)))}]"
    if get_origin(hint) is not None:
        return f"{get_origin(hint).__name__}[{', '.join(map(type_name, get_args(hint)))}]"
    if hint is type(None):
        return "None"
    return hint.__name__ if inspect.isclass(hint) else str(hint)


if __name__ == "__main__":
    print("\n".join(every_option()))
