"""The checkpoints known by name: data, one file per family, next to this one.

Nothing here imports torch, so that names can be listed and checked before anything heavy is loaded.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from litgpt.cli.suggest import did_you_mean

MODELS_DIR = Path(__file__).parent


@dataclass(frozen=True)
class KnownCheckpoint:
    """A published checkpoint, as data."""

    repo_id: str
    """`org/name` on the Hugging Face Hub."""
    name: str
    """Short name."""
    family: str
    """The file in `litgpt/catalog` it is listed in."""
    series: str
    """What it and the ones published with it are called together, such as `Llama 3.2`. Default: the family."""
    architecture: str
    """The class of its text model, as its `config.json` names it."""
    license: str | None
    """SPDX identifier or usual short name of the licence of the weights; None where it is not certain."""
    parameters: int
    """Number of parameters of the text model; a head that shares the embedding's weight counts once."""
    prompt_style: str
    """Name of the prompt style to use where the checkpoint brings no chat template."""
    config: dict[str, Any]
    """The fields of `Config` that differ from the defaults."""


# What may stand at every level of a family file besides the fields of `Config`.
LABELS = ("series", "architecture", "license", "prompt_style")


@lru_cache(maxsize=1)
def known_checkpoints() -> dict[str, KnownCheckpoint]:
    """Every checkpoint of `litgpt/catalog/*.yaml`, by repo id."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    known = {}
    for path in sorted(MODELS_DIR.glob("*.yaml")):
        with path.open(encoding="utf-8") as file:
            family = yaml.load(file, Loader=loader)
        known.update((entry.repo_id, entry) for entry in _read_family(path.stem, family))
    return known


def _read_family(family: str, content: dict[str, Any]) -> Iterator[KnownCheckpoint]:
    """The checkpoints of a family file.

    The levels are the file, its groups, the sizes of a group, each with its `parameters`, and the checkpoints, each
    with its `size` or only that as text. Labels and fields of `Config` (under `config` in the outer two) may stand at
    every level, the inner ones winning.
    """
    usual = {"series": family, "license": None, "prompt_style": "Default"}
    for group in content["groups"]:
        outer = {**usual, **_settings(content), **_settings(group)}
        for repo_id, entry in group["checkpoints"].items():
            entry = {"size": entry} if isinstance(entry, str) else dict(entry)
            org, repo = repo_id.split("/")
            origin = {"name": repo, "hf_config": {"org": org, "name": repo}}
            config: dict[str, Any] = {**origin, **outer, **group["sizes"][entry.pop("size")], **entry}
            labels: dict[str, Any] = {label: config.pop(label) for label in (*LABELS, "parameters")}
            yield KnownCheckpoint(repo_id, config["name"], family, config=config, **labels)


def _settings(level: dict[str, Any]) -> dict[str, Any]:
    labels = {label: level[label] for label in LABELS if label in level}
    return {**level.get("config", {}), **labels}


def find_known(name: str) -> KnownCheckpoint | None:
    """The checkpoint of that repo id, short name or repository name, whatever the case; None where there is none."""
    wanted = name.lower()
    known = known_checkpoints().values()
    for entry in known:
        if wanted in (entry.repo_id.lower(), entry.name.lower()):
            return entry
    return next((entry for entry in known if wanted == entry.repo_id.split("/")[1].lower()), None)


def unknown_name_message(name: str) -> str:
    """What to say about a model name that is not known."""
    known = known_checkpoints().values()
    names = [entry.repo_id for entry in known] if "/" in name else [entry.name for entry in known]
    return f"No model named {name!r} is known.{did_you_mean(name, names)} `litgpt download list` lists the known names."
