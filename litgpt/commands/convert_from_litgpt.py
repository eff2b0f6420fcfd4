"""Export a checkpoint in the format of Hugging Face or as a GGUF file, or its LoRA weights as a PEFT adapter."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch

from litgpt.checkpoint import CONFIG, atomic_directory, atomic_file, resolve_checkpoint_dir
from litgpt.commands.merge_lora import find_lora
from litgpt.config import Config
from litgpt.convert import export_hf, open_checkpoint
from litgpt.convert.export import export_config
from litgpt.convert.gguf_export import KINDS, export_gguf
from litgpt.convert.options import Progress, dtype_from_name, tell_note
from litgpt.convert.peft import ADAPTER_MODEL, export_peft
from litgpt.convert.source import Source
from litgpt.loading import open_base
from litgpt.lora import read_lora

GGUF = ".gguf"


def setup(
    checkpoint_dir: Path,
    output_dir: Path,
    format: Literal["both", "safetensors", "pth", "gguf", "peft"] = "both",
    dtype: str | None = None,
    verbose: bool = False,
) -> None:
    """Export a checkpoint as a Hugging Face directory, or as a GGUF file for llama.cpp.

    The directory holds the weights under Hugging Face names, config.json and the tokenizer's files, and loads with
    transformers' from_pretrained. With `--format peft`, it holds the LoRA weights of a finetuned checkpoint as an
    adapter for peft's PeftModel.from_pretrained. Given a name that ends with .gguf, the command writes a file of that
    format, with the tokenizer and the chat template in it; --dtype then also takes q8_0, q5_1, q5_0, q4_1 and q4_0.

    Args:
        checkpoint_dir: The checkpoint directory.
        output_dir: The directory to create, or the .gguf file.
        format: What to write the weights as: model.safetensors (in several files above 5 GB), model.pth (a state dict
            for torch.load), or both, which takes twice the space on disk; gguf, one file for llama.cpp; or peft, the
            LoRA weights alone.
        dtype: Data type of the exported weights (float32, float16, bfloat16; in a GGUF file also q8_0, q5_1, q5_0,
            q4_1, q4_0); by default that of the checkpoint.
        verbose: Print every tensor instead of a progress bar.
    """
    if format == "peft":
        return export_adapter(checkpoint_dir, output_dir, dtype)
    if format == "gguf" or (format == "both" and output_dir.suffix == GGUF):
        return save_gguf(open_checkpoint(resolve_checkpoint_dir(checkpoint_dir)), output_dir, dtype, verbose=verbose)
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


def save_gguf(
    source: Source, path: Path, dtype: str | None = None, name: str | None = None, verbose: bool = False
) -> None:
    """Write an opened checkpoint as a GGUF file.

    Args:
        source: The checkpoint.
        path: The file.
        dtype: A type of weights by any of its names, or of GGUF's quantised ones; None is that of the checkpoint.
        name: What the file calls the model.
        verbose: Print every tensor instead of a progress bar.
    """
    if path.suffix != GGUF:
        raise ValueError(f"'{path}' is no name of a GGUF file: let it end with {GGUF}, as in {path}{GGUF}.")
    if path.exists():
        raise ValueError(f"'{path}' exists already. Remove it, or choose another name.")
    kind = dtype.lower() if dtype else None
    if kind is not None and kind not in KINDS:
        with suppress(ValueError):  # another name of one, such as bf16-true
            kind = str(dtype_from_name(kind)).removeprefix("torch.")
    tell_note(source)
    with atomic_file(path) as file:
        kind = export_gguf(source, file, kind, name, Progress(source, verbose))
    print(f"Saved {path} ({path.stat().st_size / 1e6:,.1f} MB, {kind}). To talk with it, run:\nlitgpt chat {path}")


def export_adapter(checkpoint_dir: Path, output_dir: Path, dtype: str | None) -> None:
    """Write the LoRA weights of a checkpoint as a PEFT adapter, in float32 as they are trained."""
    if dtype is not None:
        raise ValueError(f"--dtype {dtype} cannot act with --format peft: LoRA weights are float32. Leave it out.")
    file = find_lora(checkpoint_dir)
    weights, settings, base = read_lora(file)
    if (file.parent / CONFIG).is_file():
        config = Config.from_checkpoint(file.parent)
    else:
        config = open_base(base, None, file).config
    architecture = export_config(config, file.parent, torch.float32)["architectures"][0]
    # What was downloaded by its id is called by it again.
    name = re.sub(r"^checkpoints/([\w.-]+/[\w.-]+)/?$", r"\1", base or "")
    with atomic_directory(output_dir) as directory:
        export_peft(weights, settings, config, architecture, name, directory)
    print(f"Saved {ADAPTER_MODEL} and its adapter_config.json to {output_dir}")
