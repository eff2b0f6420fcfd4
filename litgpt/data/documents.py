"""The documents of a unit of a corpus, in order."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from litgpt.data.corpus import Corpus, Unit
from litgpt.data.source_files import Extent, Report, SourceFile, decompressed, read_records_of
from litgpt.data.text_reading import (
    LINE_BREAK,
    MAX_CHUNK_BYTES,
    FilePiece,
    decode_chunks,
    last_line_break,
    lies_across,
    read_chunks,
)


class Fragment(NamedTuple):
    """A document, or a part of a long one.

    Attributes:
        text: The text, which may be empty where a document ends.
        continues: Whether it goes on in the middle of a document.
        ends: Whether the document ends here.
    """

    text: str
    continues: bool = False
    ends: bool = True


def read_documents(corpus: Corpus, unit: Unit, report: Report) -> Iterator[Fragment | None]:
    """The documents of a unit, in order; None stands for a record without text.

    Args:
        corpus: The corpus.
        unit: One of its units.
        report: Called with the number of bytes on the disk that have been read since the last call.

    Raises:
        ValueError: A damaged file, a record whose text is no text.
    """
    for extent in unit.extents:
        file = corpus.files[extent.file]
        if file.form == "text":
            yield from _text_documents(file, extent, corpus.separators, report)
        else:
            for where, values in read_records_of(file, extent, report, corpus.column):
                yield from _record_fragments(file, where, values, corpus.column)


def _record_fragments(file: SourceFile, where: str, values: Any, column: str | None) -> Iterator[Fragment | None]:
    if isinstance(values, dict):
        values = values.get(column)
    elif not isinstance(values, str | None):
        raise ValueError(f"{file.path}, {where}: a record or a text is expected, and there is {values!r:.60}.")
    if values is None or values == "":
        yield None
        return
    if not isinstance(values, str):
        raise ValueError(
            f"{file.path}, {where}: {column!r} is {values!r:.60}, which is not text. Name another with `text_column`."
        )
    place = 0
    while len(values) - place > MAX_CHUNK_BYTES:
        part = values[place : place + MAX_CHUNK_BYTES]
        cut = last_line_break(part) or MAX_CHUNK_BYTES
        yield Fragment(part[:cut], place > 0, ends=False)
        place += cut
    yield Fragment(values[place:], place > 0)


def _text_documents(file: SourceFile, extent: Extent, separators: Sequence[str], report: Report) -> Iterator[Fragment]:
    """The documents of a text file: what stands between separators, or all of it."""
    goes_on, ends = False, True
    if file.compression:
        chunks = decode_chunks(decompressed(file, report), file.path, whole_words=separators)
    else:
        piece = FilePiece(file.path, extent.first, extent.last)
        start, at_separator = _text_cut(piece, extent.start, separators)
        goes_on = start > extent.first and not at_separator
        end, _ = _text_cut(piece, extent.end, separators)
        if start == end:  # the units before and after it meet beyond it
            return
        ends = end == extent.last
        chunks = _reported(read_chunks(FilePiece(file.path, start, end), separators), report)
    split = re.compile("|".join(map(re.escape, sorted(separators, key=len, reverse=True)))) if separators else None
    for chunk in chunks:
        *whole, rest = split.split(chunk) if split else [chunk]
        for text in whole:
            if text or goes_on:
                yield Fragment(text, goes_on)
            goes_on = False
        if rest:
            yield Fragment(rest, goes_on, ends=False)
            goes_on = True
    if goes_on and ends:
        yield Fragment("", True)


def _reported(chunks: Iterator[str], report: Report) -> Iterator[str]:
    for chunk in chunks:
        report(len(chunk.encode()))
        yield chunk


def _text_cut(piece: FilePiece, near: int, separators: Sequence[str]) -> tuple[int, bool]:
    """Where the units on both sides of byte `near` of a text meet: the first place from there on where a cut changes no
    token, and whether a document begins there."""
    if near in (piece.start, piece.end):
        return near, False
    longest = max((len(word.encode()) for word in separators), default=1)
    start = max(piece.start, near - 4 * longest)
    with open(piece.path, "rb") as file:
        for window in (1 << 16, MAX_CHUNK_BYTES):
            file.seek(start)
            data = file.read(min(piece.end, near + window) - start)
            # Not from within a character, so that a place in the text is one in the file.
            skipped = next((i for i, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)
            text = data[skipped:].decode("utf-8", "ignore")
            for place, at_separator in _cuts(text, separators):
                byte = start + skipped + len(text[:place].encode())
                if byte >= near:
                    return byte, at_separator
    end = start + len(data)
    if end == piece.end:
        return end, False
    return end - next((i for i, byte in enumerate(data[::-1]) if byte & 0xC0 != 0x80), 0) - 1, False


def _cuts(text: str, separators: Sequence[str]) -> Iterator[tuple[int, bool]]:
    """The places in `text` where it may be cut, in order, and whether a separator ends there."""
    places = {match.end(): False for match in LINE_BREAK.finditer(text)}
    for word in separators:
        places |= {match.end(): True for match in re.finditer(re.escape(word), text)}
    # What begins in the last letters could be a separator that is not complete here.
    limit = len(text) - max(map(len, separators), default=1) + 1
    for place in sorted(places):
        if place <= limit and not lies_across(text, place, separators):
            yield place, places[place]
