"""Make a checkpoint directory from Hugging Face weights, a GGUF file or a PEFT adapter."""

from pathlib import Path

from litgpt.checkpoint import holds_adaptation_alone, is_peft_alone
from litgpt.devices.dtypes import dtype_from_name
from litgpt.export.lit import save_lit
from litgpt.export.peft import save_lora_of_peft
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.find import find_checkpoint


def setup(
    checkpoint_dir: Path,
    model_name: str | None = None,
    dtype: str | None = None,
    out_dir: Path | None = None,
    verbose: bool = False,
    debug_mode: bool | None = False,
    pretrained_checkpoint_dir: Path | None = None,
) -> None:
    """Convert a Hugging Face checkpoint, a GGUF file or a PEFT adapter to a LitGPT checkpoint.

    The weights are read file by file and written tensor by tensor, so that the memory needed does not grow with the
    model. Every command that takes a checkpoint takes a Hugging Face directory or a GGUF file as it is; converting
    makes it load faster, and is what other programs that read LitGPT checkpoints need. A PEFT adapter (LoRA, also with
    DoRA or rank-stabilised scaling) becomes the LoRA weights of a checkpoint, for merge_lora.

    Args:
        checkpoint_dir: A directory with config.json and weights (.safetensors or .bin), a .gguf file, or a directory
            with adapter_config.json and adapter_model.safetensors.
        model_name: What the model is called, where the directory's name does not say it. If there is no config.json,
            its figures are those of the known model of this name.
        dtype: Data type of the converted weights (float32, float16, bfloat16); by default that of the original.
            Quantised weights of a GGUF file become float32.
        out_dir: Where to write. By default into checkpoint_dir itself, and for a GGUF file into a new directory beside
            it that is named like the file.
        verbose: Print every tensor instead of a progress bar.
        debug_mode: The same as verbose.
        pretrained_checkpoint_dir: The model that an adapter belongs to, where it is another than the adapter says.
    """
    target_dtype = dtype_from_name(dtype)
    path = find_checkpoint(checkpoint_dir, incomplete=True)
    if is_peft_alone(path):
        for option, value in (("--dtype", dtype), ("--model_name", model_name)):
            if value is not None:
                raise ValueError(f"{option} {value} is not supported on a PEFT adapter. Leave it out.")
        return save_lora_of_peft(path, out_dir or path, pretrained_checkpoint_dir)
    if pretrained_checkpoint_dir is not None:
        raise ValueError(
            f"--pretrained_checkpoint_dir {pretrained_checkpoint_dir} has no effect here: '{path}' is not a PEFT "
            "adapter. Leave it out."
        )
    if holds_adaptation_alone(path):
        raise ValueError(
            f"'{path}' holds LoRA or adapter weights, in the right format already. `litgpt merge_lora {path}` puts "
            "LoRA weights into their model."
        )
    source = open_checkpoint(path, model_name, converted=False)
    if out_dir is None:
        out_dir = path if path.is_dir() else path.with_suffix("")
    in_place = path.is_dir() and out_dir.resolve() == path.resolve()
    save_lit(source, out_dir, target_dtype, verbose=bool(verbose or debug_mode), in_place=in_place)
    print(f"Saving converted checkpoint to {out_dir}")
