"""Tokenising large amounts of text: each word is encoded once, and looked up from then on.

Most tokenizers cut a text into words before anything else, and what becomes of a word does not depend on its
neighbours. The library's encoding of a word costs about twenty times what it costs to look it up, and nine of ten words
have been there before.
"""

from __future__ import annotations

import random
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from litgpt.tokenizer.tokenizer import Tokenizer

# A text is cut before a space that something visible follows, and at text_reading's LINE_BREAK. (The first alternative
# is what most words are; the second one alone would do.)
WORD = re.compile(r" ?[!-~]+(?= [!-~])| ?(?:[^ \n]+| (?!\S)|\n(?![^\s/])|(?<!\S)\n)*\n?")
MAX_WORDS = 1 << 18  # in the cache, about 50 MB
MAX_WORD = 40  # letters of one that is kept
MOST_UNKNOWN = 1 / 3  # of a batch; beyond it, as in tables of numbers, the library is quicker with the whole text


class WordCache:
    """Encodes texts by a tokenizer, with nothing put around them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, bytes] | None = {} if splits_at_words(tokenizer) else None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int32 (T,)."""
        known = self._known
        if known is None:
            return self._plain(texts)
        words = [WORD.findall(text) for text in texts]
        counts = Counter(chain.from_iterable(words))
        unknown = counts.keys() - known.keys()
        if len(known) + len(unknown) > MAX_WORDS:
            known.clear()
            unknown = set(counts)
        if len(unknown) > 100 and len(unknown) > MOST_UNKNOWN * counts.total():
            self._learn(known, [word for word in unknown if counts[word] > 1])
            return self._plain(texts)
        rare = self._learn(known, unknown)
        look_up = known.__getitem__ if not rare else lambda word: known.get(word) or rare.get(word, b"")
        return [np.frombuffer(b"".join(map(look_up, text)), np.int32) for text in words]

    def _learn(self, known: dict[str, bytes], words: Iterable[str]) -> dict[str, bytes]:
        """Adds words to the cache; the ids of those that are too long for it."""
        words = list(words)
        new = dict(zip(words, map(np.ndarray.tobytes, self._plain(words)), strict=True))
        known.update((word, ids) for word, ids in new.items() if len(word) <= MAX_WORD)
        return {word: ids for word, ids in new.items() if len(word) > MAX_WORD}

    def _plain(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(array("i", ids), np.int32) for ids in self._tokenizer.encode_batch_ids(texts, bos=False)]


def splits_at_words(tokenizer: Tokenizer) -> bool:
    """Whether cutting a text as WORD does changes no token: of a tokenizer that splits it there itself, which texts of
    all kinds of words, marks and spaces have to confirm."""
    if not tokenizer.encodes_words_apart:
        return False
    rng = random.Random(0)
    parts = [
        *"abXYZ09,.;:!?'\"()-_<>|/\\#@é漢ß🙂я",
        *" " * 12,
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "  ",
        "   ",
        "\u00a0",
        "\x1c",
    ]
    parts += ["'s", "'ll", " the", " word", "New", "2025", "...", "{\n", "\u0301", "ا", "\u200d", "\u3000", "?!"]
    texts = ["".join(rng.choices(parts, k=400)) for _ in range(40)]
    whole = tokenizer.encode_batch_ids(texts, bos=False)
    words = [[word for word in WORD.findall(text) if word] for text in texts]
    apart = iter(tokenizer.encode_batch_ids(list(chain.from_iterable(words)), bos=False))
    return all(
        list(chain.from_iterable(next(apart) for _ in text)) == ids for text, ids in zip(words, whole, strict=True)
    )
