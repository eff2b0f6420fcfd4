"""A checkpoint as a Hugging Face directory."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from litgpt.checkpoint import Release, copy_companion_files, write_state_dict
from litgpt.formats.architectures import ARCHITECTURES
from litgpt.formats.safetensors_file import write_safetensors
from litgpt.formats.written_config import export_config
from litgpt.prompts import STYLE_FILE, carried_templates, write_chat_templates
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.source import HEAD, Named, Source, Watch
from litgpt.tokenizer.tokenizer import MODEL_FILES, Tokenizer

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
