"""A model in memory as a checkpoint directory."""

from __future__ import annotations

from pathlib import Path

from litgpt.checkpoint import atomic_directory, copy_companion_files, save_model
from litgpt.formats.hf_config import save_config_json
from litgpt.formats.quantised_parts import saved_weights
from litgpt.model import GPT
from litgpt.prompts import PromptStyle, save_prompt_style
from litgpt.quantization.layers import is_quantized, kind_of
from litgpt.sources.fit import compare_shapes
from litgpt.sources.meta import shapes_of


def save_plain_checkpoint(
    out_dir: str | Path, model: GPT, files: Path, prompt_style: str | PromptStyle, *, writes_config: bool
) -> None:
    """Write a checkpoint directory, whole or not at all; quantised weights as they are.

    Args:
        out_dir: A new directory.
        model: The model.
        files: The directory whose tokenizer and other companion files are copied.
        prompt_style: The format of prompts to record with it.
        writes_config: Make a `config.json` from the model's configuration, in place of the one among `files`.

    Raises:
        ValueError: The directory exists, or the model has been changed into what no plain checkpoint holds.
        SaveError: The disk is full.
    """
    wanted, found = shapes_of(model.config, kind_of(model)), model.state_dict()
    wanted, found = ({n: t for n, t in each.items() if not is_quantized(n)} for each in (wanted, found))
    problems = compare_shapes(wanted, found, "a checkpoint", "this model")
    if problems:
        raise ValueError(
            "This model is not a plain one any more; merge LoRA first (`litgpt.lora.merge_lora(llm.model)`):\n"
            + "\n".join(problems[:4])
        )
    with atomic_directory(out_dir) as directory:
        copy_companion_files(files, directory)
        if writes_config:
            save_config_json(model.config, directory)
        save_prompt_style(prompt_style, directory)
        save_model(directory, saved_weights(model), model.config)
