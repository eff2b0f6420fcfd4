"""The checkpoint directory: telling what it holds and lacks, filling one."""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt.checkpoint.names import (
    ADAPTATIONS,
    COMPANION_FILES,
    COMPANION_PATTERNS,
    CONFIG,
    PEFT_CONFIG,
    WEIGHTS,
)
from litgpt.checkpoint.weight_index import read_weight_index
from litgpt.config import Config

if TYPE_CHECKING:
    import torch

    from litgpt.checkpoint.weights import Release
    from litgpt.model import GPT

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_OF_THE_MODEL = ("config.json", "generation_config.json")


def missing_files(path: Path, weights: bool = False) -> list[str]:
    """What a directory lacks to be a checkpoint directory, in words; empty if nothing.

    A directory with just a tokenizer lacks nothing (it serves as `--tokenizer_dir`), nor does one with just an
    adaptation, unless `weights` are asked for.
    """
    if (path / WEIGHTS).is_file():
        return [] if (path / CONFIG).is_file() else [f"{CONFIG} (the shape of the model in {WEIGHTS})"]
    files = hf_weight_files(path)
    if not files and holds_adaptation(path):
        remedy = f"`litgpt merge_lora {path}` puts LoRA weights into their model"
        return [f"the weights of a model: it holds LoRA or adapter weights alone ({remedy})"] if weights else []
    if files:
        lost = [f"the weight file {file.name}" for file in files if not file.is_file()]
        return lost + ([] if (path / "config.json").is_file() else ["config.json (the shape of the model)"])
    if not weights and holds_tokenizer(path):
        return []
    weights_names = f"weights ({WEIGHTS}, *.safetensors or pytorch_model*.bin)"
    if any((path / name).is_file() for name in (CONFIG, "config.json")):
        return [weights_names]
    return [weights_names, f"{CONFIG} or config.json"]


def holds_tokenizer(path: Path) -> bool:
    """Whether there is a tokenizer's main file."""
    return any((path / name).is_file() for name in _TOKENIZERS)


def is_peft_alone(path: Path) -> bool:
    """Whether a directory holds a PEFT adapter and no model next to it."""
    return (path / PEFT_CONFIG).is_file() and not hf_weight_files(path)


def holds_adaptation(path: Path) -> bool:
    """Whether there are weights of LoRA or of an adapter, merged ones next to them or not; also as PEFT holds them."""
    return any((path / name).is_file() for name in ADAPTATIONS) or is_peft_alone(path)


def holds_adaptation_alone(path: Path) -> bool:
    """Whether there are such weights, and none of a model."""
    return holds_adaptation(path) and not (path / WEIGHTS).is_file() and not hf_weight_files(path)


def hf_weight_files(path: Path) -> list[Path]:
    """The weight files of a Hugging Face directory, as its index lists them (so a listed file may be absent).

    Safetensors win over `.bin` files of the same weights.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{single}.index.json"
        if index.is_file():
            return [path / name for name in sorted(set(read_weight_index(index).values()))]
        if (path / single).is_file():
            return [path / single]
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        # Without an index: adapters and original/consolidated weights are other things than this model's weights.
        found = sorted(file for file in path.glob(pattern) if not file.name.startswith(("adapter", "consolidated")))
        if found:
            return found
    return []


def copy_companion_files(source: str | Path, destination: str | Path) -> None:
    """Copies the tokenizer's files, the JSON files and the prompt style from one checkpoint directory to another."""
    source, destination = Path(source), Path(destination)
    destination.mkdir(parents=True, exist_ok=True)
    inside = (str(file.relative_to(source)) for pattern in COMPANION_PATTERNS for file in sorted(source.glob(pattern)))
    for name in (*COMPANION_FILES, *inside):
        # A Hub cache holds links; what is copied is the file behind them.
        if (source / name).is_file() and not (destination / name).exists():
            (destination / name).parent.mkdir(exist_ok=True)
            shutil.copy(source / name, destination / name)


def fill_companion_files(source: str | Path, destination: str | Path) -> None:
    """Copies what an adapter's directory lacks from that of its model.

    The tokenizer's files and its chat template come from one place: files of two tokenizers make none.
    """
    source, destination = Path(source), Path(destination)
    if not holds_tokenizer(destination):
        copy_companion_files(source, destination)
        return
    for name in _OF_THE_MODEL:
        if (source / name).is_file() and not (destination / name).exists():
            shutil.copy(source / name, destination / name)


def save_model(
    directory: str | Path,
    model: "GPT | dict[str, torch.Tensor] | list[tuple[str, torch.Tensor]] | Iterator[tuple[str, torch.Tensor]]",
    config: Config,
    release: "Release | None" = None,
) -> None:
    """Writes `lit_model.pth` and `model_config.yaml` into a directory (that `atomic_directory` gave the caller).

    Args:
        directory: An existing directory.
        model: A model, its state dict, or a list or a stream of names and tensors.
        config: Its shape.
        release: As for `write_state_dict`.
    """
    import torch  # whoever looks for a directory, or copies its files, does without

    from litgpt.checkpoint.writer import write_state_dict

    if isinstance(model, torch.nn.Module):
        model = model.state_dict()
    named: Iterable[tuple[str, torch.Tensor]] = model.items() if isinstance(model, dict) else model
    config.save(directory)
    write_state_dict(Path(directory) / WEIGHTS, named, release)
