"""Export a checkpoint in the format of Hugging Face or as a GGUF file, or its LoRA weights as a PEFT adapter."""

from pathlib import Path
from typing import Literal

from litgpt.export.gguf import GGUF, save_gguf
from litgpt.export.huggingface import save_hf
from litgpt.export.peft import save_peft
from litgpt.sources.door import open_merged


def setup(
    checkpoint_dir: Path,
    output_dir: Path,
    format: Literal["both", "safetensors", "pth", "gguf", "peft"] = "both",
    dtype: str | None = None,
    calibration: Path | None = None,
    verbose: bool = False,
) -> None:
    """Export a checkpoint as a Hugging Face directory, or as a GGUF file for llama.cpp.

    The directory holds the weights under Hugging Face names, config.json and the tokenizer's files, and loads with
    transformers' from_pretrained. With `--format peft`, it holds the LoRA weights of a finetuned checkpoint as an
    adapter for peft's PeftModel.from_pretrained. Given a name that ends with .gguf, the command writes a file of that
    format, with the tokenizer and the chat template in it; --dtype then also takes quantised types, such as
    q4_k_m.

    Args:
        checkpoint_dir: A checkpoint directory, a Hugging Face directory, a .gguf file, a directory of LoRA or adapter
            weights, a known name or a Hub id.
        output_dir: The directory to create, or the .gguf file.
        format: What to write the weights as: model.safetensors (in several files above 5 GB), model.pth (a state dict
            for torch.load), or both, which takes twice the space on disk; gguf, one file for llama.cpp; or peft, the
            LoRA weights alone.
        dtype: Data type of the exported weights (float32, float16, bfloat16; in a GGUF file also q8_0, q6_k, q5_k_m,
            q5_k_s, q5_1, q5_0, q4_k_m, q4_k_s, q4_1, q4_0); by default that of the checkpoint.
        calibration: A text file, of the kind that the model is to read and write, for quantised types: the model reads
            it, and is quantised so that errors are where they matter least. That takes memory for the whole model.
        verbose: Print every tensor instead of a progress bar.
    """
    if format == "peft":
        if dtype is not None:
            raise ValueError(
                f"--dtype {dtype} cannot be combined with --format peft: LoRA weights are float32. Leave it out."
            )
        return save_peft(checkpoint_dir, output_dir)
    source = open_merged(checkpoint_dir)
    if format == "gguf" or (format == "both" and output_dir.suffix == GGUF):
        return save_gguf(source, output_dir, dtype, verbose=verbose, calibration=calibration)
    if calibration is not None:
        raise ValueError(f"--calibration {calibration} has no effect here: it is for a .gguf file. Leave it out.")
    save_hf(source, output_dir, format, dtype, verbose)
    if format == "both":
        print("Both hold the same weights. `--format safetensors` or `--format pth` writes one of them.")
