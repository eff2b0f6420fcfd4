"""Real tokenizers, small ones, made on the spot."""

import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = [
    "The quick brown fox jumps over the lazy dog. Hello world, how are you today?",
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer",
    "def f(x):\n    return x ** 2  # a comment\n\n\tprint(f(12345))",
    "Grüße aus Köln, où est la bibliothèque? Ça va très bien, naïve façade.",
    "日本語の文章 和 中文 текст на русском языке",
] * 20

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(directory: Path, config: dict[str, Any] | None = None, special: tuple[str, ...] = ()) -> Path:
    """A tokenizer.json as GPT-2, Llama 3 and Qwen have it: byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = special or ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return write(directory, tokenizer, {"bos_token": None, "eos_token": special[0], **(config or {})})


def byte_fallback(directory: Path, config: dict[str, Any] | None = None, post_processor: bool = True) -> Path:
    """A tokenizer.json as Llama 2 has it: BPE on characters, a space in front, unknown characters as bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    prepend, replace = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([prepend, replace])
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special + byte_tokens, show_progress=False)
    tokenizer.train_from_iterator([line.replace("本", "") for line in TEXT[:4]], trainer)
    layout = json.loads(tokenizer.to_str())
    layout["added_tokens"] = [token for token in layout["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(layout))
    if post_processor:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return write(
        directory, tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **(config or {})}
    )


def metaspace(directory: Path, config: dict[str, Any] | None = None) -> Path:
    """A tokenizer.json with the Metaspace pre-tokenizer, which puts the space before a text's first word only."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    markers = [AddedToken("<|user|>", special=True, rstrip=True), AddedToken("<|end|>", special=True, lstrip=True)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *markers], show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return write(directory, tokenizer, {"bos_token": "<s>", "eos_token": "</s>", **(config or {})})


def sentencepiece_model(directory: Path, config: dict[str, Any] | None = None, **options: Any) -> Path:
    """A tokenizer.model: BPE with byte fallback, as Llama 2 has it."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {
        "model_type": "bpe",
        "vocab_size": 480,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 0.99,
        "minloglevel": 2,
    }
    with (directory / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT), model_writer=file, **{**settings, **options}
        )
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def write(directory: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}, ensure_ascii=False)
    )
    return directory
