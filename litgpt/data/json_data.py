"""Finetuning data of one's own: JSON files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from litgpt.cli.resources import find_file_or_folder
from litgpt.data.record_files import has_validation_part, record_files
from litgpt.data.sft import SFTData

TRAIN_NAMES, VAL_NAMES = ("train", "training"), ("val", "validation", "valid", "dev")


@dataclass(repr=False)
class JSON(SFTData):
    """A .json or .jsonl file (also .gz, .parquet, .arrow or .csv), or a folder of them.

    The form of a record is recognised by its keys: instruction, input (may be left out) and output; prompt and
    completion, each a text or messages; messages, a list of {role, content}; conversations, ShareGPT's list of {from,
    value}. A `system` text and `tools` may stand next to them; a message of the assistant with `weight` 0 is not
    learned. A .json file holds a list of records, or an object {"train": [...], "val": [...]}.
    """

    json_path: Path | None = None
    """One file; or a folder with train.json and val.json (.jsonl too), with the folders train and val, or with any
    number of files, all to train on"""
    val_json_path: Path | None = None
    """The same for the validation records, where json_path says nothing of them"""
    val_split_fraction: float | None = None
    """Part of the records held out for validation where there are no validation records; null takes 0.05"""

    takes_template: ClassVar[bool] = True

    def download(self) -> None:
        self.files()

    def files(self) -> tuple[list[Path], list[Path]]:
        if self.json_path is None:
            raise ValueError("JSON needs to know where the records are: json_path=FILE_OR_FOLDER is missing.")
        train, val = find_files(self.json_path, "json_path")
        if self.val_json_path is not None:
            if val:
                raise ValueError(
                    f"val_json_path={self.val_json_path}: json_path={self.json_path} has validation "
                    f"records of its own ({_names(val)}). Give only one of them."
                )
            val = find_files(self.val_json_path, "val_json_path")[0]
            train = [path for path in train if path not in val]
            if not train:
                raise ValueError(
                    f"val_json_path={self.val_json_path} holds every file of json_path={self.json_path}: "
                    "nothing is left to train on."
                )
        if val and self.val_split_fraction is not None:
            raise ValueError(
                f"val_split_fraction={self.val_split_fraction}: there are validation records ({_names(val)}), "
                "so none are held out. Leave it out."
            )
        return train, val


def find_files(given: Path, option: str) -> tuple[list[Path], list[Path]]:
    """The files with training records and those with validation records that a path stands for."""
    try:
        path = find_file_or_folder(given)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{option}={given}: no such file or folder. Give a .json or .jsonl file, or a folder of them."
        ) from error
    if path.is_file():
        return [path], [path] if option == "json_path" and has_validation_part(path) else []
    train, val = (_of_split(path, names) for names in (TRAIN_NAMES, VAL_NAMES))
    if train and option == "json_path":
        return train, val
    files = record_files(path.rglob("*"))
    files = [file for file in files if file not in val or option != "json_path"]
    if not files:
        there = ", ".join(sorted(entry.name for entry in path.iterdir())[:3]) or "nothing"
        raise FileNotFoundError(
            f"{option}={given} holds no .json or .jsonl file to train on (it holds {there}). Put train.json and "
            "val.json there, or give one file."
        )
    return files, val if option == "json_path" else []


def _of_split(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """The files of a split in a folder: in a folder of one of these names, or with such a name."""
    for name in names:
        if (folder / name).is_dir():
            return record_files((folder / name).rglob("*"))
    return record_files(file for file in folder.iterdir() if file.name.partition(".")[0] in names)


def _names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths[:3])
