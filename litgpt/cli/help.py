"""The help of a command, and of the classes that it takes."""

import inspect
import re
from argparse import SUPPRESS
from typing import Any

import docstring_parser
from jsonargparse import ArgumentParser

from litgpt.cli.classes import class_parser
from litgpt.cli.signature import Parameter, Signature
from litgpt.cli.values import read_attribute_docstrings


def help_text(signature: Signature, prog: str) -> str:
    """What `--help` prints."""
    return help_parser(signature, prog).format_help().replace("<class 'Path'>", "Path")


def help_parser(signature: Signature, prog: str) -> ArgumentParser:
    """A parser with every option of a command, for its help."""
    documentation = docstring_parser.parse(inspect.getdoc(signature.function) or "")
    texts = {entry.arg_name: entry.description or "" for entry in documentation.params}
    about = "\n\n".join(filter(None, (documentation.short_description, documentation.long_description)))
    parser = ArgumentParser(prog=prog, description=about, usage=usage(signature, prog), exit_on_error=False)
    apart = list(signature.of_kind("class", "overrides"))
    read_attribute_docstrings(True)
    try:
        parser.add_function_arguments(
            signature.function, as_group=False, skip={p.name for p in apart}, fail_untyped=False, sub_configs=False
        )
    finally:
        read_attribute_docstrings(False)
    for parameter in apart:
        _add_options(parser, parameter, texts.get(parameter.name, ""))
    for name, metavar, text in (
        ("--config", "FILE_OR_URL", "settings from YAML; of several the later win, options over all"),
        ("--print_config", None, "print the resolved settings as YAML and leave"),
        ("--debug", None, "show the traceback of an error"),
    ):
        settings: dict[str, Any] = {"metavar": metavar} if metavar else {"action": "store_true"}
        parser.add_argument(name, default=SUPPRESS, help=text, **settings)
    for action in parser._actions:  # of a list, jsonargparse offers `--name+`, too: here the option is repeated
        action.option_strings = [option for option in action.option_strings if not option.endswith("+")]
    return parser


def usage(signature: Signature, prog: str) -> str:
    """The first line of the help."""
    parameters = signature.parameters
    words = [name if parameters[name].required else f"[{name}]" for name in signature.positionals]
    return " ".join([prog, *words, "[--option value ...]"])


def _add_options(parser: ArgumentParser, parameter: Parameter, text: str) -> None:
    """The help of a class or of overrides."""
    name = parameter.name
    group = parser.add_argument_group(text.strip().rstrip(".").replace("\n", " ") or name)
    if parameter.kind == "overrides":
        group.add_argument(f"--{name}.FIELD", default=SUPPRESS, metavar="VALUE", help="any field of litgpt.Config")
        return
    default = getattr(parameter.default, "class_path", parameter.default)
    known = parameter.choice.names()
    which = f"one of {', '.join(known)}, or your own package.module.Class" if len(known) <= 40 else "a class"
    group.add_argument(f"--{name}", default=SUPPRESS, metavar="NAME", help=f"{which} (default: {default or 'none'})")
    text = f"a setting of it, see --{name}.help NAME"
    group.add_argument(f"--{name}.KEY", default=SUPPRESS, metavar="VALUE", help=text)


def class_help(signature: Signature, name: str, chosen: str | None) -> str:
    """What `--data.help NAME` prints, or the names where none is given."""
    choice = signature.parameters[name].choice
    if chosen is None:
        return "\n".join([f"--{name} takes one of:", *choice.names(), "or your own package.module.Class"]) + "\n"
    class_path, cls = choice.resolve(chosen)
    read_attribute_docstrings(True)
    try:
        parser = class_parser(cls, name, prog=class_path, add_help=False)
    finally:
        read_attribute_docstrings(False)
    for action in parser._actions:
        # Neither a file for the whole class nor the help of classes nested in it: `float | Tensor` has hundreds.
        if action.dest.endswith(".help") or "." not in action.dest:
            action.help = SUPPRESS
    parser.usage = f"settings of {class_path}"
    text = parser.format_help().removeprefix("usage: ")
    return re.sub(r",\s+known\s+subclasses:[^)]*\)", ")", text)
