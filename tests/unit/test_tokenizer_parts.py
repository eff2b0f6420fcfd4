"""Tokenizers of vocab.json and merges.txt alone, and the space before a text, as transformers has them."""

import json
from pathlib import Path

import pytest
from transformers import GPT2Tokenizer, Qwen2Tokenizer

from litgpt.formats.gguf.vocabulary import vocabulary
from litgpt.tokenizer.tokenizer import Tokenizer
from tests import tokenizer_files

TEXTS = [
    "Hello world",
    " a space before",
    "  two\n\n\ttabs\r\n1234567 don't WE'LL x=y+1;",
    "héllo e\u0301 日本語 🦙",
    "",
    "<|im_start|>user\nHi<|im_end|>\n",
]


def vocabulary_alone(source: Path, directory: Path, **config: object) -> Path:
    """The files of a tokenizer.json's vocabulary, as GPT-2's were published."""
    directory.mkdir()
    layout = json.loads((source / "tokenizer.json").read_text())
    added = {token["content"] for token in layout["added_tokens"]}
    model = layout["model"]
    plain = {token: i for token, i in model["vocab"].items() if token not in added or i < len(model["vocab"])}
    (directory / "vocab.json").write_text(json.dumps(plain))
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    further = {t["content"]: t["id"] for t in layout["added_tokens"] if t["content"] not in plain}
    if further:
        (directory / "added_tokens.json").write_text(json.dumps(further))
    if config:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def same(ours: Tokenizer, reference) -> None:
    for text in TEXTS:
        expected = reference.encode(text)
        assert ours.encode_ids(text, allow_special=True) == expected, text
        assert ours.decode(expected, skip_special=False) == reference.decode(expected), text
    assert (ours.bos_id, ours.eos_id) == (reference.bos_token_id, reference.eos_token_id)
    assert ours.vocab_size == len(reference)


@pytest.mark.parametrize(
    "config", [{}, {"tokenizer_class": "GPT2Tokenizer"}, {"add_prefix_space": True, "tokenizer_class": "GPT2Tokenizer"}]
)
def test_gpt_2s_two_files_are_a_tokenizer(config, npm_tokenizer, tmp_path):
    directory = vocabulary_alone(npm_tokenizer("gpt2"), tmp_path / "gpt2", **config)
    same(Tokenizer(directory), GPT2Tokenizer.from_pretrained(directory))


def test_qwens_two_files_cut_words_in_qwens_way(npm_tokenizer, tmp_path):
    source = npm_tokenizer("qwen2_5")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    directory = vocabulary_alone(source, tmp_path / "qwen", **settings)
    ours = Tokenizer(directory)
    same(ours, Qwen2Tokenizer.from_pretrained(directory))
    assert ours.is_control(ours.token_to_id("<|im_end|>"))
    assert ours.eos_id == ours.token_to_id("<|im_end|>")
    whole = Tokenizer(source)
    assert [ours.encode_ids(text, allow_special=True) for text in TEXTS] == [
        whole.encode_ids(text, allow_special=True) for text in TEXTS
    ]


def test_two_files_travel_like_a_tokenizer_json(npm_tokenizer, tmp_path):
    """Their fingerprint follows each of them, and a GGUF file describes them."""
    directory = vocabulary_alone(npm_tokenizer("gpt2"), tmp_path / "gpt2")
    first = Tokenizer(directory).fingerprint()
    metadata = vocabulary(directory, 50260)
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert metadata["tokenizer.ggml.token_type"][50256] == 3  # control
    lines = (directory / "merges.txt").read_text().splitlines()
    (directory / "merges.txt").write_text("\n".join(lines[:-5]) + "\n")
    assert Tokenizer(directory).fingerprint() != first
    (directory / "merges.txt").write_text("#version: 0.2\nnot there\n")
    with pytest.raises(ValueError, match=r"vocab\.json is damaged or not a tokenizer"):
        Tokenizer(directory)
    (directory / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"nor vocab\.json and merges\.txt"):
        Tokenizer(directory)


def test_a_class_of_which_nothing_is_known_is_refused(npm_tokenizer, tmp_path):
    directory = vocabulary_alone(npm_tokenizer("gpt2"), tmp_path / "a", tokenizer_class="CLIPTokenizer")
    with pytest.raises(
        ValueError, match=r"class CLIPTokenizer cannot be made of vocab\.json and merges\.txt alone.*save_pretrained"
    ):
        Tokenizer(directory)
    (directory / "tokenizer_config.json").unlink()
    (directory / "added_tokens.json").write_text('{"<|x|>": 60000}')
    with pytest.raises(
        ValueError, match=r"the added token '<\|x\|>' has the id 60000, and vocab\.json leaves it only 50257"
    ):
        Tokenizer(directory)


@pytest.mark.parametrize("adds", [True, False, None])
def test_add_prefix_space_of_a_byte_level_tokenizer(adds, tmp_path):
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>"}
    config |= {} if adds is None else {"add_prefix_space": adds}
    directory = tokenizer_files.byte_level(tmp_path, config)
    ours = Tokenizer(directory)
    same(ours, GPT2Tokenizer.from_pretrained(directory))
    assert (ours.encode_ids("Hello") == ours.encode_ids(" Hello")) == bool(adds)


def test_a_generic_class_takes_tokenizer_json_as_it_is(tmp_path):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": True}
    ours = Tokenizer(tokenizer_files.byte_level(tmp_path, config))
    assert ours.encode_ids("Hello") != ours.encode_ids(" Hello")


@pytest.mark.parametrize("kind", ["byte_fallback", "metaspace", "sentencepiece_model"])
def test_a_llama_tokenizer_without_the_space(kind, tmp_path):
    plain = Tokenizer(getattr(tokenizer_files, kind)(tmp_path / "plain"))
    config = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}
    directory = getattr(tokenizer_files, kind)(tmp_path / "without", config)
    ours = Tokenizer(directory)
    for text in ("Hello world", " Hello", "how are you"):
        ids = ours.encode_ids(text, bos=False)
        assert ours.decode(ids) == text
        assert (ids == plain.encode_ids(text, bos=False)) == (kind == "metaspace" and text.startswith(" "))
    assert ours.encode_ids(" Hello", bos=False)[-1] == plain.encode_ids("Hello", bos=False)[-1]
    assert ours.fingerprint() != plain.fingerprint()


def test_the_fingerprint_follows_the_space(tmp_path):
    made = [
        Tokenizer(
            tokenizer_files.byte_level(
                tmp_path / str(adds), {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": adds}
            )
        )
        for adds in (True, False)
    ]
    assert made[0].fingerprint() != made[1].fingerprint()
