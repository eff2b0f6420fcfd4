"""What a model's linear layers are given while it reads a text: which columns of their weights matter."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from litgpt.model import GPT
from litgpt.sources.load import load_model
from litgpt.sources.source import Source
from litgpt.tokenizer.tokenizer import Tokenizer

_TOKENS = 512  # that are read together, each in the context of those before it
_LEAST = 128  # tokens: from fewer, the figures are chance


def importance(source: Source, text_file: Path) -> dict[str, Tensor]:
    """The mean square of every input of every linear layer.

    Args:
        source: The model; it is loaded whole, in float32.
        text_file: A text in UTF-8, of the kind that the model is to read and write. All of it is read.

    Returns:
        The name of each layer's weight -> (in,) float32.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no text, or too short.
    """
    tokens = _tokens(source, text_file)
    model = load_model(source, dtype=torch.float32, plain=True)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Callable[[nn.Module, Any], None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2)  # (tokens, in)
            sums[name] = sums.get(name, 0) + x.square().sum(dim=0, dtype=torch.float64)
            counts[name] = counts.get(name, 0) + len(x)

        return add

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(watch(f"{name}.weight"))
    _read(model, tokens)
    return {name: (total / counts[name]).float() for name, total in sums.items()}


def _tokens(source: Source, text_file: Path) -> Tensor:
    if not text_file.is_file():
        raise FileNotFoundError(f"calibration={str(text_file)!r}: there is no such file. Give a text file.")
    try:
        text = text_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"calibration={str(text_file)!r} is no text in UTF-8 ({error}).") from None
    tokens = Tokenizer(source.files).encode(text)
    if len(tokens) < _LEAST:
        raise ValueError(
            f"calibration={str(text_file)!r} has {len(tokens)} tokens, which are too few to show what matters. Give a "
            f"text of {_LEAST} or more; some ten thousand are usual."
        )
    return tokens


@torch.inference_mode()
def _read(model: GPT, tokens: Tensor) -> None:
    pieces = tokens.split(min(_TOKENS, model.config.block_size))
    for piece in tqdm(pieces, desc="Calibrating", unit="piece", delay=2, disable=None, leave=False, file=sys.stderr):
        model(piece[None])
