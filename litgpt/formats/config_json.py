"""Reading `config.json`, which came from whomever: what must hold of it, whatever model it describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from litgpt.cli.untrusted import FETCH_AGAIN, is_count, json_kind, parse_json_object, read_bounded, shown
from litgpt.config import MAX_LAYERS

# Entries that are read in more places than one, where each relies on what they are.
_OBJECTS = ("text_config", "llm_config", "rope_scaling", "rope_parameters", "quantization_config")
_COUNTS = ("num_hidden_layers", "num_nextn_predict_layers")


def read_config_json(path: Path) -> dict[str, Any]:
    """The content of a `config.json`.

    Raises:
        OSError: It cannot be read; FileNotFoundError where it is not there.
        ValueError: It is damaged, or an entry is of the wrong kind; names it.
    """
    return parse_config_json(read_bounded(path), str(path))


def parse_config_json(content: bytes, name: str) -> dict[str, Any]:
    """The same from its bytes; `name` is what errors call it."""
    config_json = parse_json_object(content, name)
    for entries in (config_json, *(config_json.get(key) for key in ("text_config", "llm_config"))):
        if isinstance(entries, dict):
            _check(entries, name)
    return config_json


def _check(entries: dict[str, Any], name: str) -> None:
    problems = [
        f"{key} is {json_kind(entries[key])}, where an object is expected"
        for key in _OBJECTS
        if entries.get(key) is not None and not isinstance(entries[key], dict)
    ]
    problems += [
        f"{key} is {shown(entries[key])}, where a number up to {MAX_LAYERS:,} is expected"
        for key in _COUNTS
        if entries.get(key) is not None and not is_count(entries[key], MAX_LAYERS)
    ]
    for rope in (entries.get("rope_scaling"), entries.get("rope_parameters")):
        for each in (rope, *rope.values()) if isinstance(rope, dict) else ():
            kinds = (each.get("type"), each.get("rope_type")) if isinstance(each, dict) else ()
            problems += [f"a rope type is {shown(kind)}" for kind in kinds if not isinstance(kind or "", str)]
    classes = entries.get("architectures")
    if not (classes is None or isinstance(classes, str) or _is_texts(classes)):
        problems.append(f"architectures is {shown(classes)}, where a list of names is expected")
    if problems:
        raise ValueError(f"'{name}' describes no model: {'; '.join(problems)}. {FETCH_AGAIN}")


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)
