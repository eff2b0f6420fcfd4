"""The text of an answer as its tokens come, up to the first of some stop strings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from litgpt.tokenizer.tokenizer import Tokenizer


class TextStream:
    """Turns token ids into text, piece by piece; joined, the pieces are the answer's text without the stop string.

    What may be the beginning of a stop string is held back until it is certain. A stop string may begin and end
    anywhere within tokens.

    Args:
        tokenizer: Of the model.
        stops: Texts that end the answer.
        after: Token ids that stand before the answer, where its text continues theirs.
        shown: Control tokens that are part of the text all the same.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str] = (), after: Sequence[int] = (), shown: Sequence[int] = ()
    ) -> None:
        self._decoder = tokenizer.stream_decoder(after=after, shown=shown)
        wrong = next((stop for stop in stops if not isinstance(stop, str)), None)
        if wrong is not None:
            raise ValueError(f"stop {wrong!r} is not valid: give a text, or a list of texts.")
        self._stops = [stop for stop in stops if stop]
        self.held = ""
        """Text that may be the beginning of a stop string."""
        self.stopped = False
        """Whether a stop string has come: nothing more follows."""

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that is certain with these ids."""
        return self._take("".join(map(self._decoder.push, token_ids)))

    def finish(self) -> str:
        """What was held back, as no more ids come."""
        last = self._take(self._decoder.finish())
        rest, self.held = self.held, ""
        return last if self.stopped else last + rest

    def _take(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self.held + piece
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        held = max((overlap(text, stop) for stop in self._stops), default=0)
        self.held = text[len(text) - held :]
        return text[: len(text) - held]


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text that is a beginning of the stop string."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
