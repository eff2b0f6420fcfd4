"""Finetune a model with low-rank adaptation (LoRA), on quantised weights too (QLoRA)."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

from litgpt import cli
from litgpt.commands.finetuning import Finetuning, Options
from litgpt.export.merged import merge_into
from litgpt.lora import LORA_WEIGHTS, LoRASettings, apply_lora, is_lora, parameter_groups, save_lora
from litgpt.model import GPT
from litgpt.training.loss import LossModule, NextTokenLoss
from litgpt.training.run_lock import unlocks_at_end
from litgpt.training.state import Saved


@unlocks_at_end
def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune/lora"),
    quantize: str | None = None,
    lora: Annotated[LoRASettings, cli.Flat("lora_")] = LoRASettings(),  # noqa: B008
    lora_plus_ratio: float | None = None,
    options: Annotated[Options, cli.Flat()] = Options(),  # noqa: B008
) -> None:
    """Finetune a model with LoRA: small matrices beside frozen weights.

    Args:
        checkpoint_dir: The model to finetune: a checkpoint directory, a known name, or a Hub id, downloaded if need be.
        out_dir: Where checkpoints, metrics.csv, logs.txt and loss.png go.
        quantize: Keep the frozen weights in 4 or 8 bits (QLoRA): bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq or
            bnb.int8-training.
        lora_plus_ratio: Let the second matrix learn this many times as fast as the first (LoRA+).
    """
    job = Finetuning(checkpoint_dir, out_dir, options, cli.spread(setup, locals()), quantize)
    train_lora(job, lora, lora_plus_ratio, str(checkpoint_dir))


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
        merge_into(outcome.checkpoint, job.source)
        job.console.print(f"Saved merged weights to {str(outcome.checkpoint / 'lit_model.pth')!r}")
        job.console.print(f"To talk with it, run:\nlitgpt chat {outcome.checkpoint}")
