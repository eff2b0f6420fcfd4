"""Plain text in pieces: what of it is held out, where it may be cut without changing a token, and its ids."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from litgpt.data.text_encoding import not_text
from litgpt.data.word_cache import WordCache

if TYPE_CHECKING:
    from litgpt.tokenizer.tokenizer import Tokenizer

CHUNK_BYTES = 1 << 18  # what one core tokenises at a time
MAX_CHUNK_BYTES = 1 << 22  # where a text without any line break is cut
# A line break between two words: every tokenizer splits a text there, so cutting there changes no token. (GPT-4o's
# regular expression takes slashes with the line break before them.)
LINE_BREAK = re.compile(r"(?<=\S)\n(?=[^\s/])")
MANY_FILES = 20  # from here on whole files are held out for validation, below it the end of each


@dataclass(frozen=True)
class FilePiece:
    """The bytes `start` to `end` of a text file."""

    path: Path
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


def whole_file(path: Path) -> FilePiece:
    return FilePiece(path, 0, path.stat().st_size)


def hold_out_text(
    files: list[Path], fraction: float, whole_words: Sequence[str] = ()
) -> tuple[list[FilePiece], list[FilePiece]]:
    """Split off `fraction` of the text: whole files, evenly spread, of many; else the end of each, from the start of a
    line on that lies in none of `whole_words`."""
    if fraction == 0:
        return [whole_file(path) for path in files], []
    if len(files) >= MANY_FILES:
        every = round(1 / fraction)
        held = set(files[every - 1 :: every] or files[-1:])
        rest = [path for path in files if path not in held]
        return [whole_file(path) for path in rest], [whole_file(path) for path in files if path in held]
    train, val = [], []
    for path in files:
        size = path.stat().st_size
        cut = beyond(path, line_start(path, int(size * (1 - fraction)), size), whole_words)
        train.append(FilePiece(path, 0, cut))
        val.append(FilePiece(path, cut, size))
    return train, [piece for piece in val if piece.size]


def line_start(path: Path, near: int, size: int) -> int:
    """The first line start in `path` from byte `near` on; without one nearby, the first character."""
    with open(path, "rb") as file:
        file.seek(near)
        window = file.read(min(1 << 16, max(0, (size - near) // 2)))
    newline = window.find(b"\n")
    if newline >= 0:
        return near + newline + 1
    first = next((i for i, byte in enumerate(window) if byte & 0xC0 != 0x80), 0)  # not inside a UTF-8 character
    return near + first


def beyond(path: Path, place: int, whole_words: Sequence[str]) -> int:
    """Byte `place` of a file, or where the one of `whole_words` ends that lies across it."""
    for word in map(str.encode, whole_words):
        start = max(0, place - len(word) + 1)
        with open(path, "rb") as file:
            file.seek(start)
            found = file.read(place + len(word) - 1 - start).find(word)
        if found >= 0:
            return start + found + len(word)
    return place


def read_chunks(piece: FilePiece, whole_words: Sequence[str] = ()) -> Iterator[str]:
    """The text of `piece` in chunks of about CHUNK_BYTES, cut at line breaks, and through none of `whole_words`.

    Raises:
        ValueError: It is not UTF-8.
    """
    with open(piece.path, "rb") as file:
        file.seek(piece.start)
        yield from decode_chunks(_blocks(file, piece.size), piece.path, piece.start, whole_words)


def _blocks(file: BinaryIO, left: int) -> Iterator[bytes]:
    while left and (block := file.read(min(left, CHUNK_BYTES))):
        left -= len(block)
        yield block


def decode_chunks(
    blocks: Iterable[bytes], path: Path, start: int = 0, whole_words: Sequence[str] = ()
) -> Iterator[str]:
    """`read_chunks` of bytes from anywhere, which begin at byte `start` of the text of `path`."""
    decoder, text, position = codecs.getincrementaldecoder("utf-8")(), "", start
    for block in blocks:
        text += _decoded(decoder, block, path, position)
        position += len(block)
        if start == 0 and text.startswith("\ufeff"):
            text = text[1:]
        # What follows the last line break is kept back until it is known whether the text goes on.
        cut = last_line_break(text, whole_words) or (len(text) if len(text) >= MAX_CHUNK_BYTES else 0)
        if 0 < cut < len(text):
            yield text[:cut]
            text = text[cut:]
        elif cut:
            yield text
            text = ""
    text += _decoded(decoder, b"", path, position, final=True)
    if text:
        yield text


def _decoded(decoder: codecs.IncrementalDecoder, block: bytes, path: Path, position: int, final: bool = False) -> str:
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        place = position + len(block) - len(error.object) + error.start
        raise not_text(path, error, place) from error


def last_line_break(text: str, whole_words: Sequence[str] = ()) -> int:
    """Where the last line break between two words ends, one within a whole word apart; 0 if there is none."""
    # A whole word that begins before the place and is not complete yet could still lie across it.
    limit = len(text) - max(map(len, whole_words), default=1) + 1
    start = max(0, len(text) - (1 << 16))
    for begin in (start, 0):
        ends = [match.end() for match in LINE_BREAK.finditer(text, begin)]
        for end in reversed(ends):
            if end <= limit and not lies_across(text, end, whole_words):
                return end
    return 0


def lies_across(text: str, place: int, whole_words: Sequence[str]) -> bool:
    """Whether one of `whole_words` begins before `place` and ends after it."""
    return any(word in text[max(0, place - len(word) + 1) : place + len(word) - 1] for word in whole_words)


def spelled_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """BOS and EOS as they are spelled, and their ids: in a plain text file they stand between documents."""
    ids = {i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None}
    return {name: i for i in ids if (name := tokenizer.decode([i], skip_special=False))}


def encode_texts(
    texts: Sequence[str],
    words: WordCache,
    *,
    continues: Sequence[bool] | None = None,
    spelled: Mapping[str, int] | None = None,
) -> Iterator[np.ndarray]:
    """The ids of each text, int32 (T,), with nothing put around them.

    Args:
        texts: What to encode.
        words: Encodes it.
        continues: Which of them go on after a cut of `read_chunks`; they become what they are in the whole text.
        spelled: Words that become a token wherever they stand, such as `spelled_tokens`. Texts by strangers have none.
    """
    spelled, continues = spelled or {}, continues or [False] * len(texts)
    split = re.compile("(" + "|".join(map(re.escape, spelled)) + ")") if spelled else None
    parts = [split.split(text) if split else [text] for text in texts]
    inner = _InnerText(words) if any(continues) else None
    plain: list[str] = []
    marked: list[_InnerText | None] = []
    for number, text in enumerate(parts):
        for place, part in enumerate(text):
            if part and part not in spelled:
                marked.append(inner if place == 0 and continues[number] else None)
                plain.append(part if marked[-1] is None else marked[-1].mark(part))
    encoded = words.encode(plain)
    ids = iter(ids if mark is None else mark.unmark(ids) for ids, mark in zip(encoded, marked, strict=True))
    for text in parts:
        if len(text) == 1 and text[0] and text[0] not in spelled:
            yield next(ids)
        else:
            found = [np.array([spelled[part]], np.int32) if part in spelled else next(ids) for part in text if part]
            yield np.concatenate(found) if found else np.empty(0, np.int32)


class _InnerText:
    """Text that goes on after a line break, for tokenizers that put a space in front of every text they are given.

    Such a text is encoded with a line break in front, whose ids are then taken away: what comes after it has no space.
    """

    def __init__(self, words: WordCache) -> None:
        self._prefix, alone, after = (ids.tolist() for ids in words.encode(["\n", "a", "\na"]))
        rest = after[len(self._prefix) :]
        self._marks = after[: len(self._prefix)] == self._prefix and rest != alone and bool(rest)

    def mark(self, text: str) -> str:
        return "\n" + text if self._marks else text

    def unmark(self, ids: np.ndarray) -> np.ndarray:
        size = len(self._prefix)
        return ids[size:] if self._marks and ids[:size].tolist() == self._prefix else ids
