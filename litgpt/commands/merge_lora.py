"""Put finetuned LoRA weights into the model they belong to."""

from pathlib import Path

import torch

from litgpt.checkpoint import WEIGHTS, atomic_additions, atomic_directory, copy_companion_files, save_model
from litgpt.convert import Source
from litgpt.convert.options import Progress, dtype_from_name, tell_note
from litgpt.loading import open_base
from litgpt.lora import LORA_WEIGHTS, merged_weights, read_lora


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
        checkpoint_dir: The directory with the LoRA weights, as finetune_lora writes it, or the file itself.
        out_dir: Where to write. By default beside the LoRA weights; those in a .pth file, as X/final_lora.pth, are
            merged into a new directory X-merged.
        pretrained_checkpoint_dir: The model that was finetuned, where it is no longer at the place that is recorded
            with the LoRA weights.
        precision: Type of the merged weights (32-true, bf16-true, ...); by default that of the model that was
            finetuned.
    """
    dtype = dtype_from_name(precision, "--precision")
    file = find_lora(checkpoint_dir)
    base = open_base(read_lora(file)[2], pretrained_checkpoint_dir, file)
    tell_note(base)
    if out_dir is None:
        merged = file.parent.resolve().name + "-merged"
        out_dir = file.parent.resolve().with_name(merged) if checkpoint_dir.suffix == ".pth" else file.parent
    merge_into(out_dir, base, file, dtype)
    print(f"Saved merged weights to {str(out_dir / WEIGHTS)!r}")


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
    show = Progress(base, dtype=dtype, title="Merging")
    with atomic_additions(directory) if beside else atomic_directory(directory) as place:
        copy_companion_files(lora.parent, place)  # what was finetuned may have a prompt style of its own
        copy_companion_files(base.files, place)
        weights = show(merged_weights(base.weights(), base.config, update, settings, dtype))
        save_model(place, weights, base.config, base.release)


def find_lora(path: Path) -> Path:
    """The file of LoRA weights that a user means by a directory or file, also below `checkpoints/`.

    `final_lora.pth` in a directory where there is none means the one that is there under the usual name.
    """
    for candidate in (path.expanduser(), Path("checkpoints") / path):
        if candidate.is_file():
            return candidate
        directory = candidate.parent if candidate.suffix == ".pth" else candidate
        if (directory / LORA_WEIGHTS).is_file():
            return directory / LORA_WEIGHTS
        if candidate.is_dir():
            raise FileNotFoundError(
                f"'{candidate}' holds no {LORA_WEIGHTS}. Give a directory that `litgpt finetune_lora` has written, as "
                "out/finetune/lora/final."
            )
    raise FileNotFoundError(f"There is no '{path}'. Give a directory or file that `litgpt finetune_lora` has written.")
