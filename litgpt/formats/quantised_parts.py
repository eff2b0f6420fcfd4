"""Our quantised weights in a file: what `lit_model.pth` holds in place of a weight, and the kind.

    quantize                     the kind, such as bnb.nf4: its letters as bytes
    X.quantized.codes, ...       the parts of the layer X's weight, as `litgpt.quantization` has them; int4's in an
                                 order that does not depend on the CPU

All else has the name and the form that it has in a plain checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from litgpt.checkpoint import Release
from litgpt.formats.rules import Named
from litgpt.model import GPT
from litgpt.quantization import block_weight
from litgpt.quantization.layers import (
    SAVED_KINDS,
    QuantizedLinear,
    is_quantized,
    kind_of,
    quantized_layers,
    quantized_linears,
)
from litgpt.quantization.weight_only import Int4Weight

KIND = "quantize"
Parts = dict[str, Tensor]


# --- writing ---------------------------------------------------------------------------------------------------------


def saved_weights(model: GPT) -> Iterator[Named]:
    """A model's weights as a file holds them, quantised or not; the blocks of a GGUF file de-quantised."""
    kind = kind_of(model)
    if kind == block_weight.KIND:
        yield from _without_blocks(model)
        return
    yield from _kind_record(kind)
    yield from ((name, tensor) for name, tensor in model.state_dict().items() if not is_quantized(name))
    for name, layer in quantized_layers(model):
        yield from _named(name, _parts(layer.quantized))


def _without_blocks(model: GPT) -> Iterator[Named]:
    """A model's weights, one matrix de-quantised at a time; a tied head is the embedding's tensor."""
    yield from ((name, tensor) for name, tensor in model.state_dict().items() if not is_quantized(name))
    shared: tuple[nn.Module, Tensor] | None = None
    for name, layer in sorted(quantized_layers(model), key=lambda pair: pair[0] != "lm_head"):
        if name == "transformer.wte" and shared is not None and shared[0] is layer.quantized:
            yield f"{name}.weight", shared[1]
            shared = None
            continue
        weight = layer.plain_weight()
        if name == "lm_head":
            shared = layer.quantized, weight
        yield f"{name}.weight", weight


def quantised_stream(weights: Iterable[Named], model: GPT, release: Release) -> Iterator[Named]:
    """A stream of plain weights as a file holds them quantised, one matrix in memory at a time.

    Args:
        weights: Names and tensors; tied ones come right after one another, as one tensor.
        model: The model with its quantised layers, on the meta device; says how, and in which types.
        release: Called with the parts of a weight that have been quantised.
    """
    yield from _kind_record(kind_of(model))
    layers, likes = dict(quantized_linears(model)), model.state_dict()
    previous, converted = None, None
    for name, tensor in weights:
        layer = layers.get(name.removesuffix(".weight"))
        if layer is not None:
            filled = QuantizedLinear(layer.in_features, layer.out_features, False, layer.kind, layer.dtype)
            filled.load_weight(tensor, release)
            yield from _named(name.removesuffix(".weight"), _parts(filled.quantized))
            continue
        if converted is None or tensor is not previous:
            previous, converted = tensor, tensor.to(likes[name].dtype)
        yield name, converted


def _kind_record(kind: str | None) -> Iterator[Named]:
    if kind is not None:
        yield KIND, torch.tensor(list(kind.removesuffix("-training").encode()), dtype=torch.uint8)


def _named(layer: str, parts: Parts) -> Iterator[Named]:
    return ((f"{layer}.quantized.{name}", tensor) for name, tensor in parts.items())


def _parts(weight: nn.Module) -> Parts:
    return weight.plain() if isinstance(weight, Int4Weight) else dict(weight.named_parameters())


# --- reading ---------------------------------------------------------------------------------------------------------


def take_kind(tensors: dict[str, Tensor], file: Path) -> str | None:
    """Takes the kind out of what a file holds; None where the weights are plain.

    Raises:
        ValueError: There is no such kind, or none is said of quantised weights.
    """
    record = tensors.pop(KIND, None)
    if record is None:
        if any(map(is_quantized, tensors)):
            raise ValueError(
                f"'{file}' holds quantised weights, but not how they are quantised ('{KIND}'). It was not written by "
                "`litgpt convert_lit_checkpoint` or LLM.save: quantise the model again."
            )
        return None
    kind = bytes(record.flatten().to(torch.uint8).tolist()[:40]).decode(errors="replace")
    if kind not in SAVED_KINDS:
        raise ValueError(
            f"The weights in '{file}' are quantised as {kind!r}, which is none of {', '.join(SAVED_KINDS)}. "
            "Update litgpt, or quantise the model again."
        )
    return kind


def weight_name(name: str) -> str:
    """The weight that a tensor is, or is a part of."""
    return re.sub(r"\.quantized\..*", ".weight", name)


def saved_shapes(model: GPT) -> dict[str, Tensor]:
    """Names, shapes and types of what a file holds for a quantised model (on the meta device)."""
    shapes = {name: tensor for name, tensor in model.state_dict().items() if not is_quantized(name)}
    for name, layer in quantized_layers(model):
        shapes |= _named(name, _part_shapes(layer.quantized))
    return shapes


def _part_shapes(weight: nn.Module) -> Parts:
    own: Parts = dict(weight.named_parameters())
    if not isinstance(weight, Int4Weight):
        return own
    return {
        name: torch.empty(shape, dtype=own[name].dtype, device="meta") for name, shape in weight.plain_shapes().items()
    }


def compare_types(wanted: dict[str, Tensor], found: dict[str, Tensor], file: str) -> list[str]:
    """One line for every tensor that holds bytes where fractions were expected, or the other way round."""
    return [
        f"  wrong type: {name} is {_type(found[name])} in {file}, where {_type(like)} was expected"
        for name, like in wanted.items()
        if name in found
        and found[name].dtype != like.dtype
        and not (found[name].is_floating_point() and like.is_floating_point())
    ]


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def parts_in(tensors: dict[str, Tensor], layer: QuantizedLinear, weight: str) -> Parts:
    """The parts of a weight among a file's tensors."""
    prefix = f"{weight.removesuffix('.weight')}.quantized."
    return {name: tensors[prefix + name] for name in _part_shapes(layer.quantized)}


@torch.no_grad()
def fill(layer: QuantizedLinear, parts: Parts, release: Release) -> None:
    """Copies the parts of a weight into a layer of the kind; `release` is called with what has been used."""
    if isinstance(layer.quantized, Int4Weight):
        layer.quantized.take_plain(**parts)
    else:
        for name, parameter in layer.quantized.named_parameters():
            parameter.copy_(parts[name])
    for tensor in parts.values():
        release(tensor)


def dequantised(layer: QuantizedLinear, parts: Parts, release: Release) -> Tensor:
    """(out, in) the weight that parts stand for, in the type of a layer of the kind (on the meta device)."""
    filled = QuantizedLinear(layer.in_features, layer.out_features, False, layer.kind, layer.dtype)
    fill(filled, parts, release)
    return filled.plain_weight()
