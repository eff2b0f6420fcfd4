"""A checkpoint as a Hugging Face directory."""

from pathlib import Path
from typing import Literal

from litgpt.checkpoint import atomic_directory
from litgpt.devices.dtypes import dtype_from_name
from litgpt.export.hf_writer import export_hf
from litgpt.prompts import carried_templates
from litgpt.sources.source import Source
from litgpt.sources.weight_stream import WeightProgress, tell_note

Format = Literal["safetensors", "pth", "both"]


def save_hf(
    source: Source, directory: Path, format: Format = "safetensors", dtype: str | None = None, verbose: bool = False
) -> None:
    """Write an opened checkpoint as a Hugging Face directory, which must not exist, and say what was written.

    Args:
        source: The checkpoint.
        directory: Where to.
        format: What to write the weights as: model.safetensors, model.pth, or both.
        dtype: A type of weights by any of its names; None is that of the checkpoint.
        verbose: Print every tensor instead of a progress bar.
    """
    target_dtype = dtype_from_name(dtype)
    tell_note(source)
    with atomic_directory(directory) as place:
        export_hf(
            source,
            place,
            dtype=target_dtype,
            safetensors=format != "pth",
            pth=format != "safetensors",
            watch=WeightProgress(source, verbose),
        )
        weights = [file for file in sorted(place.iterdir()) if file.suffix in (".safetensors", ".pth")]
        sizes = ", ".join(f"{file.name} ({file.stat().st_size / 1e6:,.1f} MB)" for file in weights)
    if note := carried_templates(source.files, False)[1]:
        print(note)
    print(f"Saved {sizes} to {directory}")
