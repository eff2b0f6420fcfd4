"""A model with its LoRA weights merged."""

from pathlib import Path

import torch

from litgpt.adaptation.lora import merged_weights
from litgpt.checkpoint import atomic_additions, atomic_directory, copy_companion_files, is_peft_alone, save_model
from litgpt.sources.adapted import LoRASource
from litgpt.sources.weight_stream import WeightProgress


def merge_into(directory: Path, source: LoRASource, dtype: torch.dtype | None = None) -> None:
    """Writes a model's weights with a LoRA update in them, and what belongs to a checkpoint.

    Args:
        directory: Where to; into the directory of the LoRA weights, or as a new one.
        source: The LoRA weights on the model that was finetuned.
        dtype: The type to write in; by default that of the model.
    """
    base = source.base
    beside = directory.resolve() == source.directory.resolve()
    if directory.resolve() == base.files.resolve():
        raise ValueError(f"out_dir={directory} holds the model that was finetuned. Choose another directory.")
    show = WeightProgress(base, dtype=dtype, title="Merging")
    with atomic_additions(directory) if beside else atomic_directory(directory) as place:
        copy_companion_files(source.files, place)  # what was finetuned may have a prompt style of its own
        if not is_peft_alone(source.directory):
            copy_companion_files(base.files, place)
        weights = show(merged_weights(base.weights(), base.config, source.update, source.settings, dtype))
        save_model(place, weights, base.config, base.release)
