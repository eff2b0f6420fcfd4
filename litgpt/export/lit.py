"""A checkpoint in our own format: `lit_model.pth` and what belongs to it, as it is, in another type, or quantised."""

from pathlib import Path

import torch

from litgpt.checkpoint import (
    WEIGHTS,
    atomic_additions,
    atomic_directory,
    copy_companion_files,
    save_model,
)
from litgpt.devices.dtypes import dtype_from_name
from litgpt.formats.quantised_parts import quantised_stream
from litgpt.quantization.layers import SAVED_KINDS, check_quantize
from litgpt.sources.load import kind_for
from litgpt.sources.meta import meta_model
from litgpt.sources.source import Source
from litgpt.sources.weight_stream import WeightProgress, tell_note


def check_form(dtype: str | None, quantize: str | None) -> torch.dtype | None:
    """The type that is meant, of what may be written.

    Raises:
        ValueError: There is no such type or kind, or the two do not go together.
    """
    target = dtype_from_name(dtype)
    if quantize is not None and quantize not in SAVED_KINDS:
        kinds = ", ".join(SAVED_KINDS)
        raise ValueError(f"quantize={quantize} is not for checkpoints in litgpt's format. Choose one of: {kinds}.")
    check_quantize(quantize, "32-true", training=False)
    if quantize is not None and target is torch.float64:
        raise ValueError(f"dtype={dtype} cannot be combined with quantize={quantize}. Use dtype=float32 or less.")
    return target


def beside(path: Path, form: str | None, suffix: str = "") -> Path:
    """Where another form of a checkpoint goes by default: next to it, named like it and the form, as final-bnb.nf4."""
    path = path.with_suffix("") if path.is_file() else path.resolve()
    return path.with_name(path.name + (f"-{form}" if form else "") + suffix)


def save_lit(
    source: Source,
    directory: Path,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    verbose: bool = False,
    in_place: bool = False,
) -> None:
    """Write an opened checkpoint in our own format, matrix by matrix.

    Args:
        source: The checkpoint.
        directory: Where to. It must not exist, unless it is the checkpoint's own and `in_place`.
        dtype: The type of what is not quantised; None is that of the checkpoint.
        quantize: How to keep the weights of the linear layers, as `check_form` allows it.
        verbose: Print every tensor instead of a progress bar.
        in_place: Add to the directory, which holds the original already.

    Raises:
        ValueError: The weights are quantised so already, or otherwise.
    """
    kind = kind_for(source, quantize)
    if quantize is not None and kind == source.quantized:
        raise ValueError(f"quantize={quantize} has no effect here: '{source.files}' is quantised like that already.")
    tell_note(source)
    if quantize is None:
        weights = WeightProgress(source, verbose, dtype)(source.weights())
    else:
        model = meta_model(source.config, quantize, dtype or source.dtype)
        weights = quantised_stream(WeightProgress(source, verbose)(source.weights()), model, source.release)
    with atomic_additions(directory) if in_place else atomic_directory(directory) as place:
        if not in_place:
            copy_companion_files(source.files, place)
        save_model(place, weights, source.config, source.release)


def size_of(directory: Path) -> str:
    """The size of a checkpoint's weights, for the user."""
    return f"{(directory / WEIGHTS).stat().st_size / 1e6:,.1f} MB"
