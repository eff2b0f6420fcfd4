"""A corpus: its files, and the units of work that it is cut into.

The units follow from the files' names and sizes alone, so that whoever works on them, in whatever order, gets the
same. A unit is a range of bytes of a large plain file, whose ends every reader moves to the same places; a range of row
groups of a parquet file; a compressed file, which cannot be entered in its middle; or several small files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt.cli.secret import Secret
from litgpt.cli.suggest import did_you_mean
from litgpt.data.hub_dataset import HubDataset, Wanted, fetch_dataset, fetched
from litgpt.data.source_files import (
    FORMS,
    Extent,
    SourceFile,
    columns_of,
    describe_file,
    is_source_file,
    row_group_sizes,
)
from litgpt.data.text_reading import hold_out_text
from litgpt.hub import HubError

TEXT_COLUMNS = ("text", "content", "story", "document", "raw_content", "body")  # taken in this order
SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "validation", "valid")}
MIN_UNIT_BYTES, MAX_UNIT_BYTES = 4 << 20, 64 << 20
UNITS = 256  # as many as that, where their size is between these two
EXPANSION = 4  # about how many bytes of text one byte of a compressed file holds


@dataclass(frozen=True)
class Unit:
    """A piece of work.

    Attributes:
        number: Its place in the corpus.
        split: Where its documents go; None where each is drawn by its text.
        extents: What it reads.
        size: Bytes on the disk.
    """

    number: int
    split: str | None
    extents: tuple[Extent, ...]
    size: int


@dataclass(frozen=True)
class Corpus:
    """What is read, and how.

    Attributes:
        files: All files.
        units: All units of work.
        column: Where the text of a record is.
        separators: What stands between the documents of a text file.
        splits: Number of files and bytes of each split that has files of its own.
    """

    files: tuple[SourceFile, ...]
    units: tuple[Unit, ...]
    column: str | None
    separators: tuple[str, ...]
    splits: dict[str, dict[str, int]]


def find_corpus(
    source: str | Path,
    name: str | None = None,
    revision: str | None = None,
    access_token: Secret | str | None = None,
    download_dir: Path | None = None,
) -> tuple[dict[str, list[Path]], Path]:
    """The files that a user means, by split, and the folder that they lie below.

    Args:
        source: A file, a folder, or a data set on the Hugging Face Hub, which is downloaded.
        name: Its configuration; this and what follows is for a data set on the Hub only.
        revision: Its branch, tag or commit.
        access_token: For a gated or private one.
        download_dir: Where its files go; None takes data/ORG--NAME.

    Raises:
        FileNotFoundError: There is nothing to read.
        HubError: The data set cannot be downloaded.
    """
    path = Path(source).expanduser()
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not str(source).startswith(".")
    if path.exists() or not is_id or path.parent.is_dir() or is_source_file(path):
        given = {"name": name, "revision": revision, "access_token": access_token, "download_dir": download_dir}
        for option, value in given.items():
            if value is not None:
                raise ValueError(f"`{option}` is for a data set on the Hub, and source_path={source} is none.")
        return find_corpus_files(path), path if path.is_dir() else path.parent
    folder = Path(download_dir or Path("data") / str(source).replace("/", "--"))
    try:
        return _fetch(str(source), name, revision, access_token, folder), folder
    except HubError as error:
        message = re.sub(r"\bdata\.(?=\w+[`=])", "", str(error))
        raise HubError(f"{message} (There is no file or folder source_path={source} either.)") from None


def _fetch(
    repo_id: str, name: str | None, revision: str | None, access_token: Secret | str | None, folder: Path
) -> dict[str, list[Path]]:
    both = Wanted(repo_id, ("train", "validation"), name, revision)
    only = Wanted(repo_id, ("train",), name, revision)
    found = fetched(both, folder) or fetched(only, folder)
    if found is None:
        has_val = HubDataset(repo_id, revision, access_token).of_split("validation", name)
        found = fetch_dataset(both if has_val else only, folder, access_token)
    return {"val" if split == "validation" else split: paths for split, paths in found.items()}


def find_corpus_files(source: Path) -> dict[str, list[Path]]:
    """The files of a folder by split, sorted; {"train": [...]} where it has no folders train and val, or is a file.

    Raises:
        FileNotFoundError: There is nothing to read.
    """
    if source.is_file():
        if not is_source_file(source):
            raise ValueError(f"source_path={source}: what kind of file is that? Its name ends in none of {_list()}.")
        return {"train": [source]}
    if not source.is_dir():
        raise FileNotFoundError(f"source_path={source}: there is no such file or folder.")
    folders = {
        split: source / name
        for split, names in SPLIT_FOLDERS.items()
        for name in reversed(names)
        if (source / name).is_dir()
    }
    if "train" in folders:
        found = {split: _below(folder) for split, folder in folders.items()}
    else:
        found = {"train": _below(source)}
    for split, files in found.items():
        if not files:
            folder = folders.get(split, source)
            others = sorted(path.name for path in folder.iterdir())[:3]
            there = f"it holds {', '.join(others)}, ..." if others else "it is empty"
            raise FileNotFoundError(f"`source_path`: no file in {folder} ends in {_list()} ({there}).")
    return found


def _below(folder: Path) -> list[Path]:
    hidden = lambda path: any(part.startswith(".") for part in path.relative_to(folder).parts)  # noqa: E731
    return sorted(path for path in folder.rglob("*") if is_source_file(path) and path.is_file() and not hidden(path))


def _list() -> str:
    return ", ".join(FORMS) + " (all but the last also .gz and .zst)"


# --- units -----------------------------------------------------------------------------------------------------------


def plan_corpus(
    sources: Mapping[str, Sequence[Path]],
    root: Path,
    *,
    val_fraction: float | None,
    column: str | None = None,
    separators: Sequence[str] = (),
) -> Corpus:
    """Cut a corpus into units.

    Args:
        sources: The files of `train`, and those of `val` where it has its own.
        root: The folder that their names begin below.
        val_fraction: Part of `train` to hold out for validation; None for nothing.
        column: Where the text of a record is; None finds it out.
        separators: What stands between the documents of a text file.

    Raises:
        ValueError: The files hold nothing, or no text, or it is not clear in which column.
    """
    files, units, splits = [], [], {}
    for split, paths in sources.items():
        described = [describe_file(path, root) for path in paths]
        described = [file for file in described if file.size]
        if not described:
            raise ValueError(f"All {len(paths)} file(s) to read for {split} are empty, {paths[0]} the first.")
        splits[split] = {"files": len(described), "bytes": sum(file.size for file in described)}
        files += described
    column = _choose_column(files, column)
    total = sum(file.size * (EXPANSION if file.compression else 1) for file in files)
    unit_bytes = min(max(total // UNITS, MIN_UNIT_BYTES), MAX_UNIT_BYTES)
    first = 0
    for split, figures in splits.items():
        numbers = range(first, first + figures["files"])
        first += figures["files"]
        fraction = val_fraction if split == "train" else None
        for target, extents in _extents(files, numbers, split, fraction, separators):
            units += _cut(files, target, extents, unit_bytes, len(units))
    return Corpus(tuple(files), tuple(units), column, tuple(separators), splits)


def _extents(
    files: Sequence[SourceFile], numbers: range, split: str, fraction: float | None, separators: Sequence[str]
) -> Iterator[tuple[str | None, list[Extent]]]:
    """The parts of some files by the split that they go to."""
    whole = {number: Extent(number, 0, end := _end(files[number]), end) for number in numbers}
    if not fraction:
        yield split, list(whole.values())
        return
    plain = [number for number in numbers if files[number].form == "text" and files[number].compression is None]
    number_of = {files[number].path: number for number in plain}
    for target, pieces in zip(("train", "val"), hold_out_text(list(number_of), fraction, separators), strict=True):
        yield target, [Extent(number_of[p.path], p.start, p.end, p.end, p.start) for p in pieces]
    yield None, [extent for number, extent in whole.items() if files[number].path not in number_of]


def _end(file: SourceFile) -> int:
    return len(row_group_sizes(file)) if file.form == "parquet" else file.size


def _cut(
    files: Sequence[SourceFile], split: str | None, extents: Sequence[Extent], unit_bytes: int, first: int
) -> Iterator[Unit]:
    """Units of about `unit_bytes`: what is larger is cut, what is smaller shares one."""
    pending, size = [], 0

    def unit() -> Unit:
        nonlocal first, pending, size
        made = Unit(first, split, tuple(pending), size)
        first, pending, size = first + 1, [], 0
        return made

    for extent in extents:
        for part, part_size in _parts(files[extent.file], extent, unit_bytes):
            same_kind = not pending or (files[pending[0].file].form == "text") == (files[part.file].form == "text")
            if pending and (size + part_size > unit_bytes or not same_kind):
                yield unit()
            pending.append(part)
            size += part_size
    if pending:
        yield unit()


def _parts(file: SourceFile, extent: Extent, unit_bytes: int) -> Iterator[tuple[Extent, int]]:
    if not file.is_divisible:
        yield extent, file.size
    elif file.form == "parquet":
        sizes = row_group_sizes(file)
        scale = file.size / max(1, sum(sizes))
        yield from ((extent._replace(start=g, end=g + 1), int(size * scale)) for g, size in enumerate(sizes))
    else:
        for start in range(extent.start, extent.end, unit_bytes):
            end = min(start + unit_bytes, extent.end)
            yield extent._replace(start=start, end=end), end - start


# --- the column ------------------------------------------------------------------------------------------------------


def _choose_column(files: Sequence[SourceFile], wanted: str | None) -> str | None:
    """Where the text of records is, by the first file that holds any."""
    file = next((file for file in files if file.form != "text"), None)
    if file is None:
        if wanted is not None:
            raise ValueError(
                f"text_column={wanted} has no effect here: there are only plain text files, which have no columns."
            )
        return None
    columns = columns_of(file)
    if columns is None:  # bare strings
        return wanted
    texts = [name for name, is_text in columns.items() if is_text]
    if wanted is not None:
        if wanted not in columns:
            hint = did_you_mean(wanted, columns)
            raise ValueError(f"text_column={wanted}: {file.path} has no such column.{hint} It has: {_some(columns)}.")
        return wanted
    known = next((name for name in TEXT_COLUMNS if name in texts), texts[0] if len(texts) == 1 else None)
    if known is None:
        raise ValueError(
            f"Which column of {file.path} holds the text? Name it with `text_column`. It has: {_some(columns)}."
        )
    return known


def _some(names: Mapping[str, Any]) -> str:
    return ", ".join(list(names)[:20]) or "none"
