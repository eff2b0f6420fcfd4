"""`config.json` to `Config` and back."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from litgpt.catalog import find_known
from litgpt.cli.untrusted import shown
from litgpt.config import Config
from litgpt.formats.architecture import Architecture
from litgpt.formats.architectures import ARCHITECTURES
from litgpt.formats.fields import Choice, Field, Rope, RopeByLayer
from litgpt.formats.quantised_weights import check_method
from litgpt.formats.recognition import architecture_of, text_model

# Fields of Config that say nothing about what the model computes, or (vocab_size) nothing that config.json knows.
_LABELS = ("name", "hf_config", "padding_multiple", "vocab_size")


def config_from_hf(config_json: dict[str, Any], name: str | None = None) -> Config:
    """The configuration that a `config.json` describes; of a multimodal checkpoint, that of its text model.

    Args:
        config_json: Its content; the spellings of transformers 4 (`rope_theta`, `rope_scaling`) and 5
            (`rope_parameters`) are both known.
        name: What the checkpoint is called (`org/name`, or a directory's name). Of a known checkpoint, the
            configuration keeps the names and the number of tokens; all other figures are those of `config_json`.

    Raises:
        ValueError: The architecture, or something in `config_json` that changes what the model computes, is not
            supported; or a figure is missing. Names it.
    """
    architecture = architecture_of(config_json)
    config_json = text_model(config_json)
    values: dict[str, Any] = {}
    problems = []
    for read in (check_method, *(entry.read for entry in architecture.config)):
        try:
            values.update(read(config_json) or {})
        except ValueError as error:
            problems.append(str(error))
        except _WRONG_KIND:  # an entry may be anything: text where it counts, a list where it divides, zero
            problems.append(_of_the_wrong_kind(read, config_json))
    if problems:
        raise ValueError(f"config.json ({architecture.name}) cannot be used: {'; '.join(dict.fromkeys(problems))}.")
    values |= _labels(name or "", values["padded_vocab_size"])
    try:
        return Config(**values)
    except ValueError as error:
        raise ValueError(f"config.json ({architecture.name}) cannot be used: {error}") from None


_WRONG_KIND = (TypeError, AttributeError, LookupError, ArithmeticError)


def _of_the_wrong_kind(read: Callable[..., Any], config_json: dict[str, Any]) -> str:
    """What to say of the entries that a reader of them fails on, with their values where it is known which they are."""
    entry = getattr(read, "__self__", None)
    keys = [entry.theirs] if isinstance(entry, Field) else list(entry.keys) if isinstance(entry, Choice) else []
    given = ", ".join(f"{key}={shown(config_json[key])}" for key in keys if config_json.get(key) is not None)
    if given:
        return f"{given} is of the wrong kind"
    name = " and ".join(keys) or type(entry).__name__
    return f"{name} does not follow from the other entries, one of which is of the wrong kind"


def ignored_entries(config_json: dict[str, Any]) -> list[str]:
    """Names of entries of a `config.json` that `config_from_hf` takes and that have no effect, there as here, though
    they look as if they had."""
    theirs = text_model(config_json)
    entries = architecture_of(config_json).config
    found = [name for entry in entries if isinstance(entry, Rope | RopeByLayer) for name in entry.ignored(theirs)]
    return list(dict.fromkeys(found))


def _labels(label: str, rows: int) -> dict[str, Any]:
    """What the name of a checkpoint says: its proper names and, with the same embedding, the number of tokens."""
    label = label.rstrip("/")
    known = find_known(label) or find_known(label.split("/")[-1]) if label else None
    if known is None:
        return {"name": label.split("/")[-1]}
    usual = Config(**known.config)
    labels: dict[str, Any] = {"name": usual.name, "hf_config": dict(usual.hf_config)}
    if usual.padded_vocab_size == rows:
        labels.update(vocab_size=usual.vocab_size, padding_multiple=usual.padding_multiple)
    return labels


def config_to_hf(config: Config, architecture: str | None = None) -> dict[str, Any]:
    """The `config.json` that describes a configuration, in the spelling that transformers 4 and 5 both read.

    Args:
        config: The configuration.
        architecture: The architecture to write, if it is known; otherwise the first that fits.

    Raises:
        ValueError: No architecture can say everything in `config`; says what the model's own lacks, or the nearest.
    """
    known = find_known(config.name) if config.name else None
    own = architecture if architecture in ARCHITECTURES else known and known.architecture
    candidates = [ARCHITECTURES[architecture]] if architecture in ARCHITECTURES else list(ARCHITECTURES.values())
    lacks: dict[str, tuple[int, str]] = {}
    for candidate in candidates:
        config_json, problems = _write(candidate, config)
        # What was written must say the same again: nothing that the model computes may be lost on the way.
        try:
            lost = differences(config_from_hf(config_json, config.name), config)
            distance = len(lost)
        except ValueError:
            lost, distance = [], len(asdict(config)) + len(problems)
        if not problems and not lost:
            return config_json
        values = ", ".join(f"{name}={getattr(config, name)!r}" for name in lost)
        lacks[candidate.name] = distance, "; ".join(problems) or f"it cannot express {values}"
    name = own if own in lacks else min(lacks, key=lambda name: lacks[name][0])
    which = f"It is a {name}:" if name == own else f"No class of transformers fits; the nearest is {name}:"
    raise ValueError(f"This model cannot be written as a Hugging Face checkpoint. {which}\n  {name}: {lacks[name][1]}")


def save_config_json(config: Config, directory: Path) -> None:
    """Writes the `config.json` of a model into a checkpoint directory; none, not even another model's, where no Hugging
    Face architecture has its shape."""
    card = directory / "config.json"
    card.unlink(missing_ok=True)
    try:
        card.write_text(json.dumps(config_to_hf(config), indent=2) + "\n", encoding="utf-8")
    except ValueError:  # model_config.yaml says it all
        card.unlink(missing_ok=True)


def _write(architecture: Architecture, config: Config) -> tuple[dict[str, Any], list[str]]:
    """What an architecture's `config.json` can say of a configuration, and what is wrong with the rest."""
    config_json: dict[str, Any] = {"architectures": [architecture.name], "model_type": architecture.model_type}
    problems = []
    for entry in architecture.config:
        try:
            config_json.update(entry.write(config))
        except ValueError as error:
            problems.append(str(error))
    return config_json, problems


def differences(one: Config, other: Config) -> list[str]:
    """Names of the fields in which two configurations compute something different."""
    left, right = _meaning(one), _meaning(other)
    return [name for name in left if left[name] != right[name]]


def _meaning(config: Config) -> dict[str, Any]:
    values = {name: value for name, value in asdict(config).items() if name not in _LABELS}
    values["attn_bias"] = config.attn_bias or config.bias
    adjustments = config.rope_adjustments
    if adjustments and config.rope_kind == "linear":
        values["rope_condense_ratio"], values["rope_adjustments"] = (
            config.rope_condense_ratio * adjustments["factor"],
            None,
        )
    return values
