"""Make a checkpoint directory from Hugging Face weights or a GGUF file."""

from pathlib import Path

from litgpt.checkpoint import (
    atomic_additions,
    atomic_directory,
    copy_companion_files,
    resolve_checkpoint_dir,
    save_model,
)
from litgpt.convert import open_checkpoint
from litgpt.convert.options import Progress, dtype_from_name, tell_note


def setup(
    checkpoint_dir: Path,
    model_name: str | None = None,
    dtype: str | None = None,
    out_dir: Path | None = None,
    verbose: bool = False,
    debug_mode: bool | None = False,
) -> None:
    """Convert a Hugging Face checkpoint or a GGUF file to a LitGPT checkpoint.

    The weights are read file by file and written tensor by tensor, so that the memory needed does not grow with the
    model. Every command that takes a checkpoint takes a Hugging Face directory or a GGUF file as it is; converting
    makes it load faster, and is what other programs that read LitGPT checkpoints need.

    Args:
        checkpoint_dir: A directory with config.json and weights (.safetensors or .bin), or a .gguf file.
        model_name: What the model is called, where the directory's name does not say it. If there is no config.json,
            its figures are those of the known model of this name.
        dtype: Data type of the converted weights (float32, float16, bfloat16); by default that of the original.
            Quantised weights of a GGUF file become float32.
        out_dir: Where to write. By default into checkpoint_dir itself, and for a GGUF file into a new directory beside
            it that is named like the file.
        verbose: Print every tensor instead of a progress bar.
        debug_mode: The same as verbose.
    """
    target_dtype = dtype_from_name(dtype)
    path = resolve_checkpoint_dir(checkpoint_dir)
    source = open_checkpoint(path, model_name, converted=False)
    tell_note(source)
    if out_dir is None:
        out_dir = path if path.is_dir() else path.with_suffix("")
    progress = Progress(source, bool(verbose or debug_mode), target_dtype)
    in_place = path.is_dir() and out_dir.resolve() == path.resolve()
    with atomic_additions(out_dir) if in_place else atomic_directory(out_dir) as directory:
        if not in_place:
            copy_companion_files(source.files, directory)
        save_model(directory, progress(source.weights()), source.config, source.release)
    print(f"Saving converted checkpoint to {out_dir}")
