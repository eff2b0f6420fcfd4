"""Finetune all weights of a model."""

from functools import partial
from pathlib import Path
from typing import Annotated

from litgpt import cli
from litgpt.checkpoint import save_model
from litgpt.runs.finetuning import Finetuning, Options
from litgpt.training.run_lock import unlocks_at_end
from litgpt.training.state import Saved


@unlocks_at_end
def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune/full"),
    options: Annotated[Options, cli.Flat()] = Options(),  # noqa: B008
) -> None:
    """Finetune all weights of a model.

    Args:
        checkpoint_dir: The model to finetune: a directory, also of LoRA weights (they are merged as they are read), a
            .gguf file, a known name or a Hub id.
        out_dir: Where checkpoints, metrics.csv, logs.txt and loss.png go.
    """
    job = Finetuning(checkpoint_dir, out_dir, options, cli.spread(setup, locals()), trains_all=True)
    gpt = job.load_model().requires_grad_(True)
    outcome = job.train(gpt, Saved(), partial(save_model, config=job.config))
    if outcome is not None and not outcome.interrupted:
        job.console.print(f"To talk with it, run:\nlitgpt chat {outcome.checkpoint}")


def finetune(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune"),
    options: Annotated[Options, cli.Flat()] = Options(),  # noqa: B008
) -> None:
    setup(checkpoint_dir, out_dir, options)


finetune.__doc__ = setup.__doc__
for command in (setup, finetune):
    command.options_elsewhere = {"lora_": "litgpt finetune_lora", "quantize": "litgpt finetune_lora"}
