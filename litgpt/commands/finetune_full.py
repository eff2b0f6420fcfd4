"""Finetune all weights of a model."""

from pathlib import Path
from typing import Annotated

from torch import Tensor

from litgpt import cli
from litgpt.checkpoint import save_model
from litgpt.runs.finetuning import Finetuning
from litgpt.runs.job import trained_parameters
from litgpt.runs.options import FinetuneOptions
from litgpt.training.loss import NextTokenLoss
from litgpt.training.run_lock import unlocks_at_end
from litgpt.training.state import Saved


@unlocks_at_end
def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune/full"),
    options: Annotated[FinetuneOptions, cli.Flat()] = FinetuneOptions(),  # noqa: B008
) -> None:
    """Finetune all weights of a model.

    Args:
        checkpoint_dir: The model to finetune: a directory, also of LoRA weights (they are merged as they are read), a
            .gguf file, a known name or a Hub id.
        out_dir: Where checkpoints, metrics.csv, logs.txt and loss.png go.
    """
    job = Finetuning(checkpoint_dir, out_dir, options, cli.spread(setup, locals()), trains_all=True)
    job.check()
    job.open_directory()
    job.open_checkpoint()
    job.launch()
    job.prepare_data()

    gpt = job.load_model().requires_grad_(True)
    job.announce(gpt)
    if options.dry_run:
        return

    def save(directory: Path, weights: dict[str, Tensor]) -> None:
        save_model(directory, weights, job.config)

    model = job.set_up(NextTokenLoss(gpt))
    optimizer = job.build_optimizer(trained_parameters(gpt))
    outcome = job.train(model, optimizer, save, Saved())
    if not outcome.interrupted:
        job.console.print(f"To talk with it, run:\nlitgpt chat {outcome.checkpoint}")


def finetune(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune"),
    options: Annotated[FinetuneOptions, cli.Flat()] = FinetuneOptions(),  # noqa: B008
) -> None:
    setup(checkpoint_dir, out_dir, options)


finetune.__doc__ = setup.__doc__
for command in (setup, finetune):
    vars(command)["options_elsewhere"] = {"lora_": "litgpt finetune_lora", "quantize": "litgpt finetune_lora"}
