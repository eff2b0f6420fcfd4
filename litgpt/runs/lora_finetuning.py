"""Training a model that LoRA has changed, whatever the loss."""

from pathlib import Path

from torch import Tensor

from litgpt.adaptation.lora import LORA_WEIGHTS, LoRASettings, is_lora, parameter_groups, save_lora
from litgpt.checkpoint import WEIGHTS
from litgpt.export.merged import merge_into
from litgpt.runs.finetuning import Finetuning
from litgpt.sources.adapted import add_lora
from litgpt.training.loss import LossModule
from litgpt.training.state import Saved


def train_lora(job: Finetuning, loss: LossModule, lora: LoRASettings, lora_plus_ratio: float | None) -> None:
    """Train what LoRA added, and merge what was learned.

    Args:
        job: The run, announced.
        loss: Around the adapted model.
        lora: What is adapted, and how.
        lora_plus_ratio: How many times as fast the second matrix learns.
    """

    def save(directory: Path, weights: dict[str, Tensor]) -> None:
        save_lora(directory, weights, lora, str(job.checkpoint_dir))

    model = job.set_up(loss)
    optimizer = job.build_optimizer(parameter_groups(loss.gpt, job.learning_rate, lora_plus_ratio))
    outcome = job.train(model, optimizer, save, Saved(LORA_WEIGHTS, is_lora))

    if not outcome.interrupted and job.fabric.global_rank == 0:
        job.console.print(f"Saved LoRA weights to {str(outcome.checkpoint / LORA_WEIGHTS)!r}")
        merge_into(outcome.checkpoint, add_lora(job.source, outcome.checkpoint))
        job.console.print(f"Saved merged weights to {str(outcome.checkpoint / WEIGHTS)!r}")
        job.console.print(f"To talk with it, run:\nlitgpt chat {outcome.checkpoint}")
