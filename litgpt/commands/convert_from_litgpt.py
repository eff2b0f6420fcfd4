"""Export a checkpoint in the format of Hugging Face."""

from pathlib import Path
from typing import Literal

from litgpt.checkpoint import atomic_directory, resolve_checkpoint_dir
from litgpt.convert import export_hf, open_checkpoint
from litgpt.convert.options import Progress, dtype_from_name, tell_note


def setup(
    checkpoint_dir: Path,
    output_dir: Path,
    format: Literal["both", "safetensors", "pth"] = "both",
    dtype: str | None = None,
    verbose: bool = False,
) -> None:
    """Export a checkpoint as a Hugging Face directory.

    The directory holds the weights under Hugging Face names, config.json and the tokenizer's files, and loads with
    transformers' from_pretrained.

    Args:
        checkpoint_dir: The checkpoint directory.
        output_dir: The directory to create.
        format: What to write the weights as: model.safetensors (in several files above 5 GB), model.pth (a state dict
            for torch.load), or both, which takes twice the space on disk.
        dtype: Data type of the exported weights (float32, float16, bfloat16); by default that of the checkpoint.
        verbose: Print every tensor instead of a progress bar.
    """
    target_dtype = dtype_from_name(dtype)
    source = open_checkpoint(resolve_checkpoint_dir(checkpoint_dir))
    tell_note(source)
    with atomic_directory(output_dir) as directory:
        export_hf(
            source,
            directory,
            dtype=target_dtype,
            safetensors=format != "pth",
            pth=format != "safetensors",
            watch=Progress(source, verbose),
        )
        weights = [file for file in sorted(directory.iterdir()) if file.suffix in (".safetensors", ".pth")]
        sizes = ", ".join(f"{file.name} ({file.stat().st_size / 1e6:,.1f} MB)" for file in weights)
    print(f"Saved {sizes} to {output_dir}")
    if format == "both":
        print("Both hold the same weights. `--format safetensors` or `--format pth` writes one of them.")
