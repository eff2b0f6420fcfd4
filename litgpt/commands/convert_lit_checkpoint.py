"""Write a checkpoint anew with quantised weights, in another type, or as a GGUF file."""

from pathlib import Path

from litgpt.checkpoint import WEIGHTS
from litgpt.cli.secret import Secret
from litgpt.export.gguf import save_gguf
from litgpt.export.lit import beside, check_form, save_lit, size_of
from litgpt.sources.door import open_merged
from litgpt.sources.find import find_checkpoint


def setup(
    checkpoint_dir: Path | None = None,
    out_dir: Path | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    checkpoint_path: Path | None = None,
    output_path: Path | None = None,
    model_name: str | None = None,
    access_token: Secret | None = None,
    calibration: Path | None = None,
    verbose: bool = False,
) -> None:
    """Write a checkpoint with quantised weights, or in another type, for litgpt itself.

    The result is a checkpoint directory that generate, chat, serve and LLM.load take as it is: smaller on the disk,
    quicker to load, and without --quantize. It is made matrix by matrix, so that the memory needed does not grow with
    the model. With --output_path NAME.gguf, the command writes a GGUF file for llama.cpp instead. For programs that
    read Hugging Face's format, use convert_from_litgpt.

    Args:
        checkpoint_dir: A checkpoint directory, a Hugging Face directory, a .gguf file, a directory of LoRA or adapter
            weights, a known name or a Hub id.
        out_dir: The directory to create. By default it is beside checkpoint_dir and named like it and the kind, as
            final-bnb.nf4.
        dtype: Data type of what is not quantised (float32, float16, bfloat16); by default that of the checkpoint. It is
            best that in which the model is to answer. Without quantize, all weights are written in it, and quantised
            ones are de-quantised.
        quantize: Keep the weights of the linear layers in 4 or 8 bits: bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq,
            bnb.int8, or for CPUs int4 or int8; in a GGUF file q8_0, q6_k, q5_k_m, q5_k_s, q5_1, q5_0,
            q4_k_m, q4_k_s, q4_1 or q4_0.
        checkpoint_path: Another name of checkpoint_dir.
        output_path: The GGUF file to write.
        model_name: What the GGUF file calls the model; by default as the checkpoint does.
        access_token: For a gated model that has to be downloaded first.
        calibration: A text file that shows which weights matter, for a quantised GGUF file; as for convert.
        verbose: Print every tensor instead of a progress bar.
    """
    if checkpoint_dir is not None and checkpoint_path is not None:
        raise ValueError(
            f"--checkpoint_path {checkpoint_path} is another name of checkpoint_dir. Leave one of them out."
        )
    checkpoint_dir = checkpoint_dir or checkpoint_path
    if checkpoint_dir is None:
        raise ValueError("checkpoint_dir is missing: give the checkpoint to convert.")
    if output_path is not None:
        if out_dir is not None:
            raise ValueError(
                f"--out_dir {out_dir} cannot be combined with --output_path {output_path}. Leave one of them out."
            )
        if dtype and quantize:
            raise ValueError(
                f"--dtype {dtype} cannot be combined with --quantize {quantize} in a GGUF file. Leave it out."
            )
        source = open_merged(checkpoint_dir, access_token)
        return save_gguf(source, output_path, quantize or dtype, model_name, verbose, calibration)
    if calibration is not None:
        raise ValueError(f"--calibration {calibration} has no effect without --output_path: it is for GGUF files.")
    if model_name is not None:
        raise ValueError(f"--model_name {model_name} is not supported without --output_path: GGUF files have names.")
    target = check_form(dtype, quantize)
    if quantize is None and target is None:
        raise ValueError(
            "--quantize and --dtype are missing: there is nothing to change. Give one, such as --quantize bnb.nf4, or "
            "use `litgpt convert_from_litgpt` to export for other programs."
        )
    path = find_checkpoint(checkpoint_dir, access_token)
    source = open_merged(path, access_token)
    out_dir = out_dir or beside(path, quantize or str(dtype))
    save_lit(source, out_dir, target, quantize, verbose)
    print(f"Saved {WEIGHTS} ({size_of(out_dir)}) to {out_dir}. To talk with it, run:\nlitgpt chat {out_dir}")
