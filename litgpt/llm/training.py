"""An LLM as a module that is trained, in a loop of one's own or by a Lightning Trainer: its loss and its state dict.

Letters of shapes: B rows, T tokens, V the padded vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from litgpt.checkpoint import read_state_dict
from litgpt.model import IGNORE_INDEX
from litgpt.sources.fit import compare_shapes
from litgpt.training.loss import rows_per_chunk, summed_cross_entropy

LossFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def next_token_loss(logits: Tensor, target_ids: Tensor, loss_fn: LossFunction | None = None) -> Tensor:
    """The loss of logits (B, T, V): those of each place are compared with the target of the next one.

    Args:
        logits: The model's.
        target_ids: (B, T) int64, -100 where nothing is to be learned.
        loss_fn: Called with logits (B, T - 1, V) and targets (B, T - 1), in place of the cross-entropy.

    Returns:
        By default the mean over the targets, a float32 scalar, 0 where there are none.
    """
    predicted, targets = logits[..., :-1, :], target_ids[..., 1:]
    if loss_fn is not None:
        return loss_fn(predicted, targets)
    chunk = rows_per_chunk(logits.device.type, logits.size(-1))
    total = summed_cross_entropy(lambda rows: rows, predicted, targets, (), chunk)
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


def read_trainer_checkpoint(path: str | Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights in a checkpoint that a Lightning Trainer saved, whatever the model was called in its module.

    Args:
        path: The .ckpt file.
        like: The weights of the model that they are for.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or holds another model's weights.
    """
    weights: dict[str, Tensor] = {}
    for name, tensor in read_state_dict(path).items():
        if match := re.search(r"(transformer|lm_head)\..*", name):  # after "llm." or what the module was called
            weights[match[0]] = tensor
    problems = compare_shapes(dict(like), weights, "this model", "the checkpoint")
    if problems:
        raise ValueError(f"trainer_ckpt={str(path)!r} does not fit the model:\n" + "\n".join(problems))
    return weights


def use_checkpoint_names(module: nn.Module) -> None:
    """Give the state dict of a module the names of lit_model.pth, without "model." before them, and take it so."""
    module.register_state_dict_post_hook(_without_prefix)
    module.register_load_state_dict_pre_hook(_with_prefix)


def _without_prefix(module: nn.Module, weights: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in weights if name.startswith(f"{prefix}model.")]:
        weights[prefix + name.removeprefix(f"{prefix}model.")] = weights.pop(name)


def _with_prefix(module: nn.Module, weights: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in weights if name.startswith((f"{prefix}transformer.", f"{prefix}lm_head."))]:
        weights[f"{prefix}model.{name.removeprefix(prefix)}"] = weights.pop(name)
