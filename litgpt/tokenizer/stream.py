"""Text as token ids come."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from litgpt.tokenizer.backend import Backend


class StreamDecoder:
    """Text as token ids come, in pieces that never split a character. Made by `Tokenizer.stream_decoder`."""

    def __init__(self, backend: Backend, skipped: frozenset[int], after: Sequence[int]) -> None:
        self._backend = backend
        self._skipped = skipped
        self._spaces = backend.leading_space if all(token_id in self._skipped for token_id in after) else 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that is certain with one more id, "" where it ends within a character."""
        if token_id in self._skipped:
            return ""
        piece = self._decoder.decode(self._backend.token_bytes(token_id))
        while piece and self._spaces:
            self._spaces -= 1
            if not piece.startswith(" "):
                self._spaces = 0
                break
            piece = piece[1:]
        return piece

    def finish(self) -> str:
        """What stands for the bytes of a character that was never completed."""
        return self._decoder.decode(b"", final=True)
