"""The loss of next-token prediction, without ever holding the logits of a whole batch.

Letters: B batch, T tokens, C embedding width, V padded vocabulary, N = B * T rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.model import GPT, IGNORE_INDEX
from litgpt.training.batches import MicroBatch

NATS_PER_TOKEN = "nats per token"
# Logits held at a time. Measured on CPU: from about 256 rows on, a chunk costs no more than the plain loss, and large
# vocabularies less; below that, adding up the head's gradient once per chunk shows.
CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 27}
MANY_ELEMENTS = 1 << 26
CACHED_ELEMENTS = 1 << 19  # this many in float32 stay in the cache of a CPU's core


class LossModule(nn.Module):
    """What `fit` trains: a GPT and its loss as one module, so that data-parallel wrappers see the whole forward pass,
    head included.

    `forward(idx, targets, **inputs)` gives a sum over the terms of a micro-batch, in float32: a scalar, or (1 + F,),
    after the loss F further figures for the record. All are divided by the number of terms in the whole optimizer step.
    """

    unit: ClassVar[str] = NATS_PER_TOKEN
    """What the loss is in, once divided"""
    figures: ClassVar[tuple[str, ...]] = ()
    """Names of the further figures"""

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt

    def num_terms(self, batch: MicroBatch) -> int:
        """How many terms the sum over a micro-batch has; counted where the batch lies, before it goes to a device."""
        return batch.num_targets


def loss_module(model: nn.Module) -> LossModule:
    """The loss that `fit` trains, within what Fabric has made of it."""
    module = getattr(model, "module", model)
    assert isinstance(module, LossModule)
    return module


class NextTokenLoss(LossModule):
    """The cross-entropy of the next token; its terms are the target tokens."""

    def forward(self, idx: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
        """The loss summed over target tokens.

        Args:
            idx: Token ids, (B, T) int64.
            targets: The ids to predict at each place, (B, T) int64; -100 is not counted.
            inputs: More arguments of `GPT.hidden_states`, such as document_ids (B, T).

        Returns:
            Scalar in float32. Divide by the number of targets in the whole optimizer step.
        """
        hidden = self.gpt.hidden_states(idx, **inputs)  # (B, T, C)
        chunk_rows = rows_per_chunk(hidden.device.type, self.gpt.config.padded_vocab_size)
        return summed_cross_entropy(self.gpt.logits, hidden, targets, self.gpt.lm_head.parameters(), chunk_rows)


def rows_per_chunk(device: str, vocabulary: int) -> int:
    """Rows of logits to hold at a time on a kind of device; `vocabulary` is the width of a row."""
    return max(256, CHUNK_ELEMENTS.get(device, MANY_ELEMENTS) // vocabulary)


def even_rows(rows: int, at_most: int) -> int:
    """Rows of a chunk when this many are shared out evenly: no last chunk of a few reads the head's whole weight."""
    chunks = max(1, -(-rows // at_most))
    return max(1, -(-rows // chunks))


def summed_cross_entropy(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    parameters: Iterable[nn.Parameter],
    chunk_rows: int,
) -> Tensor:
    """Cross-entropy of `head(hidden)` with `targets`, summed over targets other than -100, chunk by chunk.

    Args:
        head: Maps (n, C) to logits (n, V), each row on its own.
        hidden: (B, T, C).
        targets: (B, T) int64.
        parameters: The parameters that `head` uses; those that require gradients get them.
        chunk_rows: Rows of logits to hold at a time, at most.
    """
    rows, labels = hidden.reshape(-1, hidden.size(-1)), targets.reshape(-1)  # (N, C), (N,)
    trained = [p for p in parameters if p.requires_grad]
    chunk_rows = even_rows(len(rows), chunk_rows)
    if not torch.is_grad_enabled():
        pairs = zip(rows.split(chunk_rows), labels.split(chunk_rows), strict=True)
        return torch.stack([_cross_entropy(head(x), y) for x, y in pairs]).sum()
    return _ChunkedCrossEntropy.apply(head, chunk_rows, labels, rows, *trained)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")


def _loss_and_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """`_cross_entropy`; its gradient (n, V) takes the place of the logits.

    Autograd would hold three more of that size in float32. On a CPU not even one is held: some rows at a time stay in
    its cache, and large pieces of new memory are slow to get there (in a step, for 512 rows of 49,152: 190 -> 100 ms).
    """
    at_once = len(logits) if logits.device.type != "cpu" else max(1, CACHED_ELEMENTS // logits.size(1))
    total = torch.zeros((), device=logits.device, dtype=torch.float32)
    for rows, labels in zip(logits.split(at_once), targets.split(at_once), strict=True):
        work = F.log_softmax(rows, dim=-1, dtype=torch.float32)
        total += F.nll_loss(work, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        counted = (labels != IGNORE_INDEX)[:, None]
        work.exp_().scatter_add_(1, labels.clamp(min=0)[:, None], -counted.float()).mul_(counted)
        rows.copy_(work)
    return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes each chunk's gradient as soon as its loss is known, so that no logits wait for the backward pass.

    Nothing is computed twice (unlike with activation checkpointing): the backward pass only scales what is there.
    """

    @staticmethod
    def forward(ctx: Any, head: Callable, chunk_rows: int, labels: Tensor, rows: Tensor, *parameters: Tensor) -> Tensor:
        total = torch.zeros((), device=rows.device, dtype=torch.float32)
        row_gradient = torch.empty_like(rows)
        sums: list[Tensor | None] = [None] * len(parameters)
        for start in range(0, len(rows), chunk_rows):
            chunk = slice(start, start + chunk_rows)
            with torch.enable_grad():
                x = rows[chunk].detach().requires_grad_()
                logits = head(x)
            gradient = logits.detach()
            total += _loss_and_gradient(gradient, labels[chunk])
            row_gradient[chunk], *gradients = torch.autograd.grad(logits, [x, *parameters], gradient)
            sums = [g if s is None else s.add_(g) for s, g in zip(sums, gradients, strict=True)]
            del x, logits, gradient  # or they stay while the next chunk is made
        ctx.gradients = [row_gradient, *sums]
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place, so they serve once
        return None, None, None, *(g.mul_(grad_output) for g in gradients)
