"""The checkpoint directory: finding one, telling what it lacks, filling one."""

import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt.catalog import find_known, known_checkpoints
from litgpt.checkpoint.names import COMPANION_FILES, COMPANION_PATTERNS, CONFIG, PEFT_CONFIG, WEIGHTS
from litgpt.checkpoint.weight_index import read_weight_index
from litgpt.cli.suggest import did_you_mean, nearly
from litgpt.config import Config

if TYPE_CHECKING:
    import torch

    from litgpt.checkpoint.weights import Release
    from litgpt.model import GPT

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_OF_THE_MODEL = ("config.json", "generation_config.json")
FILES = (".gguf", ".pth", ".safetensors", ".bin", ".json", ".yaml")  # what ends so is no id of the Hub


def resolve_checkpoint_dir(
    name_or_path: str | Path,
    *,
    download: Callable[[str], Path] | None = None,
    incomplete: bool = False,
    tokenizer_only: bool = False,
) -> Path:
    """Finds the checkpoint that a user means.

    Args:
        name_or_path: An existing directory or `.gguf` file, a weight file inside such a directory, the same below
            `checkpoints/`, a known model name (`org/name` or the short name), or a Hub id.
        download: Called with the repository id if nothing is found on this machine, or a tokenizer alone where a
            download puts it.
        incomplete: Take a directory that is found as it is, whatever it lacks.
        tokenizer_only: A tokenizer alone is enough.

    Returns:
        A checkpoint directory (ours or Hugging Face's) or a `.gguf` file.

    Raises:
        FileNotFoundError: Nothing is found, or a directory is found that lacks something; says what, and what to do.
    """
    name = str(name_or_path)
    model = name.removeprefix("checkpoints/")  # recipes name the directory that a download goes to
    known = find_known(model)
    repo_id = known.repo_id if known else model if re.fullmatch(r"[\w.-]+/[\w.-]+", model) else None
    candidates = [Path(name).expanduser(), Path("checkpoints") / name]
    if known:
        candidates.append(Path("checkpoints") / repo_id)
    for path in candidates:
        if path.is_file():
            if path.suffix == ".gguf":
                return path
            path = path.parent
        if path.is_dir():
            rest_is_on_hub = download and not tokenizer_only and repo_id and path == Path("checkpoints") / repo_id
            if rest_is_on_hub and not incomplete and _holds_tokenizer_alone(path):
                continue
            return path if incomplete else _complete(path)
    meant = None if known else nearly(model, known_checkpoints())
    if meant or (not known and _is_path(name)):
        repo_id = None
    if repo_id and download:
        return _complete(Path(download(repo_id)))
    if repo_id:
        remedy = f"To download it, run `litgpt download {repo_id}`."
    else:
        remedy = "Give the path of a checkpoint directory or .gguf file, or a name from `litgpt download list`."
    names = [repo_id if "/" in name else entry.name for repo_id, entry in known_checkpoints().items()]
    hint = "" if known else did_you_mean(name, [*names, *_local_checkpoints()] if meant is None else [meant])
    looked = ", ".join(f"'{path}'" for path in dict.fromkeys(candidates))
    raise FileNotFoundError(f"No checkpoint '{name}' (looked for {looked}).{hint} {remedy}")


def _is_path(name: str) -> bool:
    """Whether a name that may look like `org/name` is that of a file here: it begins or ends like one, or in a
    directory that there is."""
    first = name.removeprefix("checkpoints/").partition("/")[0]
    return name.startswith((".", "~", "/")) or Path(name).suffix in FILES or Path(first).is_dir()


def _local_checkpoints() -> list[str]:
    return [str(path.parent) for path in sorted(Path("checkpoints").glob(f"*/*/{WEIGHTS}"))]


def _holds_tokenizer_alone(path: Path) -> bool:
    """Whether a directory has a tokenizer and no weights of any kind, as `litgpt download --tokenizer_only true` leaves
    it."""
    # Weights of LoRA and of adapters, PEFT's too, which need a base.
    others = (file for file in path.iterdir() if ".pth" in file.suffixes or file.name == PEFT_CONFIG)
    return not missing_files(path) and bool(missing_files(path, weights=True)) and not any(others)


def _complete(path: Path) -> Path:
    missing = missing_files(path)
    if missing:
        raise FileNotFoundError(
            f"The checkpoint directory '{path}' is incomplete; it lacks {' and '.join(missing)}. "
            "Download or convert the checkpoint again, or give another directory."
        )
    return path


def missing_files(path: Path, weights: bool = False) -> list[str]:
    """What a directory lacks to be a checkpoint directory, in words; empty if nothing.

    A directory with just a tokenizer lacks nothing (it serves as `--tokenizer_dir`), nor does one with just a PEFT
    adapter, unless `weights` are asked for.
    """
    if (path / WEIGHTS).is_file():
        return [] if (path / CONFIG).is_file() else [f"{CONFIG} (the shape of the model in {WEIGHTS})"]
    files = hf_weight_files(path)
    if not files and (path / PEFT_CONFIG).is_file():
        remedy = f"`litgpt convert {path} --to litgpt` and then `litgpt merge_lora {path}` put it into its model"
        return [f"the weights of a model: it holds a PEFT adapter alone ({remedy})"] if weights else []
    if files:
        lost = [f"the weight file {file.name}" for file in files if not file.is_file()]
        return lost + ([] if (path / "config.json").is_file() else ["config.json (the shape of the model)"])
    if not weights and any((path / name).is_file() for name in _TOKENIZERS):
        return []
    weights_names = f"weights ({WEIGHTS}, *.safetensors or pytorch_model*.bin)"
    if any((path / name).is_file() for name in (CONFIG, "config.json")):
        return [weights_names]
    return [weights_names, f"{CONFIG} or config.json"]


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
    if not any((destination / name).is_file() for name in _TOKENIZERS):
        copy_companion_files(source, destination)
        return
    for name in _OF_THE_MODEL:
        if (source / name).is_file() and not (destination / name).exists():
            shutil.copy(source / name, destination / name)


def save_model(
    directory: str | Path,
    model: "GPT | dict[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]",
    config: Config,
    release: "Release | None" = None,
) -> None:
    """Writes `lit_model.pth` and `model_config.yaml` into a directory (that `atomic_directory` gave the caller).

    Args:
        directory: An existing directory.
        model: A model, its state dict, or a stream of names and tensors.
        config: Its shape.
        release: As for `write_state_dict`.
    """
    import torch  # whoever looks for a directory, or copies its files, does without

    from litgpt.checkpoint.writer import write_state_dict

    if isinstance(model, torch.nn.Module):
        model = model.state_dict()
    config.save(directory)
    write_state_dict(Path(directory) / WEIGHTS, model.items() if isinstance(model, dict) else model, release)
