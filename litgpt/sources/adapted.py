"""A checkpoint directory that holds what was finetuned alone, opened with the model that it belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from pathlib import Path

from torch import Tensor

from litgpt.adaptation.adapter import load_adapter, read_adapter
from litgpt.adaptation.lora import LORA_WEIGHTS, LoRASettings, merged_weights, read_lora
from litgpt.checkpoint import copy_companion_files, fill_companion_files, holds_tokenizer, is_peft_alone
from litgpt.formats.rules import Named
from litgpt.model import GPT
from litgpt.sources.kept import kept_directory
from litgpt.sources.peft import import_peft
from litgpt.sources.peft_files import base_of_peft
from litgpt.sources.source import HEAD, Form, Source, Watch


class AdaptedSource(Source):
    """An adapted model, so far that of its base; subclasses add what was learned.

    Args:
        base: The model that was finetuned.
        directory: Where the adaptation is; its tokenizer and prompt style come before the base's.
    """

    def __init__(self, base: Source, directory: Path) -> None:
        self.base, self.directory = base, directory
        self.files = files_of(directory, base)
        self.config, self.dtype, self.note = copy(base.config), base.dtype, base.note_on_plain

    def layout(self) -> dict[str, Tensor]:
        return self.base.layout()

    def weights(self) -> Iterator[Named]:
        return self.base.weights()

    def release(self, tensor: Tensor) -> None:
        self.base.release(tensor)


class LoRASource(AdaptedSource):
    """LoRA, merged tensor by tensor as the weights are read.

    Args:
        base, directory: As for `AdaptedSource`.
        update: The LoRA matrices by our names.
        settings: What they are.
    """

    def __init__(self, base: Source, directory: Path, update: dict[str, Tensor], settings: LoRASettings) -> None:
        super().__init__(base, directory)
        self.update, self.settings = update, settings
        if f"{HEAD.removesuffix('weight')}lora_A" in self.update:
            self.config.tie_embeddings = False  # the embedding has not learned what the head has

    def weights(self) -> Iterator[Named]:
        return merged_weights(self.base.weights(), self.base.config, self.update, self.settings)


class AdapterSource(AdaptedSource):
    """LLaMA-Adapter or Adapter v2, put into the model that the base's weights are loaded into.

    Args:
        base: As for `AdaptedSource`.
        adapter: The directory of the adapter, or its file.
        files: Where the tokenizer and prompt style are, if not with the adapter.
    """

    def __init__(self, base: Source, adapter: Path, files: Path | None = None) -> None:
        super().__init__(base, files or adapter)
        self.adapter, _ = read_adapter(adapter)
        self.quantized, self.note = base.quantized, base.note

    def forms(self, kind: str | None) -> Iterator[tuple[str, Form]]:
        return self.base.forms(kind)

    def load_into(self, model: GPT, watch: Watch = iter) -> None:
        super().load_into(model, watch)
        load_adapter(model, self.adapter)


def files_of(directory: Path, base: Source) -> Path:
    """Where the tokenizer's and the JSON files of an adapted model are: in the directory of the adaptation, or in a new
    one, with what it lacks from the base's."""
    if holds_tokenizer(directory) and not is_peft_alone(directory):
        return directory
    files = kept_directory("litgpt-adapted-")  # PEFT leaves the tokenizer, and none of the rest
    copy_companion_files(directory, files)
    fill_companion_files(base.files, files)
    return files


def holds_lora(place: Path) -> bool:
    """Whether a directory holds weights of LoRA, ours or PEFT's, or a file is to be read as such."""
    return _is_ours(place) or is_peft_alone(place)


def base_of(place: Path) -> str | None:
    """The checkpoint that is recorded as the one an adaptation belongs to.

    Raises:
        ValueError: The adaptation is damaged.
    """
    if _is_ours(place):
        return read_lora(place)[2]
    return base_of_peft(place) if is_peft_alone(place) else read_adapter(place)[1]


def adapt(base: Source, place: Path) -> AdaptedSource:
    """The base with what was finetuned.

    Raises:
        ValueError: The adaptation is damaged, or belongs to another model.
    """
    return add_lora(base, place) if holds_lora(place) else AdapterSource(base, place)


def add_lora(base: Source, place: Path) -> LoRASource:
    """The base with LoRA weights: a directory of ours or of PEFT's, or a file of ours.

    Raises:
        ValueError: They are damaged, or belong to another model.
    """
    if _is_ours(place):
        update, settings, _ = read_lora(place)
        return LoRASource(base, place if place.is_dir() else place.parent, update, settings)
    notes: list[str] = []
    source = LoRASource(base, place, *import_peft(place, base, notes))
    source.note = " ".join(filter(None, (source.note, *notes))) or None
    return source


def _is_ours(place: Path) -> bool:
    return place.is_file() or (place / LORA_WEIGHTS).is_file()
