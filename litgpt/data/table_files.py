"""Records from tables, a row each: .csv and .tsv, .parquet, and Arrow's own .arrow and .feather."""

from __future__ import annotations

import csv
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from litgpt.data.bounded_text import MAX_RECORD, lines, too_long
from litgpt.data.records import Record

DELIMITERS = ",;\t|"
ROWS_AT_ONCE = 1024


def csv_records(path: Path) -> Iterator[Record]:
    """The rows of a .csv or .tsv file, whose first row names the columns. Every value is a text, as it stands there."""
    csv.field_size_limit(MAX_RECORD)
    header = next(lines(path, newline=""), "")
    row = _RowLines(path)
    try:
        reader = csv.DictReader(row, delimiter=_delimiter(path, header), strict=True)
        for values in reader:
            row.size = 0
            where = f"{path}, line {reader.line_num}"
            if None in values:
                raise ValueError(
                    f"{where}: has more fields than the first row, which names the columns. Put fields with "
                    "commas in them in quotes."
                )
            yield Record(where, values)
    except csv.Error as error:
        raise ValueError(f"{path}: not valid CSV ({error}).") from None


class _RowLines:
    """The lines of a file, as many as make a row of bounded size: within quotes, a row goes on over any number.

    Attributes:
        size: Characters of the row so far; whoever has taken a row sets it to 0.
    """

    def __init__(self, path: Path) -> None:
        self.size, self._path, self._lines, self._number = 0, path, lines(path, newline=""), 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.size, self._number = self.size + len(line), self._number + 1
        if self.size > MAX_RECORD:
            raise too_long(self._path, f"line {self._number:,}")
        return line


def _delimiter(path: Path, header: str) -> str:
    """What stands between fields: of what is used in the field, that which makes the most columns of the header."""
    if path.suffix == ".tsv":
        return "\t"
    return max(DELIMITERS, key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))


def parquet_records(path: Path) -> Iterator[Record]:
    """The rows of a .parquet file."""
    with _reading(path):
        import pyarrow.parquet

        yield from _rows(path, pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=ROWS_AT_ONCE))


def arrow_records(path: Path) -> Iterator[Record]:
    """The rows of Arrow's IPC format, of a file or of a stream (as `datasets` keeps it)."""
    with _reading(path):
        import pyarrow.ipc

        with pyarrow.memory_map(str(path)) as source:
            try:
                reader = pyarrow.ipc.open_file(source)
                batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
            except pyarrow.ArrowInvalid:
                source.seek(0)
                batches = pyarrow.ipc.open_stream(source)
            yield from _rows(path, batches)


def _rows(path: Path, batches: Iterator[Any]) -> Iterator[Record]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_AT_ONCE):
            for values in batch.slice(start, ROWS_AT_ONCE).to_pylist():
                number += 1
                yield Record(f"{path}, row {number}", without_padding(values))


@contextmanager
def _reading(path: Path) -> Generator[None]:
    """Says what is wrong where pyarrow is missing, or cannot read the file."""
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(
            f"{path.name} is a {path.suffix[1:]} file; reading it needs pyarrow: pip install pyarrow (or litgpt[all])."
        ) from error
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}). Get it again.") from error


def without_padding(value: Any, depth: int = 0) -> Any:
    """A value of Arrow's without the keys that are null only because other rows have them.

    Arrow gives every object of a column all keys that any of them has. Those of a record and of a message are kept:
    what is null there is told from what is missing.
    """
    if isinstance(value, dict):
        return {key: without_padding(part, depth + 1) for key, part in value.items() if part is not None or depth < 2}
    if isinstance(value, list):
        return [without_padding(part, depth) for part in value]
    return value
