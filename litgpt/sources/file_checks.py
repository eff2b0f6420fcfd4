"""What is wrong with the files of a checkpoint directory."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from litgpt.checkpoint import (
    COMPANION_FILES,
    HYPERPARAMETERS,
    WEIGHTS,
    hf_weight_files,
    holds_adaptation_alone,
    missing_files,
    read_state_dict,
)
from litgpt.checkpoint.names import LORA_WEIGHTS
from litgpt.checkpoint.weight_index import read_weight_index
from litgpt.cli.untrusted import LARGE_BYTES, SETTINGS_BYTES, read_json_object, read_yaml_mapping
from litgpt.formats.safetensors_file import read_safetensors
from litgpt.sources.findings import Findings

LARGE_FILES = ("tokenizer.json", "tekken.json", "vocab.json")
JSON_FILES = tuple(name for name in COMPANION_FILES if name.endswith(".json"))


def check_files(findings: Findings) -> None:
    """What a checkpoint directory lacks, and which of its files cannot be what their names say."""
    path = findings.path
    with findings.catching("files"):
        for missing in missing_files(path, weights=not holds_adaptation_alone(path)):
            findings.fail("files", f"It lacks {missing}. Download or convert the checkpoint again.")
        files = {path / WEIGHTS} if (path / WEIGHTS).exists() else set(hf_weight_files(path))
        for file in sorted(_numbered_with(files) - files):
            if file.is_file():  # the index does not list it
                files.add(file)
            else:
                findings.fail("files", f"It lacks the weight file {file.name}. Download the checkpoint again.")
        names = {}
        for file in filter(Path.is_file, sorted(files)):
            with findings.catching("files"):
                names[file.name] = set(_names_in(file))
        if findings.kind == "Hugging Face":
            _check_index(findings, names)
    _check_json_files(findings)
    _check_lora(findings)
    with findings.catching("files"):
        _check_hyperparameters(path / HYPERPARAMETERS)
    for leftover in sorted(path.glob("*.incomplete")):
        findings.warn("files", f"'{leftover}' is what an interrupted download left. It may be deleted.")


def _numbered_with(files: Iterable[Path]) -> set[Path]:
    """All files of the series that some of these are of: `-00001-of-00003` says that there are three."""
    series = set()
    for file in files:
        if match := re.fullmatch(r"(.+)-\d+-of-(\d+)(\.\w+)", file.name):
            stem, total, end = match.groups()
            numbers = (f"{number:0{len(total)}}" for number in range(1, int(total) + 1))
            series.update(file.with_name(f"{stem}-{number}-of-{total}{end}") for number in numbers)
    return series


def _names_in(file: Path) -> Iterable[str]:
    """Names of the tensors in a weight file. Raises `ValueError` where it is damaged."""
    return read_safetensors(file, check=False) if file.suffix == ".safetensors" else read_state_dict(file, check=False)


def _check_index(findings: Findings, names: dict[str, set[str]]) -> None:
    """The index must say of every tensor which file holds it."""
    index = next((path for path in _indices(findings.path) if path.is_file()), None)
    if index is None:
        return
    listed = read_weight_index(index)
    lost = [f"{name} is not in {file}" for name, file in listed.items() if file in names and name not in names[file]]
    extra = [f"{name} in {file} is not listed" for file, held in names.items() for name in sorted(held - listed.keys())]
    if lost:
        remedy = "Download the checkpoint again; index and weights are of different versions."
        findings.fail("files", f"'{index}' lists tensors that are not in their files. {remedy}", lost)
    if extra:
        findings.fail("files", f"'{index}' does not list all tensors. Download it again.", extra)


def _indices(path: Path) -> list[Path]:
    return [path / "model.safetensors.index.json", path / "pytorch_model.bin.index.json"]


def _check_json_files(findings: Findings) -> None:
    for name in COMPANION_FILES:
        file = findings.path / name
        if not file.is_file():
            continue
        with findings.catching("files"):
            with file.open("rb") as opened:
                start = opened.read(64)
            if start.startswith(b"version https://git-lfs"):
                raise ValueError(f"'{file}' is a Git LFS pointer, not the file itself. Fetch it with `git lfs pull`.")
            if name in JSON_FILES:
                read_companion(file)


def read_companion(file: Path) -> dict[str, Any]:
    """A JSON file that came with a checkpoint."""
    return read_json_object(file, limit=LARGE_BYTES if file.name in LARGE_FILES else SETTINGS_BYTES)


def _check_lora(findings: Findings) -> None:
    file = findings.path / LORA_WEIGHTS
    if not file.is_file():
        return
    with findings.catching("files"):
        names = read_state_dict(file)
        if not any("lora_" in name for name in names):
            raise ValueError(f"'{file}' holds no LoRA matrices. Delete it, or train again.")


def _check_hyperparameters(file: Path) -> None:
    if not file.is_file():
        return
    read_yaml_mapping(file, remedy="Correct or delete it.")
