"""A model with its LoRA weights merged."""

from pathlib import Path

import torch

from litgpt.adaptation.lora import LORA_WEIGHTS, merged_weights, read_lora
from litgpt.checkpoint import atomic_additions, atomic_directory, copy_companion_files, save_model
from litgpt.sources.source import Source
from litgpt.sources.weight_stream import WeightProgress


def merge_into(directory: Path, base: Source, lora: Path | None = None, dtype: torch.dtype | None = None) -> None:
    """Writes a model's weights with a LoRA update in them, and what belongs to a checkpoint.

    Args:
        directory: Where to; into the directory of the LoRA weights, or as a new one.
        base: The model that was finetuned.
        lora: The file of LoRA weights; by default the `lit_model.pth.lora` in `directory`.
        dtype: The type to write in; by default that of the base.
    """
    lora = lora or directory / LORA_WEIGHTS
    update, settings, _ = read_lora(lora)
    beside = directory.resolve() == lora.parent.resolve()
    if directory.resolve() == base.files.resolve():
        raise ValueError(f"--out_dir {directory} holds the model that was finetuned. Choose another directory.")
    show = WeightProgress(base, dtype=dtype, title="Merging")
    with atomic_additions(directory) if beside else atomic_directory(directory) as place:
        copy_companion_files(lora.parent, place)  # what was finetuned may have a prompt style of its own
        copy_companion_files(base.files, place)
        weights = show(merged_weights(base.weights(), base.config, update, settings, dtype))
        save_model(place, weights, base.config, base.release)
