"""Put finetuned LoRA weights into the model they belong to."""

from pathlib import Path

from litgpt.checkpoint import atomic_additions, save_model
from litgpt.convert import Source
from litgpt.lora import merged_weights, read_lora


def merge_into(directory: Path, base: Source) -> None:
    """Writes `lit_model.pth` beside the `lit_model.pth.lora` of a directory."""
    update, settings, _ = read_lora(directory)
    with atomic_additions(directory) as place:
        save_model(place, merged_weights(base.weights(), base.config, update, settings), base.config, base.release)
