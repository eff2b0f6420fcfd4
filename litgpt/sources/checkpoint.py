"""A checkpoint opened, whichever of the formats its path holds."""

from pathlib import Path

from litgpt.checkpoint import (
    WEIGHTS,
    hf_weight_files,
    missing_files,
)
from litgpt.sources.huggingface import HFSource
from litgpt.sources.lit import LitSource
from litgpt.sources.source import Source


def open_checkpoint(path: str | Path, model_name: str | None = None, *, converted: bool = True) -> Source:
    """Opens a checkpoint directory of ours, a Hugging Face directory, or a `.gguf` file, without reading the weights.

    `lit_model.pth` wins over other weights next to it.

    Args:
        path: The directory or file; `litgpt.sources.find` finds it from a name.
        model_name: What the model is called, where the path does not say it. Where a Hugging Face directory has no
            `config.json`, the figures are those of the known model of this name.
        converted: False looks past `lit_model.pth` for the weights it was made from.

    Raises:
        FileNotFoundError: It does not exist, or something in it is missing; says what.
        ValueError: A file is damaged, or architecture or weights are not supported or do not fit one another.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".gguf":
        from litgpt.sources.gguf import GGUFSource

        return GGUFSource(path, model_name)
    if path.is_file():
        path = path.parent
    if not path.is_dir():
        raise FileNotFoundError(f"There is no checkpoint '{path}'. Give a checkpoint directory or a .gguf file.")
    if not converted and (path / WEIGHTS).is_file() and not hf_weight_files(path):
        raise FileNotFoundError(f"'{path}' holds nothing to convert: its {WEIGHTS} is in the right format already.")
    missing = missing_files(path, weights=True)
    if missing and not (model_name and hf_weight_files(path) and "config.json" in missing[0]):
        raise FileNotFoundError(
            f"The checkpoint directory '{path}' lacks {' and '.join(missing)}. "
            "Download or convert the checkpoint again, or give another directory."
        )
    return LitSource(path) if converted and (path / WEIGHTS).is_file() else HFSource(path, model_name)
