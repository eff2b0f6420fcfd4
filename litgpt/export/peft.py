"""LoRA weights as a PEFT adapter, and a PEFT adapter as LoRA weights."""

import re
from pathlib import Path

import torch

from litgpt.adaptation.lora import LORA_WEIGHTS, read_lora, save_lora
from litgpt.checkpoint import CONFIG, atomic_additions, atomic_directory, copy_companion_files, fill_companion_files
from litgpt.cli.secret import Secret
from litgpt.config import Config
from litgpt.export.peft_writer import export_peft
from litgpt.formats.config_json import read_config_json
from litgpt.formats.peft import ADAPTER_MODEL
from litgpt.formats.recognition import text_attribute
from litgpt.formats.written_config import export_config
from litgpt.prompts import STYLE_FILE
from litgpt.sources.door import find_lora, open_base
from litgpt.sources.peft import import_peft
from litgpt.sources.peft_files import base_of_peft


def save_peft(checkpoint_dir: Path | str, directory: Path, access_token: Secret | str | None = None) -> None:
    """Write the LoRA weights of a checkpoint as a PEFT adapter, in float32 as they are trained."""
    file = find_lora(checkpoint_dir, access_token)
    if file.is_dir():
        raise ValueError(f"'{file}' is a PEFT adapter already. Give it to PEFT as it is.")
    weights, settings, base = read_lora(file)
    files = file.parent
    if (files / CONFIG).is_file():
        config = Config.from_checkpoint(files)
    else:
        source = open_base(file, None, access_token)
        config, files = source.config, source.files
    architecture = export_config(config, files, torch.float32)["architectures"][0]
    whole = files / "config.json"
    inside = text_attribute(read_config_json(whole)) if whole.is_file() else None
    # What was downloaded by its id is called by it again.
    name = re.sub(r"^checkpoints/([\w.-]+/[\w.-]+)/?$", r"\1", base or "")
    with atomic_directory(directory) as place:
        export_peft(weights, settings, config, architecture, name, place, inside)
    if (file.parent / STYLE_FILE).is_file():
        print(
            f"An adapter does not carry the prompt format of the training, which {file.parent / STYLE_FILE} names: "
            f"`litgpt convert {file.parent} DIR --to hf` writes the merged model with it as its chat template."
        )
    print(f"Saved {ADAPTER_MODEL} and its adapter_config.json to {directory}")


def save_lora_of_peft(
    adapter: Path,
    directory: Path,
    pretrained_checkpoint_dir: Path | None = None,
    access_token: Secret | str | None = None,
) -> None:
    """Write the LoRA weights of a PEFT adapter, with what belongs to a checkpoint of its model.

    Args:
        adapter: The directory of the adapter.
        directory: Where to; the adapter's own, or a new one.
        pretrained_checkpoint_dir: The model that it belongs to, where it is another than the adapter says.
        access_token: For a model that has to be downloaded first.
    """
    recorded = base_of_peft(adapter)
    base = open_base(adapter, pretrained_checkpoint_dir, access_token)
    notes: list[str] = []
    weights, settings = import_peft(adapter, base, notes)
    for note in notes:
        print(note)
    in_place = directory.resolve() == adapter.resolve()
    with atomic_additions(directory) if in_place else atomic_directory(directory) as place:
        copy_companion_files(adapter, place)
        fill_companion_files(base.files, place)
        base.config.save(place)
        save_lora(place, weights, settings, str(pretrained_checkpoint_dir or recorded))
    print(f"Saved {LORA_WEIGHTS} to {directory}. To put it into the model, run:\nlitgpt merge_lora {directory}")
