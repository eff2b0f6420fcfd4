"""The decoder of a `tokenizer.json`, one token at a time: from its text to bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from litgpt.cli.untrusted import parse_json

_Step = Callable[[str], "str | bytes"]


def steps_of_decoder(decoder: dict[str, Any] | None, file: Path) -> tuple[list[_Step], int]:
    """The decoder of tokenizer.json as functions of one token, and how many leading spaces the whole text loses.

    Bytes come out where a token may be part of a character: joined before they are decoded, they make streaming exact.
    """
    steps: list[_Step] = []
    leading = 0
    for part in _flatten(decoder):
        kind = part["type"]
        if kind == "ByteLevel":
            steps.append(from_byte_level)
        elif kind == "ByteFallback":
            steps.append(_from_byte_fallback)
        elif kind == "Replace" and "String" in part["pattern"]:
            steps.append(lambda token, old=part["pattern"]["String"], new=part["content"]: token.replace(old, new))
        elif kind == "Metaspace":
            steps.append(lambda token, old=part["replacement"]: token.replace(old, " "))
            leading = (
                0 if part.get("prepend_scheme", "always") == "never" or part.get("add_prefix_space") is False else 1
            )
        elif kind == "Strip" and part["content"] == " " and not part["stop"]:
            leading = part["start"]
        elif kind == "BPEDecoder":
            steps.append(lambda token, suffix=part["suffix"]: token.replace(suffix, " "))
        elif kind != "Fuse":
            raise ValueError(f"{file} has a decoder of type {kind!r}, which no causal language model is known to use.")
    return steps, leading


def flat_parts(component: Any, parts: str) -> list[dict[str, Any]]:
    """The parts of a normalizer or pre-tokenizer of the library, as tokenizer.json writes them."""
    layout = None if component is None else parse_json(component.__getstate__())
    return [] if layout is None else layout[parts] if layout["type"] == "Sequence" else [layout]


def _flatten(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _flatten(part)
    else:
        yield decoder


def token_to_bytes(token: str, steps: list[_Step]) -> bytes:
    for step in steps:
        decoded = step(token)
        if isinstance(decoded, bytes):
            return decoded
        token = decoded
    return token.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the others for U+0100 and following, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_LETTER = _byte_level_alphabet()


def from_byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_LETTER[letter] for letter in token])
    except KeyError:
        return token.encode()


def _from_byte_fallback(token: str) -> str | bytes:
    return bytes([int(token[3:5], 16)]) if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token) else token
