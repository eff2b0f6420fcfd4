"""An LLM as a module that is trained: in a loop of one's own or by a Lightning Trainer."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from litgpt.checkpoint import read_state_dict
from litgpt.llm.assistant import Assistant
from litgpt.model import IGNORE_INDEX
from litgpt.sources.fit import compare_shapes
from litgpt.training.loss import rows_per_chunk, summed_cross_entropy

LossFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class Trainable(Assistant):
    """A model that may be trained between two answers. Letters of shapes: B rows, T tokens, V the padded vocabulary."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A state dict has the names of lit_model.pth, without "model." before them.
        self.register_state_dict_post_hook(_without_prefix)
        self.register_load_state_dict_pre_hook(_with_prefix)

    def forward(
        self, input_ids: Tensor, target_ids: Tensor | None = None, loss_fn: LossFunction | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The logits, and with targets the loss.

        Args:
            input_ids: (B, T) int64.
            target_ids: (B, T) int64, the same ids as `input_ids` where they are to be learned, -100 elsewhere: each
                place's logits are compared with the next place's target.
            loss_fn: Called with logits (B, T - 1, V) and targets (B, T - 1), in place of the cross-entropy.

        Returns:
            Logits (B, T, V); with targets also the loss: by default the mean over the targets, a float32 scalar, 0
            where there are none.

        Raises:
            ValueError: T is larger than the model's context, the shapes of ids and targets differ, or this process has
                only a part of the model.
        """
        if self.placement.is_split:
            raise ValueError(
                "The model is split over processes (tensor_parallel): it answers, but gives no logits and is not "
                "trained. Load it again for that."
            )
        if self.training and torch.is_grad_enabled():  # the weights are about to change, perhaps without a trace
            self._loaded = None
            self._live.weights_changed()
        if target_ids is not None and target_ids.shape != input_ids.shape:
            raise ValueError(
                f"target_ids {list(target_ids.shape)} must be of the shape of input_ids {list(input_ids.shape)}."
            )
        mixed = self._engine_options.get("autocast")
        with torch.autocast(self.device.type, mixed) if mixed else contextlib.nullcontext():
            logits = self.model(input_ids)
        if target_ids is None:
            return logits
        predicted, targets = logits[..., :-1, :], target_ids[..., 1:]
        if loss_fn is not None:
            return logits, loss_fn(predicted, targets)
        chunk = rows_per_chunk(logits.device.type, logits.size(-1))
        total = summed_cross_entropy(lambda rows: rows, predicted, targets, (), chunk)
        return logits, total / (targets != IGNORE_INDEX).sum().clamp(min=1)

    def trainer_setup(self, trainer_ckpt: str | Path | None = None) -> None:
        """For a Lightning Trainer's `setup` hook: takes the weights of a checkpoint that a Trainer saved.

        Args:
            trainer_ckpt: The Trainer's .ckpt file; without one nothing happens, as the weights are there already.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, or holds another model's weights.
        """
        if trainer_ckpt is None:
            return
        weights = {}
        for name, tensor in read_state_dict(trainer_ckpt).items():
            if match := re.search(r"(transformer|lm_head)\..*", name):  # after "llm." or what the module was called
                weights[match[0]] = tensor
        problems = compare_shapes(self.state_dict(), weights, "this model", "the checkpoint")
        if problems:
            raise ValueError(f"trainer_ckpt={str(trainer_ckpt)!r} does not fit the model:\n" + "\n".join(problems))
        self.load_state_dict(weights)

    def train(self, mode: bool = True) -> Trainable:
        """As of any module; and what the engine holds of earlier prompts is forgotten."""
        self._live.weights_changed()
        return super().train(mode)


def _without_prefix(module: nn.Module, weights: dict[str, Any], prefix: str, *_: Any) -> None:
    """Names of a state dict as in lit_model.pth."""
    for name in [name for name in weights if name.startswith(f"{prefix}model.")]:
        weights[prefix + name.removeprefix(f"{prefix}model.")] = weights.pop(name)


def _with_prefix(module: nn.Module, weights: dict[str, Any], prefix: str, *_: Any) -> None:
    """The same back."""
    for name in [name for name in weights if name.startswith((f"{prefix}transformer.", f"{prefix}lm_head."))]:
        weights[f"{prefix}model.{name.removeprefix(prefix)}"] = weights.pop(name)
