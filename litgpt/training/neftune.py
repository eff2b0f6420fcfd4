"""NEFTune: noise on the embeddings makes finetuning learn less by heart (https://arxiv.org/abs/2310.05914)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from litgpt.training.loss import LossModule


def add_noise(model: LossModule, alpha: float | None) -> None:
    """In training, add uniform noise of up to alpha / sqrt(L C) to what the embedding gives, L tokens of C values.

    L is the length of a row, as in the paper's own code; in packed rows it is that of each document, so that packing
    does not make the noise smaller. The noise comes from torch's global generator, whose state a checkpoint holds.

    Args:
        model: The loss that is trained; its forward takes `document_ids` (B, T) where rows are packed.
        alpha: The strength; None adds no noise.
    """
    if alpha is None:
        return
    documents: list[Tensor | None] = [None]

    def remember(module: nn.Module, args: tuple, inputs: dict[str, Any]) -> None:
        documents[0] = inputs.get("document_ids")

    def disturb(embedding: nn.Module, args: tuple, x: Tensor) -> Tensor | None:
        if not embedding.training:
            return None
        lengths = document_lengths(documents[0]) if documents[0] is not None else x.size(1)
        size = alpha / (lengths * x.size(2)) ** 0.5  # a number, or (B, T, 1)
        return x + torch.empty_like(x).uniform_(-1, 1) * size

    model.register_forward_pre_hook(remember, with_kwargs=True)
    model.gpt.transformer.wte.register_forward_hook(disturb)


def document_lengths(document_ids: Tensor) -> Tensor:
    """(B, T) ids -> (B, T, 1) how many tokens of the row have the same id, in float32."""
    same = document_ids[:, :, None] == document_ids[:, None]  # (B, T, T)
    return same.sum(dim=2, keepdim=True).float()
