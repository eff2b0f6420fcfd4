"""Put finetuned LoRA weights into the model they belong to."""

from pathlib import Path

from litgpt.checkpoint import WEIGHTS
from litgpt.devices.dtypes import dtype_from_name
from litgpt.export.merged import merge_into
from litgpt.sources.door import open_lora
from litgpt.sources.weight_stream import tell_note


def setup(
    checkpoint_dir: Path,
    out_dir: Path | None = None,
    pretrained_checkpoint_dir: Path | None = None,
    precision: str | None = None,
) -> None:
    """Merge LoRA weights into the model that was finetuned.

    The result is a checkpoint like any other. Weights are read and written tensor by tensor, so that the memory needed
    does not grow with the model; a model that was finetuned in quantised form (QLoRA) is merged from the weights as
    they were before.

    Args:
        checkpoint_dir: The directory with the LoRA weights, as finetune_lora or PEFT writes it, the file itself, or the
            Hub id of a PEFT adapter.
        out_dir: Where to write. By default next to the LoRA weights; those in a .pth file, as X/final_lora.pth, are
            merged into a new directory X-merged.
        pretrained_checkpoint_dir: The model that was finetuned, where it is no longer at the place that is recorded
            with the LoRA weights.
        precision: Type of the merged weights (32-true, bf16-true, ...); by default that of the model that was
            finetuned.
    """
    dtype = dtype_from_name(precision, "precision")
    source = open_lora(checkpoint_dir, pretrained_checkpoint_dir)
    tell_note(source)
    if out_dir is None:
        out_dir = source.directory
        if checkpoint_dir.suffix == ".pth":
            out_dir = out_dir.resolve().with_name(out_dir.resolve().name + "-merged")
    merge_into(out_dir, source, dtype)
    print(f"Saved merged weights to {str(out_dir / WEIGHTS)!r}")
