"""A checkpoint as a Hugging Face directory."""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litgpt.checkpoint import Release, copy_companion_files, write_state_dict
from litgpt.config import Config
from litgpt.convert.architectures import ARCHITECTURES
from litgpt.convert.config_json import read_config_json
from litgpt.convert.hf_config import config_from_hf, config_to_hf, differences
from litgpt.convert.recognition import architecture_of, text_model
from litgpt.convert.safetensors_file import write_safetensors
from litgpt.convert.source import HEAD, Named, Source, Watch, open_checkpoint
from litgpt.prompts import STYLE_FILE, carried_templates, write_chat_templates
from litgpt.tokenizer import MODEL_FILES, Tokenizer
from litgpt.untrusted import read_json_object

SHARD_SIZE = 5_000_000_000


def export_hf(
    source: Source | str | Path,
    destination: Path,
    *,
    dtype: torch.dtype | None = None,
    safetensors: bool = True,
    pth: bool = False,
    shard_size: int = SHARD_SIZE,
    watch: Watch = iter,
) -> None:
    """Writes weights under Hugging Face names, `config.json` and the tokenizer's files; the weights bit for bit.

    Args:
        source: An opened checkpoint or its path.
        destination: A directory, created if need be. Use `checkpoint.atomic_directory` to have it whole or not at all.
        dtype: The type to write the weights in; None keeps theirs.
        safetensors: Write `model.safetensors`, in several files with an index above `shard_size` bytes.
        pth: Write `model.pth`, a state dict for `torch.load`.
        watch: Wraps the stream of weights, to show progress.

    Raises:
        ValueError: No Hugging Face architecture can express the model.
    """
    source = source if isinstance(source, Source) else open_checkpoint(source)
    config_json = export_config(source.config, source.files, dtype or source.dtype)
    destination.mkdir(parents=True, exist_ok=True)
    (destination / "config.json").write_text(json.dumps(config_json, indent=2) + "\n", encoding="utf-8")
    copy_companion_files(source.files, destination)
    _carry_prompt_format(source.files, destination)
    table = ARCHITECTURES[config_json["architectures"][0]].weights

    def to_theirs(ours: Iterable[Named]) -> Iterator[Named]:
        tied = source.config.tie_embeddings
        return table.to_theirs(
            ((name, tensor.to(dtype or tensor.dtype)) for name, tensor in ours if not (tied and name == HEAD)),
            source.config,
        )

    if safetensors:
        layout = dict(to_theirs(source.layout().items()))
        _write_shards(layout, to_theirs(watch(source.weights())), destination, shard_size, source.release)
    if pth:
        write_state_dict(destination / "model.pth", to_theirs(watch(source.weights())), source.release)


def _carry_prompt_format(files: Path, destination: Path) -> None:
    """Writes the prompt format that a checkpoint was finetuned with as its chat template, in place of the base's."""
    if (files / STYLE_FILE).is_file() and any((files / name).is_file() for name in MODEL_FILES):
        templates, _ = carried_templates(files, Tokenizer(files).adds_bos)
        write_chat_templates(templates, destination)


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


def _write_shards(
    layout: dict[str, Tensor], weights: Iterator[Named], destination: Path, shard_size: int, release: Release
) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, like in layout.items():
        if shards[-1] and filled + _bytes(like) > shard_size:
            shards.append({})
            filled = 0
        shards[-1][name] = like
        filled += _bytes(like)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for file, shard in zip(names, shards, strict=True):
        write_safetensors(destination / file, shard, islice(weights, len(shard)), release)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(map(_bytes, layout.values()))}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (destination / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize
