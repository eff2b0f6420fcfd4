"""The `config.json` to write for a checkpoint."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from litgpt.cli.untrusted import read_json_object
from litgpt.config import Config
from litgpt.formats.config_json import read_config_json
from litgpt.formats.hf_config import config_from_hf, config_to_hf, differences
from litgpt.formats.recognition import architecture_of, text_model
from litgpt.tokenizer.tokenizer import MODEL_FILES, Tokenizer


def export_config(config: Config, files: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The `config.json` of an exported model.

    That of the checkpoint, if it has one that still says the same; then every other entry of it is kept, except that
    the weights were quantised: they no longer are.
    """
    original = original_config(files)
    try:
        unchanged = bool(original) and not differences(config_from_hf(original, config.name), config)
    except ValueError:
        unchanged = False
    if unchanged:
        written = original
    else:
        architecture = (original.get("architectures") or [None])[0]
        written = config_to_hf(config, architecture) | _special_tokens(files, original)
    key = "dtype" if "dtype" in written else "torch_dtype"
    return written | {key: str(dtype).removeprefix("torch.")}


def original_config(files: Path) -> dict[str, Any]:
    """What a checkpoint's own `config.json` says of its text model, under the name of the class that it is read as; {}
    where there is none."""
    try:
        content = read_config_json(files / "config.json")
    except (OSError, ValueError):
        return {}
    original = {key: value for key, value in text_model(content).items() if key != "quantization_config"}
    with suppress(ValueError):
        original["architectures"] = [architecture_of(original).name]
    return original


def _special_tokens(files: Path, original: dict[str, Any]) -> dict[str, Any]:
    """Token ids for `config.json`, from where the checkpoint says them."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids: dict[str, Any] = {name: original[name] for name in names if name in original}
    with suppress(OSError, ValueError):
        ids = read_json_object(files / "generation_config.json") | ids
    if "eos_token_id" not in ids and any((files / name).is_file() for name in MODEL_FILES):
        tokenizer = Tokenizer(files)
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id} | ids
    return {name: ids.get(name) for name in names}
