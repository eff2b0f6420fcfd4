"""From what a user names to an opened checkpoint: found here or downloaded, with what was finetuned on it."""

from __future__ import annotations

from pathlib import Path

from litgpt.adaptation.lora import LORA_WEIGHTS
from litgpt.checkpoint import holds_adaptation_alone, is_peft_alone
from litgpt.cli.secret import Secret
from litgpt.sources.adapted import AdapterSource, LoRASource, adapt, add_lora, base_of, holds_lora
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.find import CHECKPOINTS, MAX_DEPTH, find_base, find_checkpoint, too_deep
from litgpt.sources.source import Source


def open_model(name_or_path: Path | str, access_token: Secret | str | None = None) -> Source:
    """Opens the checkpoint that a user means.

    A directory of LoRA or adapter weights next to which there are no merged ones, also of PEFT's, is opened on the
    model that it says it belongs to.

    Args:
        name_or_path: A directory of ours or Hugging Face's, a `.gguf` file, the same below `checkpoints/`, a known
            name, or a Hub id, which is downloaded.
        access_token: For a gated model that has to be downloaded.

    Raises:
        FileNotFoundError: There is no such checkpoint, or it, or the model it belongs to, lacks something.
        ValueError: A file is damaged, or the model is not supported.
        HubError: It cannot be downloaded.
    """
    return _open(find_checkpoint(name_or_path, access_token), access_token)


def open_merged(name_or_path: Path | str, access_token: Secret | str | None = None) -> Source:
    """As `open_model`, for those who need plain weights: LoRA's are merged while they are read.

    Raises:
        FileNotFoundError, HubError: As for `open_model`.
        ValueError: It is damaged, not supported, or holds an adapter, which is no change of weights.
    """
    return _without_adapter(open_model(name_or_path, access_token))


def open_lora(
    name_or_path: Path | str, base: Path | str | None = None, access_token: Secret | str | None = None
) -> LoRASource:
    """Opens LoRA weights on their model, whether there are merged ones next to them or not.

    Args:
        name_or_path: As for `find_lora`.
        base: The model that they belong to, where it is another than they say.
        access_token: For what has to be downloaded.

    Raises:
        FileNotFoundError, ValueError, HubError: As for `find_lora` and `open_base`.
    """
    place = find_lora(name_or_path, access_token)
    return add_lora(open_base(place, base, access_token), place)


def open_base(
    adaptation: Path,
    given: Path | str | None = None,
    access_token: Secret | str | None = None,
    remedy: str = "Give it as `pretrained_checkpoint_dir`.",
    depth: int = 0,
) -> Source:
    """The model that an adaptation belongs to, which may be one with LoRA weights of its own.

    Args:
        adaptation: Its file or directory.
        given: The model, where it is another than is recorded with the adaptation.
        access_token: For a model that has to be downloaded first.
        remedy: What to do where the recorded one is not there.
        depth: On how many others this adaptation stands.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: None is recorded, or it cannot be one.
    """
    if depth == MAX_DEPTH:
        raise too_deep(adaptation)
    if given is not None:
        path = find_checkpoint(given, access_token)
    else:
        path = find_base(adaptation, base_of(adaptation), access_token, remedy)
    return _without_adapter(_open(path, access_token, depth + 1))


def find_lora(name_or_path: Path | str, access_token: Secret | str | None = None) -> Path:
    """The LoRA weights that a user means: a file of ours, or the directory of a PEFT adapter.

    Args:
        name_or_path: The file or a directory with one; a `.pth` file that is not there, such as `final_lora.pth`, means
            the one that is there under the usual name. Or a directory or Hub id of a PEFT adapter.
        access_token: For a gated adapter that has to be downloaded.

    Raises:
        FileNotFoundError: There are no LoRA weights.
        HubError: It cannot be downloaded.
    """
    for file in (Path(name_or_path).expanduser(), CHECKPOINTS / name_or_path):
        if file.is_file() and file.suffix != ".gguf":
            return file
        if file.suffix == ".pth" and (file.parent / LORA_WEIGHTS).is_file():
            return file.parent / LORA_WEIGHTS
    place = find_checkpoint(name_or_path, access_token, incomplete=True)
    if (place / LORA_WEIGHTS).is_file():
        return place / LORA_WEIGHTS
    if is_peft_alone(place):
        return place
    raise FileNotFoundError(
        f"'{place}' holds no LoRA weights (no {LORA_WEIGHTS}, no PEFT adapter). Give a directory that "
        "`litgpt finetune_lora` has written, such as out/finetune/lora/final, or a PEFT adapter."
    )


def _open(path: Path, access_token: Secret | str | None, depth: int = 0) -> Source:
    if not holds_adaptation_alone(path):
        return open_checkpoint(path)
    command = f"generate_adapter MODEL --adapter_path {path}"
    if holds_lora(path):
        command = f"merge_lora {path} --pretrained_checkpoint_dir MODEL"
    remedy = f"If it is elsewhere, say where with `litgpt {command}`."
    return adapt(open_base(path, None, access_token, remedy, depth), path)


def _without_adapter(source: Source) -> Source:
    """Raises ValueError where a source is more than weights."""
    if isinstance(source, AdapterSource):
        belongs = base_of(source.directory)
        raise ValueError(
            f"'{source.directory}' holds an adapter, which cannot be merged into the weights of its model. Give the "
            f"model it belongs to{f', {belongs}' if belongs else ''}."
        )
    return source
