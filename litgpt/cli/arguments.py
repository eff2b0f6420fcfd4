"""The words of a command line, sorted: settings, configuration files, requests for help."""

import re
from dataclasses import dataclass, field
from typing import Any

from litgpt.cli.errors import UsageError
from litgpt.cli.signature import Signature, admits, members

# `--` and a name: a value such as "-1" or "-- so she said" is no option.
OPTION = re.compile(r"--[A-Za-z_][\w.-]*(=.*)?\Z", re.DOTALL)
BOOLEANS = {"true", "false", "yes", "no", "on", "off", "1", "0"}


@dataclass
class Arguments:
    """What a command line asks for."""

    settings: list[tuple[str, Any]] = field(default_factory=list)
    """(dotted name, value) in the order given; values are text, or True for a bare flag."""
    configs: list[str] = field(default_factory=list)
    """Files or URLs given by `--config`."""
    help: bool = False
    class_help: tuple[str, str | None] | None = None
    """Of `--data.help NAME`: the parameter and the class."""
    print_config: bool = False


def split(argv: list[str], signature: Signature) -> Arguments:
    """Sort the words of a command line.

    Raises:
        UsageError: an option without its value, a word too many.
    """
    found = Arguments()
    words = list(argv)
    positionals = list(signature.positionals)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            found.help = True
        elif OPTION.match(word):
            name, equals, value = word[2:].partition("=")
            _option(found, name.replace("-", "_"), value if equals else None, words, signature)
        elif positionals:
            found.settings.append((positionals.pop(0), word))
        else:
            raise UsageError(f"unexpected argument {word!r}: options are written `--name value`.")
    return found


def _option(found: Arguments, name: str, value: str | None, words: list[str], signature: Signature) -> None:
    """Take an option with its value from the words."""
    parameter, _, last = name.rpartition(".")
    if name in ("print_config", "config") and name not in signature.parameters:
        if name == "print_config":
            found.print_config = True
        else:
            found.configs.append(_value(name, value, words))
    elif last == "help" and parameter in {p.name for p in signature.of_kind("class")}:
        if value is None and words and not OPTION.match(words[0]):
            value = words.pop(0)
        found.class_help = (parameter, value)
    else:
        hint = signature.annotation(signature.locate(tuple(name.split("."))))
        found.settings.append((name, _flag(name, hint, words, signature) if value is None else value))


def _flag(name: str, hint: Any, words: list[str], signature: Signature) -> Any:
    """The value of an option that has no `=`: True for a bare flag, else the next word."""
    following = words[0] if words and not OPTION.match(words[0]) else None
    only_bool = all(member in (bool, type(None)) for member in members(hint))
    if only_bool and (following is None or following.lower() not in {*BOOLEANS, "null"}):
        return True
    # What an option takes may not be known here (an unknown name, a class's init arg): then it may be a flag.
    takes_bool = admits(hint, bool) or (hint is Any and name.partition(".")[0] not in signature.parameters)
    if following is None and (takes_bool or (hint is Any and "." in name)):
        return True
    return _value(name, None, words)


def _value(name: str, value: str | None, words: list[str]) -> str:
    if value is not None:
        return value
    if not words or OPTION.match(words[0]):
        raise UsageError(f"--{name} needs a value.")
    return words.pop(0)
