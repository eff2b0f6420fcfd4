"""Settings on one footing, wherever they come from: full names, classes by their path, later layers over earlier ones.

A layer is a dict: parameter -> value; for a group or for overrides, a dict of its fields; for a class,
`{"class_path": ..., "init_args": {...}}` (without `class_path` where only init args were given).
"""

from pathlib import Path
from typing import Any

import yaml

from litgpt.cli.classes import accepted, unknown_init_args
from litgpt.cli.hints import admits
from litgpt.cli.other_names import here_called
from litgpt.cli.signature import Parameter, Signature
from litgpt.cli.suggest import did_you_mean
from litgpt.cli.usage_error import UsageError

Layer = dict[str, Any]


class Collector:
    """Builds one layer out of settings by name, and gathers what is wrong with their names.

    Args:
        signature: Of the command.
        origin: The file or address that the settings are from; empty for the command line.
        reads_files: Whether a group's value may be the path of a file that holds it.
    """

    def __init__(self, signature: Signature, origin: str = "", *, reads_files: bool = True) -> None:
        self.signature, self.reads_files = signature, reads_files
        self.origin = f"{origin}: " if origin else "--"
        self.layer: Layer = {}
        self.problems: list[str] = []

    def add(self, name: str, value: Any) -> None:
        """Put a setting where it belongs; `name` may be dotted, and `value` a mapping of further names."""
        path = self.signature.locate(tuple(name.split(".")))
        parameter = self.signature.parameters.get(path[0])
        if parameter is None:
            self._unknown(path, self.signature.names())
        elif parameter.kind == "class":
            self._add_class(parameter, path[1:], value)
        elif parameter.kind == "value":
            self._add_value(path, value)
        else:
            self._add_field(parameter, path[1:], value)

    def _unknown(self, path: tuple[str, ...], known: list[str], parent: str = "") -> None:
        name = ".".join(path)
        elsewhere = getattr(self.signature.function, "options_elsewhere", {})  # prefix -> the command that has them
        hint = "".join(f" `{command}` has it." for prefix, command in elsewhere.items() if name.startswith(prefix))
        dashes = f"--{parent}" if self.origin == "--" else ""  # as it is typed, there or in a file
        hint = hint or here_called(name, self.signature) or did_you_mean(name, known, dashes.__add__)
        if not hint:  # `micro_batchsize` is close to `train.micro_batch_size` without its group
            last = {entry.rpartition(".")[2]: entry for entry in reversed(known)}
            hint = did_you_mean(path[-1], last, lambda name: dashes + last[name])
        self.problems.append(f"{self.origin}{parent}{name}: unknown setting.{hint}")

    def _add_value(self, path: tuple[str, ...], value: Any) -> None:
        if len(path) > 1 and not admits(self.signature.parameters[path[0]].annotation, dict):
            self._unknown(path, self.signature.names())
        elif self._is_repeated(path, value):
            put(self.layer, path, [*(self.layer.get(path[0]) or []), value])
        else:
            put(self.layer, path, value)

    def _is_repeated(self, path: tuple[str, ...], value: Any) -> bool:
        """Whether it is one entry of a list: `--adapter A --adapter B`. A whole list is written `[A, B]`."""
        hint = self.signature.parameters[path[0]].annotation
        is_list = admits(hint, list) and not admits(hint, str)
        return is_list and isinstance(value, str) and not value.lstrip().startswith("[")

    def _add_field(self, parameter: Parameter, rest: tuple[str, ...], value: Any) -> None:
        """A group (`train`) or some of its fields (`train.max_steps`)."""
        if not rest:
            for name, field_value in self._mapping(parameter, value).items():
                self._add_field(parameter, tuple(str(name).split(".")), field_value)
            if value is None and parameter.kind == "overrides":
                self.layer.setdefault(parameter.name, None)
        elif rest[0] not in parameter.fields or (len(rest) > 1 and not admits(parameter.fields[rest[0]], dict)):
            self._unknown(rest, list(parameter.fields), f"{parameter.name}.")
        else:
            put(self.layer, (parameter.name, *rest), value)

    def _add_class(self, parameter: Parameter, rest: tuple[str, ...], value: Any) -> None:
        """A class (`data`), or its init args (`data.init_args.seed`, or shorter `data.seed`)."""
        if not rest and value in (None, "null"):
            self.layer[parameter.name] = None
            return
        if not isinstance(self.layer.get(parameter.name), dict):
            self.layer[parameter.name] = {}
        chosen = self.layer[parameter.name]
        if not rest and isinstance(value, str) and not value.lstrip().startswith("{"):
            rest = ("class_path",)
        if not rest or rest == ("init_args",):
            for name, nested in self._mapping(parameter, value).items():
                self._add_class(parameter, (*rest, *str(name).split(".")), nested)
        elif rest == ("class_path",):
            chosen["class_path"] = parameter.choice.canonical(str(value))
        else:
            rest = rest[1:] if rest[0] == "init_args" else rest
            put(chosen, ("init_args", *rest), value)

    def _mapping(self, parameter: Parameter, value: Any) -> dict[Any, Any]:
        """The value of a whole group: a mapping, its text, or a file that holds it."""
        if isinstance(value, str):
            inline = "{" in value or ":" in value or not self.reads_files
            text = value if inline or not Path(value).is_file() else Path(value).read_text(encoding="utf-8")
            try:
                value = yaml.safe_load(text)
            except yaml.YAMLError:
                value = text
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.problems.append(f"{self.origin}{parameter.name}: needs settings as `name: value`, got {value!r}.")
            return {}
        return value


