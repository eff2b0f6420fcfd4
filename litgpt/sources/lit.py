"""A directory with `lit_model.pth`, ours or LitGPT's, opened."""

from collections.abc import Iterator
from copy import copy
from pathlib import Path

from torch import Tensor

from litgpt.checkpoint import (
    CONFIG,
    WEIGHTS,
    plain_names,
    read_state_dict,
)
from litgpt.config import Config
from litgpt.formats.quantised_parts import (
    Parts,
    compare_types,
    dequantised,
    parts_in,
    saved_shapes,
    take_kind,
    weight_name,
)
from litgpt.formats.rules import Named
from litgpt.quantization.layers import (
    QuantizedLinear,
    quantized_linears,
    same_form,
)
from litgpt.sources.fit import LEARNED, compare_shapes, excess, first_dtype, left_out, misfit, same_values, says_tied
from litgpt.sources.meta import meta_model, on_meta
from litgpt.sources.source import EMBEDDING, HEAD, Source


class LitSource(Source):
    """A directory with `lit_model.pth`, ours or LitGPT's.

    Args:
        path: The directory.
        base: The checkpoint that such weights were finetuned from: its configuration and files are taken.
        weights: The file of the weights, where it is another.
    """

    def __init__(self, path: Path, base: Source | None = None, weights: Path | None = None) -> None:
        weights = weights or path / WEIGHTS
        self.files = path if base is None else base.files
        stored = read_state_dict(weights, check=False)
        self.tensors = stored.renamed(plain_names(stored, EMBEDDING))
        self.quantized = take_kind(self.tensors, weights)
        self.config = Config.from_checkpoint(path) if base is None else copy(base.config)
        self.config.tie_embeddings = self._is_tied()
        self.dtype = first_dtype(self.tensors)
        self.layers: dict[str, QuantizedLinear] = {}
        problems = excess(self.config, self.tensors.values())
        if problems:
            raise ValueError(misfit(weights, f"'{self.files if base else path / CONFIG}'", problems))
        model = meta_model(self.config, self.quantized, self.dtype)
        wanted = saved_shapes(model) if self.quantized else model.state_dict()
        problems = compare_shapes(wanted, self.tensors, CONFIG, weights.name)
        surplus = [name for name in self.tensors if name not in wanted]
        if len(problems) == len(surplus) and not any(map(_of_a_model_of_ours, surplus)):
            self.note, problems = left_out(surplus, "the model"), []
            for name in surplus:
                del self.tensors[name]
        if self.quantized is not None:
            problems += compare_types(wanted, self.tensors, weights.name)
            self.layers = {f"{name}.weight": layer for name, layer in quantized_linears(model)}
        if problems:
            raise ValueError(misfit(weights, f"'{self.files if base else path / CONFIG}'", problems))

    def layout(self) -> dict[str, Tensor]:
        layers = self.layers
        return {n: layers[n].weight_shape() if n in layers else on_meta(self.tensors[n]) for n in self._order()}

    def weights(self) -> Iterator[Named]:
        for name, weight in self.forms(self.quantized):
            whole = isinstance(weight, Tensor)
            yield name, weight if whole else dequantised(self.layers[name], weight, self.release)

    def forms(self, kind: str | None) -> Iterator[tuple[str, Tensor | Parts]]:
        if self.quantized is not None and not (kind and same_form(kind, self.quantized)):
            yield from self.weights()
            return
        self.tensors.check()
        for name in self._order():
            if name in self.layers:
                yield name, parts_in(self.tensors, self.layers[name], name)
                continue
            tensor = self.tensors[EMBEDDING if name == HEAD and self.config.tie_embeddings else name]
            yield name, tensor
            self.release(tensor)

    def release(self, tensor: Tensor) -> None:
        self.tensors.release(tensor)

    def _order(self) -> list[str]:
        """Embedding and head first, one after the other, as they may be one."""
        return list(dict.fromkeys((EMBEDDING, HEAD, *map(weight_name, self.tensors))))

    def _is_tied(self) -> bool:
        head, embedding = self.tensors.get(HEAD), self.tensors.get(EMBEDDING)
        if head is None or embedding is None:
            return False
        if head.data_ptr() == embedding.data_ptr():
            return True
        # Other programs may have stored both; then they are tied if they were meant to be and still are the same.
        return says_tied(self.files) and same_values(head, embedding, self.release)


def _of_a_model_of_ours(name: str) -> bool:
    """Whether some model of ours computes with a tensor of this name, or something is learned in it besides a model."""
    return name.startswith(("transformer.", "lm_head.")) or LEARNED.search(name) is not None
