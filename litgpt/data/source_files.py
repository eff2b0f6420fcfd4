"""The files of a corpus: plain or compressed, text, JSON or parquet, and the records of a part of one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from litgpt.cli.untrusted import ExcessError, check_count, parse_json
from litgpt.data.bounded_text import MAX_RECORD, MAX_RECORD_VALUES, too_long
from litgpt.data.compressed_files import BLOCK_BYTES, COMPRESSIONS, compressed_position, open_bytes, reading
from litgpt.data.record_files import read_records
from litgpt.data.text_encoding import encoding_of, not_text
from litgpt.data.text_reading import decode_chunks

FORMS = {".txt": "text", ".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".parquet": "parquet"}
SUFFIXES = (*FORMS, *(form + ending for form in FORMS if form != ".parquet" for ending in COMPRESSIONS))
LONG_RECORD = 1 << 25  # characters
SEPARATOR = re.compile(r",[ \t\r\n]*")  # between the records of a list

Report = Callable[[int], object]
"""Is told how many bytes on the disk have been read since it was last called."""


@dataclass(frozen=True)
class SourceFile:
    """A file of the corpus.

    Attributes:
        path: Where it lies.
        name: Its path below the corpus, for messages and for telling whether it is still the same.
        form: text, lines (a JSON record each), json (one list of records, or one object with several) or parquet.
        size: In bytes.
        changed: When it was last changed, in ns.
    """

    path: Path
    name: str
    form: str
    size: int
    changed: int

    @property
    def compression(self) -> str | None:
        return self.path.suffix if self.path.suffix in COMPRESSIONS else None

    @property
    def is_divisible(self) -> bool:
        """Whether several units may share it."""
        return self.form == "parquet" or (self.form != "json" and self.compression is None)


class Extent(NamedTuple):
    """The part `start` to `end` of a file: bytes, of a parquet file row groups."""

    file: int
    start: int
    end: int
    last: int
    """Where the part of the file that belongs to this split ends"""
    first: int = 0
    """Where it begins"""


def is_source_file(path: Path) -> bool:
    """Whether a corpus can be read from a file of that name."""
    return path.name.endswith(SUFFIXES)


def describe_file(path: Path, root: Path) -> SourceFile:
    """What there is to know of a file; its form is looked up in it where the name leaves that open."""
    status = path.stat()
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
    form = FORMS[next(suffix for suffix in path.suffixes[::-1] if suffix in FORMS)]
    file = SourceFile(path, name, form, status.st_size, status.st_mtime_ns)
    if form == "json" and _holds_lines(file):
        return SourceFile(path, name, "lines", file.size, file.changed)
    return file


def _holds_lines(file: SourceFile) -> bool:
    """Whether a .json file has a record on each line, as many do."""
    with open_bytes(file.path) as stream, reading(file.path):
        head = stream.read(BLOCK_BYTES).lstrip(b"\xef\xbb\xbf \t\r\n")
        if not head.startswith(b"{"):
            return False
        while b"\n" not in head and len(head) < 64 * BLOCK_BYTES and (more := stream.read(BLOCK_BYTES)):
            head += more
    first, _, rest = head.partition(b"\n")
    try:
        content = parse_json(first)
    except ValueError:
        return False
    return bool(rest.strip()) or not _is_split_object(content)


def _is_split_object(content: Any) -> bool:
    return isinstance(content, dict) and any(isinstance(value, list) for value in content.values())


def row_group_sizes(file: SourceFile) -> list[int]:
    """Bytes of each row group of a parquet file, decompressed."""
    with reading(file.path):
        metadata = _parquet(file).metadata
        return [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]


def columns_of(file: SourceFile) -> dict[str, bool] | None:
    """The columns of a file, and whether they hold text; None where a record is a bare string."""
    if file.form == "parquet":
        with reading(file.path):
            schema = _parquet(file).schema_arrow
        return {field.name: _is_text(field.type) for field in schema}
    columns: dict[str, bool] = {}
    for number, (_, values) in enumerate(read_records_of(file, Extent(0, 0, file.size, file.size), lambda size: None)):
        if isinstance(values, str):
            return None
        if isinstance(values, dict):
            for name, value in values.items():
                columns[name] = columns.get(name, False) or isinstance(value, str)
        if number == 100:
            break
    return columns


def _is_text(kind: Any) -> bool:
    import pyarrow.types

    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or str(kind) == "string_view"


# --- records ---------------------------------------------------------------------------------------------------------


def read_records_of(
    file: SourceFile, extent: Extent, report: Report, column: str | None = None
) -> Iterator[tuple[str, Any]]:
    """The records of a part of a file, each with words for its place."""
    if file.form == "parquet":
        yield from _parquet_rows(file, extent, report, column)
    elif file.form == "json":
        yield from _json_records(file, report)
    elif file.compression:
        with reading(file.path):
            yield from _line_records(file, _Blocks(decompressed(file, report)), 0)
    else:
        with open(file.path, "rb") as stream:
            start, end = (_line_cut(file, stream, place) for place in (extent.start, extent.end))
            stream.seek(start)
            yield from _line_records(file, stream, start, end, report)


def _line_cut(file: SourceFile, stream: BinaryIO, near: int) -> int:
    """The first start of a line from byte `near` on."""
    if near in (0, file.size):
        return near
    stream.seek(near - 1)
    if len(line := stream.readline(MAX_RECORD)) == MAX_RECORD:
        raise _line_too_long(file, near)
    return near - 1 + len(line)


def _line_records(
    file: SourceFile, stream: Any, start: int, end: int | None = None, report: Report | None = None
) -> Iterator[tuple[str, Any]]:
    position = start
    while (end is None or position < end) and (line := stream.readline(MAX_RECORD)):
        if len(line) == MAX_RECORD:
            raise _line_too_long(file, position)
        if line.strip(b" \t\r\n\xef\xbb\xbf"):
            try:
                values = parse_json(line, max_values=MAX_RECORD_VALUES)
            except ValueError as error:
                raise _bad_line(file, position, error) from None
            yield f"the record at byte {position:,}", values
        position += len(line)
        if report is not None:
            report(len(line))


def _bad_line(file: SourceFile, position: int, error: Exception) -> ValueError:
    number, left = 1, position
    with open_bytes(file.path) as stream:
        while left and (block := stream.read(min(left, BLOCK_BYTES))):
            number, left = number + block.count(b"\n"), left - len(block)
    if isinstance(error, UnicodeDecodeError):
        return not_text(file.path, error, position + error.start, number)
    if encoding_of(file.path) not in ("utf-8", "utf-8-sig"):
        return not_text(file.path)
    column = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
    reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return ValueError(f"{file.path}, line {number}: not valid JSON ({reason}{column}).")


def _line_too_long(file: SourceFile, position: int) -> ValueError:
    return too_long(file.path, f"the line at byte {position:,}", "bytes")


def _json_records(file: SourceFile, report: Report) -> Iterator[tuple[str, Any]]:
    """The records of a JSON list, read as they come; of an object, read as a whole."""
    with reading(file.path):
        chunks = decode_chunks(decompressed(file, report), file.path)
        text = next(chunks, "").lstrip()
        if not text.startswith("["):
            records = (record for record in read_records([file.path], "train"))
            yield from ((record.where.rpartition(", ")[2], record.values) for record in records)
            return
        decoder, text, number = json.JSONDecoder(), text[1:], 0
        while True:
            text = text.lstrip(" \t\r\n")
            try:
                if text.startswith("]"):
                    return
                if number and not text.startswith(","):
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, 0)
                separator = SEPARATOR.match(text) if number else None
                begin = separator.end() if separator else 0
                if len(text) > LONG_RECORD:  # many short ones never come to that
                    check_count(text, MAX_RECORD_VALUES)
                values, end = decoder.raw_decode(text, begin)
                # A number at the end of what has been read may go on.
                if end == len(text) and not isinstance(values, dict | list | str):
                    raise json.JSONDecodeError("Expecting more", text, end)
            except ExcessError as error:
                raise ValueError(f"{file.path}, record {number + 1:,}: {error}.") from None
            except json.JSONDecodeError as error:
                more = next(chunks, None)
                while more is not None and len(more) < len(text):  # long records are not tried again and again
                    following = next(chunks, None)
                    if following is None:
                        break
                    more += following
                if len(text) > MAX_RECORD:
                    raise too_long(file.path, f"record {number + 1:,}") from None
                if more is None:
                    raise ValueError(f"{file.path}, record {number + 1}: not valid JSON ({error.msg}).") from None
                text += more
                continue
            number += 1
            text = text[end:]
            yield f"record {number}", values


def _parquet_rows(
    file: SourceFile, extent: Extent, report: Report, column: str | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    with reading(file.path):
        parquet = _parquet(file)
        metadata = parquet.metadata
        if column is None or column not in parquet.schema_arrow.names:
            raise ValueError(f"{file.path} has no column {column!r}; it has: {', '.join(parquet.schema_arrow.names)}.")
        if not _is_text(kind := parquet.schema_arrow.field(column).type):
            raise ValueError(f"{file.path}: the column {column!r} is of type {kind}. Name another with `text_column`.")
        groups, sizes = range(extent.start, extent.end), row_group_sizes(file)
        row = sum(metadata.row_group(group).num_rows for group in range(extent.start))
        rows = max(1, sum(metadata.row_group(group).num_rows for group in groups))
        size = sum(sizes[group] for group in groups)
        batch_rows = max(1, min(1024, (8 << 20) * rows // max(1, size)))
        on_disk = file.size * size // max(1, sum(sizes))
        for batch in parquet.iter_batches(batch_rows, groups, [column], use_threads=False):
            for text in batch.column(0).to_pylist():
                row += 1
                yield f"row {row}", {column: text}
            report(on_disk * batch.num_rows // rows)


# --- bytes -----------------------------------------------------------------------------------------------------------


def _parquet(file: SourceFile) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"{file.path} is a parquet file; reading it needs pyarrow: pip install pyarrow (or litgpt[all])."
        ) from error
    return pyarrow.parquet.ParquetFile(file.path, memory_map=False, pre_buffer=False)


def decompressed(file: SourceFile, report: Report) -> Iterator[bytes]:
    """The bytes of a file in blocks; what has been read of the disk is reported."""
    seen = 0
    with open_bytes(file.path) as stream, reading(file.path):
        while block := stream.read(BLOCK_BYTES):
            place = compressed_position(stream)
            report(place - seen)
            seen = place
            yield block


class _Blocks:
    """Lines out of blocks of bytes."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._lines, self._rest = blocks, iter(()), b""

    def readline(self, limit: int) -> bytes:
        while True:
            line = next(self._lines, None)
            if line is not None:
                return line
            parts = [self._rest]
            while (block := next(self._blocks, None)) is not None:
                parts.append(block)
                if b"\n" in block or sum(map(len, parts)) >= limit:
                    break
            *lines, rest = b"".join(parts).split(b"\n")
            if block is None:
                line, self._rest = rest, b""
                return line
            self._lines, self._rest = iter([line + b"\n" for line in lines]), rest
            if len(rest) >= limit:
                return rest[:limit]
