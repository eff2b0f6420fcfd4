"""Finetune a model with low-rank adaptation (LoRA), on quantised weights too (QLoRA)."""

from pathlib import Path
from typing import Annotated

from litgpt import cli
from litgpt.adaptation.lora import LoRASettings, apply_lora
from litgpt.runs.finetuning import Finetuning
from litgpt.runs.lora_finetuning import train_lora
from litgpt.runs.options import FinetuneOptions
from litgpt.training.loss import NextTokenLoss
from litgpt.training.run_lock import unlocks_at_end


@unlocks_at_end
def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune/lora"),
    quantize: str | None = None,
    lora: Annotated[LoRASettings, cli.Flat("lora_")] = LoRASettings(),  # noqa: B008
    lora_plus_ratio: float | None = None,
    options: Annotated[FinetuneOptions, cli.Flat()] = FinetuneOptions(),  # noqa: B008
) -> None:
    """Finetune a model with LoRA: small matrices alongside frozen weights.

    Args:
        checkpoint_dir: The model to finetune: a directory, also of LoRA weights (they are merged as they are read), a
            .gguf file, a known name or a Hub id.
        out_dir: Where checkpoints, metrics.csv, logs.txt and loss.png go.
        quantize: Keep the frozen weights in 4 or 8 bits (QLoRA): bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq or
            bnb.int8-training.
        lora_plus_ratio: Let the second matrix learn this many times as fast as the first (LoRA+).
    """
    job = Finetuning(checkpoint_dir, out_dir, options, cli.spread(setup, locals()), quantize)
    job.check()
    job.open_directory()
    job.open_checkpoint()
    job.launch()
    job.prepare_data()

    gpt = job.load_model()
    apply_lora(gpt, lora)
    job.announce(gpt)
    if not options.dry_run:
        train_lora(job, NextTokenLoss(gpt), lora, lora_plus_ratio)
