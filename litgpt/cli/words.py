"""The words of a command line, sorted: settings, configuration files, requests for help."""

import re
from dataclasses import dataclass, field
from typing import Any

from litgpt.cli.hints import admits, members
from litgpt.cli.other_names import here_called
from litgpt.cli.signature import Signature
from litgpt.cli.usage_error import UsageError
from litgpt.cli.values import BOOLEANS

# `--` and a name: a value such as "-1" or "-- so she said" is no option.
OPTION = re.compile(r"--[A-Za-z_][\w.-]*(=.*)?\Z", re.DOTALL)
SHORT = re.compile(r"-[A-Za-z]\w*\Z")  # as other programs have them, and this one has not


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
    return _Splitter(argv, signature).split()


class _Splitter:
    def __init__(self, argv: list[str], signature: Signature) -> None:
        self.words = list(argv)
        self.signature = signature
        self.positionals = list(signature.positionals)
        self.found = Arguments()

    def split(self) -> Arguments:
        while self.words:
            word = self.words.pop(0)
            if word in ("-h", "--help"):
                self.found.help = True
            elif OPTION.match(word):
                name, equals, value = word[2:].partition("=")
                self.option(name.replace("-", "_"), value if equals else None)
            elif SHORT.match(word):
                hint = here_called(word[1:], self.signature)
                raise UsageError(f"{word}: options have their full names here, `--name value`.{hint}")
            elif self.positionals:
                self.found.settings.append((self.positionals.pop(0), word))
            else:
                hint = f' For a prompt: --prompt "{word}"' if "prompt" in self.signature.parameters else ""
                raise UsageError(f"unexpected argument {word!r}: options are written `--name value`.{hint}")
        return self.found

    def option(self, name: str, value: str | None) -> None:
        """Take an option; its value is in the next word if it did not follow after `=`."""
        parameter, _, last = name.rpartition(".")
        if name == "print_config":
            self.found.print_config = True
        elif name == "config":
            self.found.configs.append(self.next_value(name) if value is None else value)
        elif last == "help" and parameter in {p.name for p in self.signature.of_kind("class")}:
            self.found.class_help = (parameter, self.words.pop(0) if value is None and self.following() else value)
        else:
            self.found.settings.append((name, self.flag_or_value(name) if value is None else value))

    def flag_or_value(self, name: str) -> Any:
        """True for a bare flag, else the next word.

        In `chat --multiline DIR`, the word after the flag is the positional argument; in `chat DIR --multiline maybe`
        there is no room for one, and it is a wrong value.
        """
        hint = self.signature.annotation(self.signature.locate(tuple(name.split("."))))
        following = self.following()
        if all(member in (bool, type(None)) for member in members(hint)):
            flag = following is None or (bool(self.positionals) and following.lower() not in (*BOOLEANS, "null"))
        else:
            # Of an init arg or an unknown name, it is not known here whether it takes a value.
            flag = following is None and (admits(hint, bool) or hint is Any)
        return True if flag else self.next_value(name)

    def following(self) -> str | None:
        """The next word, unless it is an option."""
        return self.words[0] if self.words and not OPTION.match(self.words[0]) else None

    def next_value(self, name: str) -> str:
        if self.following() is None:
            raise UsageError(f"--{name} needs a value.")
        return self.words.pop(0)
