"""Records from files: .json, .jsonl (both also .gz and .zst), .parquet, .arrow and .csv."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from litgpt.cli.untrusted import parse_json
from litgpt.data.bounded_text import BYTES_PER_VALUE, MAX_RECORD_VALUES, lines, max_whole_bytes, whole_text
from litgpt.data.compressed_files import COMPRESSIONS
from litgpt.data.records import Record
from litgpt.data.table_files import arrow_records, csv_records, parquet_records

LINES = (".jsonl", ".ndjson")
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet", ".ndjson")
DESCRIPTIONS = ("dataset_info.json", "state.json", "dataset_dict.json")
TABLES = {
    ".parquet": parquet_records,
    ".arrow": arrow_records,
    ".feather": arrow_records,
    ".csv": csv_records,
    ".tsv": csv_records,
}
# What the parts of one JSON object with several splits are called.
SPLIT_NAMES = {"train": ("train", "training", "data"), "val": ("val", "validation", "valid", "dev")}


def is_record_file(name: str) -> bool:
    """Whether a file of that name is one of records; other tables (.csv, .arrow) may be anything."""
    return name.endswith(SUFFIXES)


def record_files(paths: Iterable[Path]) -> list[Path]:
    """Of some files, those with records, sorted: the tables of other kinds where there are none of the usual."""
    files = sorted(path for path in paths if path.is_file())
    if any(path.suffix == ".arrow" for path in files):  # what `datasets` saved, with descriptions of it next to it
        files = [path for path in files if path.name not in DESCRIPTIONS]
    usual = [path for path in files if is_record_file(path.name)]
    return usual or [path for path in files if path.suffix in TABLES]


def read_records(paths: Iterable[Path], split: str = "train") -> Iterator[Record]:
    """The records of all files.

    Args:
        paths: The files.
        split: Which part of a JSON object that holds several ({"train": [...], "val": [...]}).

    Raises:
        ValueError: A damaged file, or one that holds no records.
    """
    for path in paths:
        if (read := TABLES.get((path.with_suffix("") if path.suffix in COMPRESSIONS else path).suffix)) is not None:
            yield from read(path)
        else:
            yield from _json_records(path, split)


def has_validation_part(path: Path) -> bool:
    """Whether a .json file is an object that holds validation records next to the training records."""
    if ".json" not in path.suffixes[-2:]:
        return False
    content = _parsed(path)
    return isinstance(content, dict) and _part(content, "val") is not None and _part(content, "train") is not None


def _json_records(path: Path, split: str) -> Iterator[Record]:
    if any(suffix in path.suffixes for suffix in LINES):
        yield from _lines(path)
        return
    content = _parsed(path)
    if content is None:  # lines, whatever the file is called
        yield from _lines(path)
        return
    if isinstance(content, dict):
        records = _part(content, split)
        if records is None:
            keys = ", ".join(repr(key[:40]) for key in islice(content, 5)) + (", ..." if len(content) > 5 else "")
            raise ValueError(
                f"{path}: holds an object with the keys {keys}. A list of records is "
                'expected, or an object {"train": [...], "val": [...]}; records one per line belong into a .jsonl file.'
            )
    else:
        records = content
    if not isinstance(records, list):
        raise ValueError(f"{path}: a list of records is expected.")
    for number, values in enumerate(records, start=1):
        yield Record(f"{path}, record {number}", values)


def _part(content: dict[str, Any], split: str) -> list | None:
    """The records of a split in a JSON object."""
    return next((content[name] for name in SPLIT_NAMES[split] if isinstance(content.get(name), list)), None)


def _parsed(path: Path) -> Any:
    """The content of a .json file; None where that is one record per line."""
    text = whole_text(path)
    try:
        return parse_json(text, deep=True, max_values=max_whole_bytes() // BYTES_PER_VALUE)
    except json.JSONDecodeError as error:
        first_line = text.partition("\n")[0]
        if error.msg == "Extra data" and _is_json(first_line):
            return None
        raise _damaged(path, error) from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from None


def _lines(path: Path) -> Iterator[Record]:
    for number, line in enumerate(lines(path), start=1):
        if not line.strip():
            continue
        try:
            values = parse_json(line, max_values=MAX_RECORD_VALUES)
        except json.JSONDecodeError as error:
            error.lineno = number
            raise _damaged(path, error) from None
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}.") from None
        yield Record(f"{path}, line {number}", values)


def _is_json(text: str) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def _damaged(path: Path, error: json.JSONDecodeError) -> ValueError:
    return ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}, column {error.colno}).")


def content_hash(path: Path) -> str:
    """A hash of what is in a file, computed once as long as it does not change."""
    status = path.stat()
    return _content_hash(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=100_000)
def _content_hash(path: Path, changed: int, size: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
