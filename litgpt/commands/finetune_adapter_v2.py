"""Finetune a model with Adapter v2: learned prompts, biases and scales beside frozen weights."""

from functools import partial
from pathlib import Path
from typing import Annotated

from litgpt import cli
from litgpt.adaptation.adapter import ADAPTER_V2_WEIGHTS, apply_adapter_v2, is_adapter_v2, save_adapter
from litgpt.runs.finetuning import Finetuning, Options
from litgpt.training.run_lock import unlocks_at_end
from litgpt.training.state import Saved


@unlocks_at_end
def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune/adapter-v2"),
    quantize: str | None = None,
    adapter_prompt_length: int = 10,
    adapter_start_layer: int = 2,
    options: Annotated[Options, cli.Flat()] = Options(),  # noqa: B008
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
    gpt = job.load_model()
    apply_adapter_v2(gpt, adapter_prompt_length, adapter_start_layer)
    saved = Saved(ADAPTER_V2_WEIGHTS, is_adapter_v2)
    outcome = job.train(gpt, saved, partial(save_adapter, base=str(checkpoint_dir)))
    if outcome is not None and not outcome.interrupted:
        job.console.print(f"Saved adapter weights to {str(outcome.checkpoint / saved.file)!r}")
