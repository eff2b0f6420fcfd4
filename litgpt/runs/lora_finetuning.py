"""Finetuning with LoRA, whatever the loss."""

from collections.abc import Callable
from functools import partial

from litgpt.adaptation.lora import LORA_WEIGHTS, LoRASettings, apply_lora, is_lora, parameter_groups, save_lora
from litgpt.export.merged import merge_into
from litgpt.model import GPT
from litgpt.runs.finetuning import Finetuning
from litgpt.sources.adapted import add_lora
from litgpt.training.loss import LossModule, NextTokenLoss
from litgpt.training.state import Saved


def train_lora(
    job: Finetuning,
    lora: LoRASettings,
    lora_plus_ratio: float | None,
    base: str,
    loss: Callable[[GPT], LossModule] = NextTokenLoss,
) -> None:
    """Adapts the model, trains it, and merges what was learned.

    Args:
        job: The run.
        lora: What is adapted, and how.
        lora_plus_ratio: How many times as fast the second matrix learns.
        base: The model's name, as the user gave it, for the record.
        loss: Makes the loss module of the model.
    """
    gpt = job.load_model()
    apply_lora(gpt, lora)
    groups = partial(parameter_groups, learning_rate=job.learning_rate, ratio=lora_plus_ratio)
    saved = Saved(LORA_WEIGHTS, is_lora)
    outcome = job.train(gpt, saved, partial(save_lora, settings=lora, base=base), groups, loss)

    if outcome is not None and not outcome.interrupted and job.fabric.global_rank == 0:
        job.console.print(f"Saved LoRA weights to {str(outcome.checkpoint / LORA_WEIGHTS)!r}")
        merge_into(outcome.checkpoint, add_lora(job.source, outcome.checkpoint))
        job.console.print(f"Saved merged weights to {str(outcome.checkpoint / 'lit_model.pth')!r}")
        job.console.print(f"To talk with it, run:\nlitgpt chat {outcome.checkpoint}")
