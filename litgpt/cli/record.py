"""The settings of the running command, and `hyperparameters.yaml`."""

import dataclasses
import enum
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml

from litgpt import __version__
from litgpt.cli.secret import Secret, hide, is_secret, learn

FILE = "hyperparameters.yaml"

# Of the command that runs now: what was typed before its options, and its settings. No context variable: a thread
# that saves a checkpoint sees it too.
_current: tuple[str, dict[str, Any]] | None = None
_given: tuple[dict[str, Any], dict[str, Any]] = ({}, {})  # those that the user gave, and the defaults, in their places


def remember(
    prog: str,
    settings: dict[str, Any],
    given: dict[str, Any] | None = None,
    defaults: dict[str, Any] | None = None,
) -> None:
    """Keep the settings of the command that runs now, which of them were given, and the defaults."""
    global _current, _given
    _given = given or {}, defaults or {}
    settings = plain(settings)
    learn(settings)
    _current = prog, without_secrets(settings)


def forget() -> None:
    """The command has ended."""
    global _current
    _current = None


def resolved_settings() -> dict[str, Any] | None:
    """The fully resolved settings of the running command, ready for YAML, without tokens and keys.

    None where the function was not started from the command line.
    """
    return _current and _current[1]


def describe_settings(out_dir: Path | None) -> str | None:
    """Those of the running command's settings that differ from the defaults, for people to read.

    Args:
        out_dir: Where `save_hyperparameters` writes all of them, if it does.

    Returns:
        Lines of `name: value`; None where the function was not started from the command line.
    """
    if _current is None:
        return None
    lines = [f"  {name}: {_short(value)}" for name, value in _dotted(_given[0], _current[1], _given[1])]
    where = f"; all are in {out_dir / FILE}" if out_dir else ""
    return "\n".join([f"Settings (the others are the defaults{where}):", *lines])


def _dotted(
    given: dict[str, Any], settings: dict[str, Any], defaults: Any, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """(name as one types it, value) of the settings that were given and differ from the defaults."""
    for name in settings:
        default = defaults.get(name) if isinstance(defaults, dict) else None
        if name not in given or settings[name] == default:
            continue
        value = given[name]
        if name == "class_path":
            yield prefix.removesuffix("."), settings[name].rpartition(".")[2]
        elif isinstance(value, dict) and isinstance(settings[name], dict):
            yield from _dotted(value, settings[name], default, prefix if name == "init_args" else f"{prefix}{name}.")
        else:
            yield prefix + name, settings[name]


def _short(value: Any) -> str:
    """A value in one line, as YAML has it."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n...\n").strip()


def save_hyperparameters(out_dir: Path) -> None:
    """Write `hyperparameters.yaml`, which works as `--config`. Does nothing where no command line was parsed."""
    if _current is None:
        return
    prog, settings = _current
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / FILE).write_text(as_yaml(prog, settings), encoding="utf-8")


def as_yaml(prog: str, settings: dict[str, Any]) -> str:
    """The settings as a file that works as `--config`."""
    head = f"# Settings of `{prog}`, litgpt {__version__}.\n"
    return head + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def plain(value: Any) -> Any:
    """A value as YAML can hold it; a `Secret` as it is, which `without_secrets` takes out."""
    if isinstance(value, Secret):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if hasattr(value, "as_dict"):  # a Namespace
        return plain(value.as_dict())
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, PurePath):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def without_secrets(settings: Any) -> Any:
    """Leave out what `is_secret`, and hide what is known to be so within other texts, such as addresses."""
    if isinstance(settings, list):
        return [without_secrets(entry) for entry in settings if not isinstance(entry, Secret)]
    if isinstance(settings, str):
        return hide(settings)
    if not isinstance(settings, dict):
        return settings
    return {name: without_secrets(value) for name, value in settings.items() if not is_secret(name, value)}
