"""What each library's tokenizer offers to ours."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

MAX_ID = 2**24 - 1  # of a token; vocabularies are made lists of
MOST_COMPOSED = 3  # Hangul, for example: three letters of three bytes make up a syllable of three


class Backend(ABC):
    """What both kinds of file offer.

    Attributes:
        control: text and id of each control token.
        markers: the same of every token that only `allow_special` makes of its text, the control tokens among them.
    """

    vocab_size: int
    control: dict[str, int]
    markers: dict[str, int]
    strips_left: set[str]
    strips_right: set[str]
    bos_id: int | None = None
    eos_id: int | None = None
    leading_space = 0  # how many spaces at the very beginning of a text are no part of it
    encodes_words_apart = False
    most_bytes: int | None = None
    """How many bytes of a text one token stands for, at most; None where that has no bound: an unknown word of any
    length is one token, or white space is dropped."""

    @cached_property
    def control_ids(self) -> frozenset[int]:
        return frozenset(self.control.values())

    @cached_property
    def marker_ids(self) -> frozenset[int]:
        return frozenset(self.markers.values())

    @abstractmethod
    def token_to_id(self, token: str) -> int | None: ...

    @abstractmethod
    def id_to_token(self, token_id: int) -> str | None: ...

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, control tokens spelled in it read as text, nothing put around it."""

    @abstractmethod
    def encode_segments(self, segments: list[str | int]) -> list[int]:
        """Ids of one text given as plain segments and the ids of the control tokens between them."""

    @abstractmethod
    def surroundings(self) -> tuple[list[int], list[int]]: ...

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that a token stands for, possibly a part of a character."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Their text, by the library."""


def damaged(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{file} is damaged or not a tokenizer ({error}). Fetch it again from the model's repository.")
