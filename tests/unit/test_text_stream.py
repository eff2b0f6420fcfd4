"""Text as tokens come, up to a stop string."""

import random

import pytest

from litgpt.generation.text import TextStream


class Letters:
    """A tokenizer whose ids are characters."""

    def stream_decoder(self, after=(), shown=()):
        return self

    def push(self, token_id: int) -> str:
        return chr(token_id)

    def finish(self) -> str:
        return ""


def stream(text: str, stops: list[str], sizes: random.Random) -> tuple[list[str], bool]:
    decoder, pieces = TextStream(Letters(), stops), []
    ids = [*map(ord, text)]
    while ids and not decoder.stopped:
        count = sizes.randrange(1, 4)
        pieces.append(decoder.push(ids[:count]))
        del ids[:count]
    pieces.append(decoder.finish())
    return pieces, decoder.stopped


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one, two, three", [], "one, two, three"),
        ("one, two, three", ["two"], "one, "),
        ("one, two, three", ["three", ", t"], "one"),
        ("aaab", ["aab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("no end here: th", ["the"], "no end here: th"),
        ("stop", ["stop"], ""),
        ("text", [""], "text"),
    ],
)
def test_the_text_ends_before_the_first_stop_string(text, stops, expected):
    for seed in range(10):
        pieces, stopped = stream(text, stops, random.Random(seed))
        assert "".join(pieces) == expected
        assert stopped == (expected != text)


def test_nothing_is_held_back_without_need():
    decoder = TextStream(Letters(), ["\n\n"])
    assert decoder.push(map(ord, "line\n")) == "line"
    assert decoder.push(map(ord, "x")) == "\nx"
