"""A small tokenizer trained on the training text itself, for models that start from nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
SMALLEST = 257  # every byte, and END_OF_TEXT


def train_tokenizer(texts: Iterable[str], vocab_size: int, directory: Path) -> None:
    """Train byte-level BPE (https://arxiv.org/abs/1508.07909) and write `tokenizer.json`, `tokenizer_config.json`.

    Any text can be encoded, since every byte is a token. One control token, `<|endoftext|>`, is both BOS and EOS.

    Args:
        texts: The text, in pieces of any length.
        vocab_size: Tokens to end up with, the 256 bytes and the control token included; fewer if the text is small.
        directory: Where the files go; made if it does not exist.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST:
        raise ValueError(
            f"tokenizer_vocab_size={vocab_size} is too small: every byte is a token, so it is at least {SMALLEST}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
