"""jsonargparse's part: types, defaults and the help text."""

import inspect
import re
import warnings
from argparse import SUPPRESS
from collections.abc import Callable, Collection
from typing import Any

import docstring_parser
import jsonargparse
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from litgpt.cli.arguments import BOOLEANS
from litgpt.cli.errors import UsageError
from litgpt.cli.settings import Layer
from litgpt.cli.signature import Parameter, Signature, admits, readable

CHECKED = ("value", "group")
_JUST_A_NUMBER = re.compile(r"[+-]?[\d_]*\.?[\d_]+([eE][+-]?\d+)?")


def build_parser(signature: Signature, prog: str, without: Collection[str] = ()) -> ArgumentParser:
    """The parser of a command, less some parameters.

    Its classes and its overrides are options without an effect here: others resolve them.
    """
    use_attribute_docstrings()
    documentation = docstring_parser.parse(inspect.getdoc(signature.function) or "")
    texts = {entry.arg_name: entry.description or "" for entry in documentation.params}
    about = "\n\n".join(filter(None, (documentation.short_description, documentation.long_description)))
    parser = ArgumentParser(prog=prog, description=about, usage=usage(signature, prog), exit_on_error=False)
    apart = list(signature.of_kind("class", "overrides"))
    skip = {*without, *(p.name for p in apart)}
    parser.add_function_arguments(signature.function, as_group=False, skip=skip, fail_untyped=False, sub_configs=False)
    for parameter in apart:
        _add_options(parser, parameter, texts.get(parameter.name, ""))
    more = {
        "--config": {
            "metavar": "FILE_OR_URL",
            "help": "settings from YAML; of several the later win, options over all",
        },
        "--print_config": {"action": "store_true", "help": "print the resolved settings as YAML and leave"},
        "--debug": {"action": "store_true", "help": "show the traceback of an error"},
    }
    for name, settings in more.items():
        parser.add_argument(name, default=SUPPRESS, **settings)
    return parser


def usage(signature: Signature, prog: str) -> str:
    """The first line of the help."""
    parameters = signature.parameters
    words = [name if parameters[name].required else f"[{name}]" for name in signature.positionals]
    return " ".join([prog, *words, "[--option value ...]"])


def _add_options(parser: ArgumentParser, parameter: Parameter, text: str) -> None:
    """The help of a class or of overrides."""
    name, group = parameter.name, parser.add_argument_group(_sentence(text) or parameter.name)
    if parameter.kind == "overrides":
        group.add_argument(f"--{name}.FIELD", default=SUPPRESS, metavar="VALUE", help="any field of litgpt.Config")
        return
    default = getattr(parameter.default, "class_path", parameter.default)
    known = parameter.choice.names()
    which = f"one of {', '.join(known)}, or your own package.module.Class" if len(known) <= 40 else "a class"
    group.add_argument(f"--{name}", default=SUPPRESS, metavar="NAME", help=f"{which} (default: {default or 'none'})")
    group.add_argument(
        f"--{name}.KEY", default=SUPPRESS, metavar="VALUE", help=f"a setting of it, see --{name}.help NAME"
    )


def _sentence(text: str) -> str:
    return text.strip().rstrip(".").replace("\n", " ")


def class_options(parser: ArgumentParser, class_path: str) -> str:
    """The help for the init args of a class."""
    for action in parser._actions:
        # Neither a file for the whole class nor the help of classes nested in it: `float | Tensor` has hundreds.
        if action.dest.endswith(".help") or "." not in action.dest:
            action.help = SUPPRESS
    parser.usage = f"settings of {class_path}"
    text = parser.format_help().removeprefix("usage: ")
    return re.sub(r",\s+known\s+subclasses:[^)]*\)", ")", text)


def use_attribute_docstrings() -> None:
    """A string literal under a dataclass field is the help of its option."""
    if hasattr(jsonargparse, "set_parsing_settings"):
        try:
            jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
            return
        except TypeError:  # versions that have the function without this setting
            pass
    jsonargparse.set_docstring_parse_options(attribute_docstrings=True)


def check_types(parser: ArgumentParser, layer: Layer, signature: Signature) -> Namespace:
    """Have jsonargparse check the settings and fill in the defaults.

    Raises:
        UsageError: a value of a wrong type.
    """
    given = {name: value for name, value in layer.items() if signature.parameters[name].kind in CHECKED}
    try:
        return parser.parse_object(plain_numbers(given, signature))
    except ArgumentError as error:
        raise UsageError(explain(error, "", lambda name: signature.annotation(tuple(name.split("."))))) from None


def instantiate(parser: ArgumentParser, values: Any) -> Any:
    """Make the dataclasses and nested classes of parsed values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the method has another name in newer versions
        return (getattr(parser, "instantiate", None) or parser.instantiate_classes)(values)


def plain_numbers(layer: Layer, signature: Signature, path: tuple[str, ...] = ()) -> Layer:
    """`1e6` for an integer, and a number for a text, are what they look like."""
    result = {}
    for name, value in layer.items():
        below = (*path, name)
        hint = signature.annotation(below)
        if isinstance(value, dict) and not admits(hint, dict):
            result[name] = plain_numbers(value, signature, below)
        else:
            result[name] = as_hinted(value, hint)
    return result


def as_hinted(value: Any, hint: Any) -> Any:
    """One value as its type hint wants it, where the two differ in form only."""
    if admits(hint, bool) and not admits(hint, str, int) and isinstance(value, str):
        return BOOLEANS.get(value.lower(), value)
    if admits(hint, str):
        only_text = not admits(hint, int, float, bool)
        return str(value) if only_text and isinstance(value, int | float) and not isinstance(value, bool) else value
    if admits(hint, int) and not admits(hint, float) and not isinstance(value, bool):
        text = str(value).strip()
        if isinstance(value, str | float) and _JUST_A_NUMBER.fullmatch(text) and float(text).is_integer():
            return int(float(text)) if not text.replace("_", "").lstrip("+-").isdigit() else int(text)
    return value


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
    if not key or not values:
        return f"{prefix}{text}"
    hint = hint_of(key[1])
    return f"{prefix}{key[1]}: {values[-1]!r} is not {'of the right type' if hint is Any else readable(hint)}."
