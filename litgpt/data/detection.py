"""Which data module reads what lies at a path."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from litgpt.cli.resources import find_file_or_folder
from litgpt.data.object_store import is_remote
from litgpt.data.token_chunks import INDEX_FILE

PLACES = ("data_dir", "data_path", "path")  # settings that say where the data is, and not what it is
RECORDS = (".json", ".jsonl", ".parquet", ".csv", ".arrow", ".zst", ".gz")
MANY = 100_000  # files of a folder to look at


def module_for(settings: dict[str, Any], choices: Sequence[str]) -> str | None:
    """The one of `choices` that reads the data which `settings` name: `LitData` token chunks, `TextFiles` plain text.

    None where they do not name any.

    Raises:
        FileNotFoundError: There is nothing.
        ValueError: Something else is there.
    """
    option = next((name for name in PLACES if settings.get(name) is not None), None)
    if option is None:
        return None
    value = settings[option]
    if not isinstance(value, str | Path) or is_remote(str(value)) or str(value).lstrip().startswith("["):
        return _of(choices, "LitData")
    try:
        path = find_file_or_folder(value)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"data.{option}={value}: no such file or folder. Give a folder of text files, or one that `litgpt "
            "prepare_dataset` has written; for a data set that is downloaded, name it as `data`."
        ) from None
    if path.is_dir() and any(True for _ in _indices(path)):
        return _of(choices, "LitData")
    names = [path.name] if path.is_file() else [p.name for p in islice(path.rglob("*"), MANY)]
    if any(name.endswith(".txt") for name in names):
        return _of(choices, "TextFiles") or _refuse(option, value, "text files", "data=TextFiles data.data_dir")
    if any(name.endswith(RECORDS) for name in names):
        raise ValueError(
            f"data.{option}={value} holds records, not plain text. To pretrain on them: `litgpt "
            f"prepare_dataset --source_path {value} --checkpoint_dir TOKENIZER --destination_path DIR`, then "
            "data.data_dir=DIR. For instructions or conversations: data=JSON data.json_path=FILE."
        )
    raise ValueError(f"data.{option}={value} holds neither text files (.txt) nor prepared data ({INDEX_FILE}).")


def option_for(value: str) -> str | None:
    """How to name the data that somebody gave as `--data VALUE`: a file, a folder, a data set of the Hub."""
    path = Path(value)
    if value.endswith(RECORDS):
        return f"--data JSON --data.json_path {value}"
    if value.endswith(".txt"):
        return f"--data TextFiles --data.data_path {value}"
    if path.is_dir():
        if any(True for _ in _indices(path)):
            return f"--data LitData --data.data_path {value}"
        records = any(name.name.endswith(RECORDS) for name in islice(path.iterdir(), MANY))
        return f"--data JSON --data.json_path {value}" if records else f"--data TextFiles --data.data_path {value}"
    if re.fullmatch(r"[\w-]+(\.[\w-]+)*/[\w.-]+", value):
        return f"--data HFDataset --data.repo_id {value}"
    return None


def _indices(path: Path) -> Iterator[Path]:
    yield from path.glob(INDEX_FILE)
    yield from path.glob(f"*/{INDEX_FILE}")


def _of(choices: Sequence[str], name: str) -> str | None:
    return name if name in choices else None


def _refuse(option: str, value: Any, what: str, remedy: str) -> None:
    raise ValueError(f"data.{option}={value} holds {what}: give it as {remedy}={value}.")
