"""Words that are looked up become what the library makes of the whole text."""

import json
import random
import shutil
from pathlib import Path

import pytest

from litgpt.data import word_cache
from litgpt.data.word_cache import WORD, WordCache, splits_at_words
from litgpt.tokenizer.tokenizer import Tokenizer
from tests import tokenizer_files

ROOT = Path(__file__).parents[2]
PROSE = (ROOT / "config_hub/pretrain/data/shakespeare.txt").read_text()[:60_000]
CODE = "".join(path.read_text() for path in sorted((ROOT / "litgpt/data").glob("*.py"))[:8])
OTHER = (
    "Grüße aus Köln,\u00a0où est la bibliothèque?\n\n\n日本語の文章 和 中文\r\n\tтекст на  русском \n\n/** языке */\n//x"
    * 30
)
TEXTS = [text[start : start + 1500] for text in (PROSE, CODE, OTHER) for start in range(0, len(text), 1500)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(tokenizer_files.byte_level(tmp_path_factory.mktemp("tokenizer")))


def assert_the_same(tokenizer, texts, cache=None):
    cache = cache or WordCache(tokenizer)
    for _ in range(2):  # unknown, then known
        assert [ids.tolist() for ids in cache.encode(texts)] == tokenizer.encode_batch_ids(texts, bos=False)
    return cache


def test_nothing_of_a_text_is_lost_between_words():
    rng = random.Random(0)
    for _ in range(2_000):
        text = "".join(rng.choices([*"aB,/'5é漢", " ", " ", "  ", "\n", "\t", "\u00a0", "\x1c", "\r\n"], k=60))
        assert "".join(WORD.findall(text)) == text


def test_the_same_ids(tokenizer):
    cache = assert_the_same(tokenizer, TEXTS)
    assert len(cache._known) > 1_000


@pytest.mark.parametrize("family", ["gpt2", "qwen2_5", "llama3_1", "mistral_nemo"])
def test_the_same_ids_with_real_tokenizers(npm_tokenizer, family):
    real = Tokenizer(npm_tokenizer(family))
    assert splits_at_words(real)
    assert_the_same(real, TEXTS)


def test_deepseek_splits_off_digits_with_the_spaces_before_them(npm_tokenizer):
    real = Tokenizer(npm_tokenizer("deepseek_v3"))
    assert not splits_at_words(real)
    assert_the_same(real, ["   9 and 漢"])


@pytest.mark.parametrize(
    "make", [tokenizer_files.byte_fallback, tokenizer_files.metaspace, tokenizer_files.sentencepiece_model]
)
def test_tokenizers_without_such_words_are_left_alone(tmp_path, make):
    other = Tokenizer(make(tmp_path))
    assert not splits_at_words(other)
    assert_the_same(other, TEXTS[:20])


def changed(tokenizer, directory, change):
    """The tokenizer with another tokenizer.json."""
    shutil.copytree(tokenizer.dir, directory)
    layout = json.loads((directory / "tokenizer.json").read_text())
    change(layout)
    (directory / "tokenizer.json").write_text(json.dumps(layout))
    return Tokenizer(directory)


def test_what_could_lie_across_a_cut_is_left_alone(tokenizer, tmp_path):
    def two_words(layout):
        added = {"id": 401, "content": "the quick", "special": False, "normalized": False}
        layout["added_tokens"].append({**added, "single_word": False, "lstrip": False, "rstrip": False})

    def pairs(layout):
        split = {"type": "Split", "pattern": {"Regex": r"\w+ \w+|\s+|\S"}, "behavior": "Isolated", "invert": False}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        layout["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}

    def no_words(layout):
        layout["pre_tokenizer"]["use_regex"] = False

    texts = ["the quick brown fox", "a the quick"] * 3
    for number, change in enumerate((two_words, pairs, no_words)):
        other = changed(tokenizer, tmp_path / str(number), change)
        assert not splits_at_words(other), change
        assert_the_same(other, texts)


def test_tables_of_numbers_long_words_and_a_full_cache(tokenizer, monkeypatch):
    rng = random.Random(1)
    table = [" ".join(f"{rng.random():.9f}" for _ in range(200)) for _ in range(10)]
    cache = assert_the_same(tokenizer, table)
    assert len(cache._known) < 10
    cache = assert_the_same(tokenizer, ["x" * 200 + " and " + "漢" * 90])
    assert all(len(word) <= word_cache.MAX_WORD for word in cache._known)
    assert " and" in cache._known
    monkeypatch.setattr(word_cache, "MAX_WORDS", 500)
    cache = WordCache(tokenizer)
    for text in TEXTS:
        assert_the_same(tokenizer, [text], cache)
        assert len(cache._known) <= 500
