"""Write a checkpoint in another format: Hugging Face's, GGUF, PEFT's or our own."""

from pathlib import Path
from typing import Literal

from litgpt.checkpoint import WEIGHTS, holds_adaptation, is_peft_alone
from litgpt.cli.secret import Secret
from litgpt.export.gguf import GGUF, save_gguf
from litgpt.export.huggingface import Format, save_hf
from litgpt.export.lit import beside, check_form, save_lit, size_of
from litgpt.export.peft import save_lora_of_peft, save_peft
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.door import open_merged
from litgpt.sources.find import find_checkpoint

Target = Literal["hf", "gguf", "litgpt", "peft"]
ADAPTER = "litgpt from a PEFT adapter"
# Which options act when what is written.
ACTING: dict[str, set[str]] = {
    "hf": {"dtype", "format", "verbose"},
    "gguf": {"dtype", "quantize", "model_name", "calibration", "verbose"},
    "litgpt": {"dtype", "quantize", "model_name", "verbose"},
    ADAPTER: {"pretrained_checkpoint_dir"},
    "peft": set(),
}


def setup(
    checkpoint_dir: Path,
    out: Path | None = None,
    *,
    to: Target,
    dtype: str | None = None,
    quantize: str | None = None,
    format: Format | None = None,
    model_name: str | None = None,
    pretrained_checkpoint_dir: Path | None = None,
    access_token: Secret | None = None,
    calibration: Path | None = None,
    verbose: bool = False,
) -> None:
    """Write a checkpoint in another format: for transformers, llama.cpp, PEFT, or for litgpt itself.

    The checkpoint may be a directory of ours, also one that holds LoRA weights alone (they are merged), a Hugging Face
    directory, a GGUF file, a known name or a Hub id. It is read and written tensor by tensor, so that the memory needed
    does not grow with the model.

    Args:
        checkpoint_dir: What to convert; to litgpt's own format also a PEFT adapter, to PEFT's LoRA weights.
        out: The directory or .gguf file to write. By default next to the checkpoint, named like it and the format, as
            final-hf or final.gguf; a Hugging Face directory or PEFT adapter gets litgpt's files added.
        to: hf is a directory that transformers' from_pretrained loads. gguf is one file, for llama.cpp. litgpt is a
            directory with lit_model.pth, without any training state. peft is the LoRA weights as an adapter for peft's
            PeftModel.from_pretrained.
        dtype: Data type of the weights (float32, float16, bfloat16); by default that of the checkpoint.
        quantize: Keep the weights of the linear layers in 4 or 8 bits. To litgpt: bnb.nf4, bnb.nf4-dq, bnb.fp4,
            bnb.fp4-dq, bnb.int8, int4 or int8. To gguf: q8_0, q6_k, q5_k_m, q5_k_s, q5_1, q5_0,
            q4_k_m, q4_k_s, q4_1 or q4_0.
        format: To hf, what to write the weights as: safetensors (the default), pth (a state dict for torch.load), or
            both.
        model_name: What the model is called. To litgpt, where there is no config.json, its figures are those of the
            known model of this name.
        pretrained_checkpoint_dir: The model that a PEFT adapter belongs to, where it is another than the adapter says.
        access_token: For a gated model that has to be downloaded first.
        calibration: To gguf, with quantize: a text file, of the kind that the model is to read and write. The model
            reads it, and is quantised so that errors are where they matter least. That takes memory for all of it.
        verbose: Print every tensor instead of a progress bar.
    """
    given: dict[str, object] = {
        "dtype": dtype,
        "quantize": quantize,
        "format": format,
        "model_name": model_name,
        "pretrained_checkpoint_dir": pretrained_checkpoint_dir,
        "calibration": calibration,
        "verbose": verbose or None,
    }
    path = find_checkpoint(checkpoint_dir, access_token, incomplete=True)
    if to == "peft":
        refuse_idle(given, to)
        return save_peft(checkpoint_dir, out or beside(path, to), access_token)
    if to == "litgpt" and is_peft_alone(path):
        refuse_idle(given, ADAPTER)
        return save_lora_of_peft(path, out or path, pretrained_checkpoint_dir, access_token)
    refuse_idle(given, to)
    if to == "litgpt":
        return convert_to_ours(path, out, dtype, quantize, model_name, access_token, verbose)
    source = open_merged(path, access_token)
    if to == "hf":
        return save_hf(source, out or beside(path, to), format or "safetensors", dtype, verbose)
    if dtype and quantize:
        raise ValueError(f"--dtype {dtype} cannot be combined with --quantize {quantize} in a GGUF file. Leave it out.")
    kind = quantize or dtype
    out = out or beside(path, kind, GGUF)
    save_gguf(source, out, kind, model_name, verbose, calibration)


def convert_to_ours(
    path: Path,
    out: Path | None,
    dtype: str | None,
    quantize: str | None,
    model_name: str | None,
    access_token: Secret | None,
    verbose: bool,
) -> None:
    """Write a model in litgpt's own format: another program's model, or one of ours in another form."""
    target, form = check_form(dtype, quantize), quantize or dtype
    ours = path.is_dir() and ((path / WEIGHTS).is_file() or holds_adaptation(path))
    if not ours:
        source = open_checkpoint(path, model_name)
        original = path if path.is_dir() else path.with_suffix("")
        out = out or (beside(path, quantize) if quantize else original)
    elif model_name is not None:
        raise ValueError(f"--model_name {model_name} has no effect here: '{path}' already has a name. Leave it out.")
    elif out is None and form is None:
        raise ValueError(
            f"'{path}' is in litgpt's format already. Give the directory to write, for a copy without training state, "
            "or what to change with --dtype or --quantize."
        )
    else:
        source = open_merged(path, access_token)
        out = out or beside(path, form)
    in_place = not ours and path.is_dir() and out.resolve() == path.resolve()
    save_lit(source, out, target, quantize, verbose, in_place)
    print(f"Saved {WEIGHTS} ({size_of(out)}) to {out}. To talk with it, run:\nlitgpt chat {out}")


def refuse_idle(given: dict[str, object], target: str) -> None:
    """Refuse an option that is not supported where this is written, and say where it does."""
    for option, value in given.items():
        if value is not None and option not in ACTING[target]:
            others = " and ".join(f"--to {name}" for name, options in ACTING.items() if option in options)
            here = f"--to {target}"
            raise ValueError(f"--{option} {value} cannot be combined with {here}: it is for {others}. Leave it out.")