def put(layer: Layer, path: tuple[str, ...], value: Any) -> None:
    """`layer[a][b] = value` for the path (a, b), making the dicts on the way."""
    for name in path[:-1]:
        if not isinstance(layer.get(name), dict):
            layer[name] = {}
        layer = layer[name]
    layer[path[-1]] = value


def merge(lower: Layer, upper: Layer) -> Layer:
    """Lay one layer over another. Another class drops the init args that were meant for the first."""
    merged = dict(lower)
    for name, value in upper.items():
        below = merged.get(name)
        both = isinstance(value, dict) and isinstance(below, dict)
        merged[name] = merge(below, value) if both and not _switches_class(below, value) else value
    return merged


def _switches_class(lower: Layer, upper: Layer) -> bool:
    return "class_path" in lower and upper.get("class_path") not in (None, lower["class_path"])


def default_layer(signature: Signature) -> Layer:
    """The classes that are chosen by default; other defaults are filled in by the parser."""
    return {
        p.name: {"class_path": p.default.class_path, "init_args": dict(p.default.init_args)}
        for p in signature.of_kind("class")
        if hasattr(p.default, "class_path")
    }


def settle_classes(layer: Layer, signature: Signature) -> list[str]:
    """Choose a class where only init args were given, and check the init args' names.

    Returns:
        What is wrong, one message each.
    """
    problems = []
    for parameter in signature.of_kind("class"):
        chosen = layer.get(parameter.name)
        if chosen is None:
            continue
        init_args = chosen.setdefault("init_args", {})
        if "class_path" not in chosen:
            takers = parameter.choice.having(set(init_args))
            try:
                taker = takers[0] if len(takers) == 1 else parameter.choice.meant_by(init_args, takers)
            except (ValueError, FileNotFoundError) as error:
                problems.append(str(error))
                continue
            if taker is None:
                problems.append(_which_class(parameter, list(init_args), takers))
                continue
            chosen["class_path"] = f"{parameter.choice.package}.{taker}"
        try:
            cls = parameter.choice.resolve(chosen["class_path"])[1]
        except UsageError as error:
            problems.append(f"--{parameter.name}: {error}")
        else:
            problems += unknown_init_args(f"--{parameter.name}", cls, init_args, f"--{parameter.name}.".__add__)
    return problems


def _which_class(parameter: Parameter, init_args: list[str], takers: list[str]) -> str:
    """Init args were given, and no class or several could be meant."""
    given = ", ".join(f"--{parameter.name}.{name}" for name in init_args)
    choice = parameter.choice
    names = takers or choice.names()
    every = {setting for name in names for setting in accepted(choice.resolve(name)[1])}
    hint = "".join(did_you_mean(name, every, f"--{parameter.name}.".__add__) for name in init_args if name not in every)
    return f"{given} needs --{parameter.name} NAME as well, one of: {', '.join(names)}.{hint}"


def refuse(problems: list[str]) -> None:
    """Raise all that is wrong with the settings' names at once."""
    if problems:
        raise UsageError("\n".join(problems) if len(problems) == 1 else "\n  ".join(["wrong settings:", *problems]))
