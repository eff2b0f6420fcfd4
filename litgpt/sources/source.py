"""What an opened checkpoint of any kind offers: its shape, its files, its weights under our names."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litgpt.cli.plural import counted
from litgpt.config import Config
from litgpt.formats.quantised_parts import Parts, fill
from litgpt.formats.rules import Named
from litgpt.model import GPT
from litgpt.quantization.block_weight import BlockMatrix, BlockWeight
from litgpt.quantization.layers import QuantizedLinear, is_quantized, kind_of, quantized_layers
from litgpt.sources.fit import compare_shapes, rows_at_once

HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"
Form = Tensor | Parts | BlockMatrix
Place = torch.device | str | Callable[[str], torch.device]
Watch = Callable[[Iterator[tuple[str, Any]]], Iterator[tuple[str, Any]]]


class Source(ABC):
    """An opened checkpoint: a directory of ours, one of Hugging Face, or a GGUF file. See `open_checkpoint`.

    Attributes:
        config: The shape of the model, with `tie_embeddings` as the weights have it.
        files: A directory with the tokenizer's and the JSON files.
        dtype: The type of the weights (of the first one).
        note: What of the checkpoint is left out or changed by loading it, for the user to know; None if nothing.
        quantized: How its weights are quantised, if a model can have them so, such as bnb.nf4; None if it cannot.
        has_blocks: Whether it holds the blocks of a GGUF file, which a model can have so (--quantize gguf) or plain.
    """

    config: Config
    files: Path
    dtype: torch.dtype
    note: str | None = None
    quantized: str | None = None
    has_blocks: bool = False

    @property
    def note_on_plain(self) -> str | None:
        """The note where plain weights are taken, though the checkpoint has them quantised."""
        if self.quantized is None:
            return self.note
        dtype = str(self.dtype).removeprefix("torch.")
        return " ".join(filter(None, (self.note, f"Its {self.quantized} weights are de-quantised to {dtype}.")))

    @abstractmethod
    def layout(self) -> dict[str, Tensor]:
        """Our names, in the order of `weights`, each with a tensor of that shape and type on the meta device."""

    @abstractmethod
    def weights(self) -> Iterator[Named]:
        """The weights under our names, one at a time.

        A tensor is a read-only view of the file where possible, and its memory is given back when the next one is
        asked for. Tied embeddings come right after one another, as one tensor under both names.
        """

    def forms(self, kind: str | None) -> Iterator[tuple[str, Form]]:
        """As `weights`, for a model quantised as `kind`: a weight that is here in that form comes as its parts."""
        return self.weights()

    def release(self, tensor: Tensor) -> None:  # noqa: B027 - not every source has mapped files
        """Gives back the memory of a tensor, or of a part of one, if it is a view of this checkpoint's files."""

    def load_into(self, model: GPT, watch: Watch = iter) -> None:
        """Copies the weights into a model, converting their type and moving them to its device.

        Quantised layers quantise theirs, in the type that the checkpoint has, or take them as they are quantised there.

        Args:
            model: The model.
            watch: Wraps the stream of weights, to show progress.

        Raises:
            ValueError: The model has other weights than this checkpoint; lists every missing and unexpected name and
                every wrong shape, and has changed nothing.
        """
        quantized = {f"{name}.weight": layer for name, layer in quantized_layers(model)}
        targets = {name: tensor for name, tensor in model.state_dict().items() if not is_quantized(name)}
        wanted = targets | {name: layer.weight_shape() for name, layer in quantized.items()}
        problems = compare_shapes(wanted, self.layout(), "this model", "the checkpoint")
        if model.config.tie_embeddings and not self.config.tie_embeddings:
            problems.append(f"  {HEAD} and {EMBEDDING} differ in the checkpoint; this model ties them (tie_embeddings)")
        if problems:
            raise ValueError(
                f"The checkpoint does not fit the model ({counted(len(problems), 'problem')}):\n"
                + "\n".join(problems)
                + "\nUse the configuration of the checkpoint, or another checkpoint."
            )
        filled: set[int] = set()
        with torch.no_grad():
            for name, tensor in watch(self.forms(kind_of(model))):
                layer = quantized.get(name)
                if isinstance(tensor, BlockMatrix):
                    weight = quantized[name].quantized
                    assert isinstance(weight, BlockWeight)
                    weight.take(tensor)
                elif not isinstance(tensor, Tensor):
                    assert isinstance(layer, QuantizedLinear)
                    fill(layer, tensor, self.release)
                elif layer is not None:
                    layer.load_weight(tensor, self.release)
                # A tied weight of the model is one tensor under two names: fill it once.
                elif targets[name].data_ptr() not in filled:
                    self._copy(tensor, targets[name])
                    filled.add(targets[name].data_ptr())

    def _copy(self, tensor: Tensor, target: Tensor) -> None:
        rows = rows_at_once(tensor)
        for part, place in (
            zip(tensor.split(rows), target.split(rows), strict=True) if tensor.dim() else [(tensor, target)]
        ):
            place.copy_(part)
            self.release(part)
