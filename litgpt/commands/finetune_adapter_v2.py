"""Finetune a model with Adapter v2: learned prompts, biases and scales alongside frozen weights."""

from pathlib import Path
from typing import Annotated

from torch import Tensor

from litgpt import cli
from litgpt.adaptation.adapter import ADAPTER_V2_WEIGHTS, apply_adapter_v2, is_adapter_v2, save_adapter
from litgpt.runs.finetuning import Finetuning
from litgpt.runs.job import trained_parameters
from litgpt.runs.options import FinetuneOptions
from litgpt.training.loss import NextTokenLoss
from litgpt.training.run_lock import unlocks_at_end
from litgpt.training.state import Saved


@unlocks_at_end
def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune/adapter-v2"),
    quantize: str | None = None,
    adapter_prompt_length: int = 10,
    adapter_start_layer: int = 2,
    options: Annotated[FinetuneOptions, cli.Flat()] = FinetuneOptions(),  # noqa: B008
) -> None:
    """Finetune a model with Adapter v2 (https://arxiv.org/abs/2304.15010): LLaMA-Adapter's prompts, a bias and a scale
    for every linear layer, and the norms.

    Args:
        checkpoint_dir: The model to finetune: a directory, also of LoRA weights (they are merged as they are read), a
            .gguf file, a known name or a Hub id.
        out_dir: Where checkpoints, metrics.csv, logs.txt and loss.png go.
        quantize: Keep the frozen weights in 4 or 8 bits: bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq or bnb.int8-training.
        adapter_prompt_length: Places of each layer's prompt.
        adapter_start_layer: The first layer that has one, counted from 0.
    """
    job = Finetuning(checkpoint_dir, out_dir, options, cli.spread(setup, locals()), quantize)
    job.check()
    job.open_directory()
    job.open_checkpoint()
    job.launch()
    job.prepare_data()

    gpt = job.load_model()
    apply_adapter_v2(gpt, adapter_prompt_length, adapter_start_layer)
    job.announce(gpt)
    if options.dry_run:
        return

    def save(directory: Path, weights: dict[str, Tensor]) -> None:
        save_adapter(directory, weights, base=str(checkpoint_dir))

    model = job.set_up(NextTokenLoss(gpt))
    optimizer = job.build_optimizer(trained_parameters(gpt))
    outcome = job.train(model, optimizer, save, Saved(ADAPTER_V2_WEIGHTS, is_adapter_v2))
    if not outcome.interrupted:
        job.console.print(f"Saved adapter weights to {str(outcome.checkpoint / ADAPTER_V2_WEIGHTS)!r}")
