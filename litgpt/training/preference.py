"""Learning from pairs of replies, of which one is preferred: direct preference optimisation and its variants.

Letters: P pairs, 2P rows (chosen and rejected in turn), T tokens, C embedding width, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from litgpt.adaptation.lora import lora_layers
from litgpt.model import IGNORE_INDEX
from litgpt.parallel.ranks import all_reduce
from litgpt.training.batches import MicroBatch, micro_batch
from litgpt.training.loss import LossModule, rows_per_chunk
from litgpt.training.validation import share_out

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from litgpt.model import GPT


@dataclass(frozen=True)
class PreferenceSettings:
    """Which loss, and how far the model may go from the reference."""

    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """What a pair's log-ratio h (how much more than the reference the model prefers the chosen reply) is held to:
    sigmoid is DPO, -log sigmoid(beta h); ipo is (h - 1 / (2 beta))^2, which a finite h satisfies."""
    beta: float = 0.1
    """How strongly the model is held to the reference; the smaller, the further it may go."""
    label_smoothing: float = 0.0
    """Share of the pairs that may be labelled the wrong way round (conservative DPO), below 0.5; for sigmoid."""

    def __post_init__(self) -> None:
        if self.loss not in ("sigmoid", "ipo"):
            raise ValueError(f"loss={self.loss}: choose sigmoid or ipo.")
        if self.beta <= 0:
            raise ValueError(f"beta={self.beta}: must be positive; with 0 nothing would be learned.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing={self.label_smoothing}: must be at least 0 and below 0.5: from there on "
                "the labels say nothing."
            )
        if self.label_smoothing and self.loss == "ipo":
            raise ValueError(f"label_smoothing={self.label_smoothing} is for loss=sigmoid; ipo has none. Leave it out.")


class PreferenceLoss(LossModule):
    """DPO (https://arxiv.org/abs/2305.18290, equation 7), its conservative form with smoothed labels
    (https://ericmitchell.ai/cdpo.pdf, equation 3) and IPO (https://arxiv.org/abs/2310.12036, equation 17).

    Its terms are the pairs. A reply's log-probability is the sum over its tokens, in IPO too, as in the papers.

    The reference is the model without its LoRA updates, unless the batch brings the reference's log-probabilities.
    """

    unit: ClassVar[str] = "per pair"
    figures: ClassVar[tuple[str, ...]] = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")

    def __init__(self, gpt: GPT, settings: PreferenceSettings) -> None:
        super().__init__(gpt)
        self.settings = settings

    def num_terms(self, batch: MicroBatch) -> int:
        return int(_whole_pairs(batch.targets).sum())

    def forward(
        self,
        idx: Tensor,
        targets: Tensor,
        reference_log_probs: Tensor | None = None,
        log_probs_alone: bool = False,
        **inputs: Any,
    ) -> Tensor:
        """The loss and the `figures`, summed over pairs.

        A reply's reward is beta log(model / reference), its margin that of the chosen over the rejected one; the
        accuracy counts the pairs in which that is positive (section 5 of the DPO paper), by more than the rounding
        that is in it: a tie is no win, and where model and reference are the same, all pairs are ties.

        Args:
            idx: Token ids, (2P, T) int64: a chosen reply with its prompt, then the rejected one, pair by pair.
            targets: The ids to predict at each place, (2P, T) int64; -100 outside the replies. A pair with a row that
                has none does not count.
            reference_log_probs: Of the replies under the reference, (2P,); None computes them with LoRA off.
            log_probs_alone: Return the replies' log-probabilities, (2P,), instead.
            inputs: More arguments of `GPT.hidden_states`.

        Returns:
            (5,) in float32. Divide by the number of pairs in the whole optimizer step.
        """
        if log_probs_alone:
            return _of_replies(self._log_probs(idx, targets, inputs)[0])
        if reference_log_probs is None:
            with torch.no_grad(), reference_model(self.gpt):
                reference_log_probs = _of_replies(self._log_probs(idx, targets, inputs)[0])
        by_token, computed_in = self._log_probs(idx, targets, inputs)  # (2P, T)
        log_ratios = (_of_replies(by_token) - reference_log_probs).float()  # (2P,)
        chosen, rejected = log_ratios.view(-1, 2).unbind(1)  # (P,) each
        losses = preference_loss(chosen - rejected, self.settings)
        with torch.no_grad():
            rewards = self.settings.beta * torch.stack([chosen, rejected, chosen - rejected])  # (3, P)
            won = chosen - rejected > margin_rounding(by_token, computed_in)  # (P,)
            figures = torch.cat([rewards, won[None].to(rewards.dtype)])  # (4, P)
        counted = _whole_pairs(targets)  # (P,)
        return (torch.cat([losses[None], figures]) * counted).sum(dim=1)

    def _log_probs(self, idx: Tensor, targets: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, torch.dtype]:
        """(2P, T): the log-probability of each target; and the dtype in which the model computed it."""
        hidden = self.gpt.hidden_states(idx, **inputs)  # (2P, T, C)
        kind = hidden.device.type
        computed_in = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        chunk_rows = rows_per_chunk(kind, self.gpt.config.padded_vocab_size)
        return token_log_probs(self.gpt.logits, hidden, targets, chunk_rows), computed_in


def preference_loss(log_ratio: Tensor, settings: PreferenceSettings) -> Tensor:
    """The loss of each pair, (P,).

    Args:
        log_ratio: (P,) log of model over reference for the chosen reply, less that for the rejected one.
        settings: Which loss.
    """
    beta, smoothing = settings.beta, settings.label_smoothing
    if settings.loss == "ipo":
        return (log_ratio - 1 / (2 * beta)) ** 2
    return -(1 - smoothing) * F.logsigmoid(beta * log_ratio) - smoothing * F.logsigmoid(-beta * log_ratio)


@torch.no_grad()
def margin_rounding(by_token: Tensor, computed_in: torch.dtype) -> Tensor:
    """How far from zero rounding alone may put the log-ratio of a pair, (P,).

    The same weights give other last bits in a batch of another shape, with another number of threads and on another
    CPU, and a reply's log-probability adds up what each token's has of them. They come in either direction, so that
    their sum grows as the root of the sum of squares, not as the sum. How large each one is was measured on
    SmolLM2-135M, replies of 2 to 400 tokens alone against a padded batch: relative to that root, 3 epsilon on average
    and 9 at most in float32, where what the layers add up is itself rounded to float32; 0.7 and 1.4 in bfloat16 (mixed
    or true), where it is added up in float32 and only results are rounded.

    Args:
        by_token: (2P, T), the log-probability of each target; 0 where there is none.
        computed_in: The dtype that the model computed in.
    """
    epsilon = torch.finfo(computed_in).eps
    relative = 2 * epsilon if epsilon > torch.finfo(torch.float32).eps else 16 * torch.finfo(torch.float32).eps
    return relative * by_token.float().square().sum(dim=1).view(-1, 2).sum(dim=1).sqrt()


def token_log_probs(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, chunk_rows: int) -> Tensor:
    """(B, T) in float32: the log-probability of each target under `head(hidden)`, 0 where the target is -100.

    Chunk by chunk: no logits are kept for the backward pass, which computes each chunk's again. (Their gradient cannot
    be computed at once as in `summed_cross_entropy`: what a pair's tokens weigh is known only after all of them.)

    Args:
        head: Maps (n, C) to logits (n, V), each row on its own.
        hidden: (B, T, C).
        targets: (B, T) int64.
        chunk_rows: Rows of logits to hold at a time.
    """
    rows, labels = hidden.reshape(-1, hidden.size(-1)), targets.reshape(-1)  # (B T, C), (B T,)
    chunks = zip(rows.split(chunk_rows), labels.split(chunk_rows), strict=True)
    compute = partial(checkpoint, _log_probs_of, use_reentrant=False) if torch.is_grad_enabled() else _log_probs_of
    return torch.cat([compute(head, x, y) for x, y in chunks]).view(targets.shape)


def sum_dtype(device: torch.device) -> torch.dtype:
    """What log-probabilities of replies are held in. They are large where replies are long, and what counts is the
    small difference of two of them: float64, except where there is none."""
    return torch.float32 if device.type == "mps" else torch.float64


def _of_replies(by_token: Tensor) -> Tensor:
    """(2P,): the log-probabilities of whole replies, from those of their tokens, (2P, T)."""
    return by_token.sum(dim=1, dtype=sum_dtype(by_token.device))


def _log_probs_of(head: Callable[[Tensor], Tensor], rows: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(head(rows).float(), targets, ignore_index=IGNORE_INDEX, reduction="none")


def _whole_pairs(targets: Tensor) -> Tensor:
    """(P,) bool: which pairs have something to predict in both rows, of (2P, T)."""
    return (targets != IGNORE_INDEX).any(dim=1).view(-1, 2).all(dim=1)


@contextmanager
def reference_model(gpt: GPT) -> Generator[None]:
    """Inside, a model with LoRA is the one that it was before: without updates, dropout and noise."""
    layers, was_training = list(lora_layers(gpt)), gpt.training
    gpt.eval()
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True
        gpt.train(was_training)


@torch.no_grad()
def reference_log_probs(fabric: Fabric, model: nn.Module, batches: Iterable, num_rows: int) -> Tensor:
    """The log-probabilities of all replies under the model as it is now, (num_rows,) on the CPU.

    Args:
        fabric: The devices.
        model: A `PreferenceLoss`, set up by `fabric`.
        batches: Each pair once, with its number, the same on every rank; each takes its share.
        num_rows: Replies in all of them; those of pair i have the places 2 i and 2 i + 1.
    """
    was_training = model.training
    model.eval()
    found = torch.zeros(num_rows, device=fabric.device, dtype=sum_dtype(fabric.device))
    for batch in share_out(map(micro_batch, batches), fabric.global_rank, fabric.world_size):
        on_device = batch.to(fabric.device)
        values = model(on_device.idx, on_device.targets, log_probs_alone=True, **on_device.inputs).to(found.dtype)
        assert batch.samples is not None  # each pair has its number
        found.view(-1, 2)[batch.samples[::2, 0].to(fabric.device)] = values.view(-1, 2)
    model.train(was_training)
    return all_reduce(fabric, found, "sum").cpu()
