"""A checkpoint directory that holds what was finetuned alone, opened with the model that it belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from pathlib import Path

from torch import Tensor

from litgpt.adaptation.adapter import ADAPTER_FILES, load_adapter, read_adapter
from litgpt.adaptation.lora import LORA_WEIGHTS, LoRASettings, merged_weights, read_lora
from litgpt.checkpoint import copy_companion_files, fill_companion_files
from litgpt.formats.peft import is_peft_alone
from litgpt.formats.quantised_parts import Parts
from litgpt.model import GPT
from litgpt.sources.kept import kept_directory
from litgpt.sources.peft import import_peft
from litgpt.sources.peft_files import base_of as base_of_peft
from litgpt.sources.source import HEAD, Named, Source, Watch


class AdaptedSource(Source):
    """The base of an adaptation, as which it counts; subclasses add what was learned.

    Args:
        base: The model that was finetuned.
        directory: Where the adaptation is; its tokenizer and prompt style come before the base's.
    """

    def __init__(self, base: Source, directory: Path) -> None:
        self.base, self.files = base, directory
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
    """LLaMA-Adapter or Adapter v2, put into the model that the base's weights are loaded into."""

    def __init__(self, base: Source, directory: Path) -> None:
        super().__init__(base, directory)
        self.adapter, _ = read_adapter(directory)
        self.quantized, self.note = base.quantized, base.note

    def forms(self, kind: str | None) -> Iterator[tuple[str, Tensor | Parts]]:
        return self.base.forms(kind)

    def load_into(self, model: GPT, watch: Watch = iter) -> None:
        super().load_into(model, watch)
        load_adapter(model, self.adapter)


def holds_adaptation(directory: Path) -> bool:
    """Whether there are weights of LoRA or of an adapter, merged ones beside them or not; also as PEFT holds them."""
    names = (LORA_WEIGHTS, *ADAPTER_FILES)
    return any((directory / name).is_file() for name in names) or is_peft_alone(directory)


def is_lora(directory: Path) -> bool:
    """Whether there are weights of LoRA."""
    return (directory / LORA_WEIGHTS).is_file()


def base_of(directory: Path) -> str | None:
    """The checkpoint that is recorded as the one an adaptation belongs to.

    Raises:
        ValueError: The adaptation is damaged.
    """
    if is_lora(directory):
        return read_lora(directory)[2]
    return base_of_peft(directory) if is_peft_alone(directory) else read_adapter(directory)[1]


def adapt(base: Source, directory: Path) -> AdaptedSource:
    """The base with what was finetuned.

    Raises:
        ValueError: The adaptation is damaged, or belongs to another model.
    """
    if is_lora(directory):
        update, settings, _ = read_lora(directory)
        return LoRASource(base, directory, update, settings)
    if not is_peft_alone(directory):
        return AdapterSource(base, directory)
    notes: list[str] = []
    update, settings = import_peft(directory, base, notes)
    files = kept_directory("litgpt-peft-")  # an adapter may come with its tokenizer, and without all else
    copy_companion_files(directory, files)
    fill_companion_files(base.files, files)
    source = LoRASource(base, files, update, settings)
    source.note = " ".join(filter(None, (source.note, *notes))) or None
    return source
