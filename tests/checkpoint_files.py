"""Small checkpoint directories, made on the spot: a random model with a real tokenizer."""

from pathlib import Path

import tokenizers
import torch

from litgpt.checkpoint import save_model
from litgpt.config import Config
from litgpt.model import GPT
from tests import shapes, tokenizer_files


def chat_model(directory: Path, *, block_size: int = 512, template: str | None = tokenizer_files.CHATML) -> Path:
    """A checkpoint whose tokenizer brings a chat template along."""
    config = {} if template is None else {"chat_template": template, "eos_token": "<|im_end|>"}
    return with_model(tokenizer_files.byte_level(directory, config), block_size)


def bare_model(directory: Path, *, block_size: int = 512) -> Path:
    """A checkpoint that was only pretrained, with a sentencepiece-like tokenizer, which drops a leading space."""
    tokenizer_files.byte_fallback(directory)
    vocabulary = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab()
    return with_model(directory, block_size, likely=[i for token, i in vocabulary.items() if token.startswith("▁")])


def with_model(directory: Path, block_size: int, likely: list[int] | None = None) -> Path:
    """Adds a random model that never ends a text by itself, and prefers the `likely` tokens."""
    config = Config(
        name="tiny-random",
        block_size=block_size,
        n_layer=2,
        n_embd=32,
        n_head=2,
        vocab_size=700,
        padded_vocab_size=704,
        **shapes.LLAMA,
        intermediate_size=64,
    )
    torch.manual_seed(0)
    model = GPT(config)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
        model.lm_head.weight[:3] = 0  # the control tokens are never the most likely ones
        if likely:
            model.lm_head.weight[likely] *= 10
    save_model(directory, model, config)
    return directory
