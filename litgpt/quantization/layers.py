"""Frozen linear layers in 4 or 8 bits, put into a GPT from outside: the model does not know them.

    bnb.nf4, bnb.fp4          4 bits a value and a float32 scale for every 64 of them (https://arxiv.org/abs/2305.14314)
    bnb.nf4-dq, bnb.fp4-dq    the scales in 8 bits, too (section 3 there)
    bnb.int8-training         8 bits a value and a scale for every row; inputs are quantised for the product as well,
    bnb.int8                  but for their outliers (LLM.int8(), https://arxiv.org/abs/2208.07339)
    int4, int8                for inference on CPUs, the head as well; see `litgpt.quantization.weight_only`
    gguf                      the blocks of a GGUF file as they lie there, also of head and embedding, for inference on
                              CPUs; see `litgpt.quantization.block_weight`

The arithmetic of the first is bitsandbytes', which must be installed; it has kernels for CUDA, ROCm, Apple GPUs and
CPUs. Its layers are not used: they keep the scales in Python objects next to the weight, which `load_state_dict`, FSDP2
and the meta device know nothing of. Here all of a weight's quantised form is parameters without gradient, in types and
shapes known beforehand, so that a model is saved, loaded, moved, copied (DDP) and sharded (FSDP2) like any other.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.adaptation.modules import replace_module
from litgpt.model import GPT
from litgpt.quantization import block_weight, weight_only
from litgpt.quantization.block_weight import BlockEmbedding, BlockWeight
from litgpt.quantization.weight_only import frozen, keeping_types

FOUR_BIT_KINDS = ("bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq")
TRAINING_KINDS = (*FOUR_BIT_KINDS, "bnb.int8-training")
FOR_CPUS = (*weight_only.KINDS, block_weight.KIND)
SAVED_KINDS = (*FOUR_BIT_KINDS, "bnb.int8", *weight_only.KINDS)  # in our own format
INFERENCE_KINDS = (*SAVED_KINDS, block_weight.KIND)
# The layer whose matrix latent attention takes apart at every token it decodes, a hundredth of a block's weights.
KEPT = ("kv_b_proj",)

BLOCK = 64  # values that share a scale in 4 bits
SCALES_BLOCK = 256  # scales that share a scale, where they are quantised, too
OUTLIER = 6.0  # inputs of at least this size are multiplied in 16 bits (LLM.int8(), section 3.2)
# Values quantised at a time. On a CPU it takes a third of the time if they stay in its cache (measured).
_AT_ONCE = {"cpu": 2**16}
_MANY_AT_ONCE = 2**22


class FourBitWeight(nn.Module):
    """An (out, in) matrix in 4 bits: `codes`, two of them in a byte, and `absmax`, the largest size in each block.

    With `nested`, `absmax` is in 8 bits: around its mean, `offset`, and with scales of its own, `scales`.

    Args:
        shape: (out, in) of the matrix.
        code: What the 16 codes stand for: "nf4" or "fp4".
        nested: Whether the scales are quantised.
        device: Where the tensors are; their values are not initialised.
    """

    def __init__(self, shape: tuple[int, int], code: str, nested: bool, device: torch.device | str) -> None:
        super().__init__()
        self.rows_together = BLOCK // math.gcd(BLOCK, shape[1])  # are whole blocks
        self.shape, self.code, self.nested = torch.Size(shape), code, nested
        blocks = -(-self.shape.numel() // BLOCK)
        self.codes = frozen(-(-self.shape.numel() // 2), torch.uint8, device)
        self.absmax = frozen(blocks, torch.uint8 if nested else torch.float32, device)
        if nested:
            self.scales = frozen(-(-blocks // SCALES_BLOCK), torch.float32, device)
            self.offset = frozen(1, torch.float32, device)

    @torch.no_grad()
    def fill(self, parts: Iterator[Tensor]) -> None:
        """Takes the matrix, in parts of some rows each, of which all but the last are whole blocks."""
        functional = import_bitsandbytes().functional
        byte, block = 0, 0
        absmax = torch.empty(self.absmax.numel(), device=self.absmax.device) if self.nested else self.absmax
        for part in parts:
            codes, state = functional.quantize_4bit(part, blocksize=BLOCK, quant_type=self.code)
            self.codes[byte : byte + codes.numel()] = codes.flatten()
            absmax[block : block + state.absmax.numel()] = state.absmax
            byte, block = byte + codes.numel(), block + state.absmax.numel()
        if self.nested:
            self.offset.copy_(absmax.mean())
            quantised, state = functional.quantize_blockwise(absmax - self.offset, blocksize=SCALES_BLOCK)
            self.absmax.copy_(quantised)
            self.scales.copy_(state.absmax)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """(out, in) the values that the codes stand for."""
        dequantise = import_bitsandbytes().functional.dequantize_4bit
        return dequantise(self.codes.view(-1, 1), self._state(dtype)).view(self.shape)

    def multiply(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the type of x."""
        if not self.has_whole_rows:
            return F.linear(x, self.dequantised(x.dtype))
        return import_bitsandbytes().matmul_4bit(x, self.codes.view(-1, 1), self._state(x.dtype))

    @property
    def has_whole_rows(self) -> bool:
        """Whether no block reaches over the end of a row. Where one does, bitsandbytes (0.50.2) takes wrong scales on
        CPUs, unless it is told that the matrix is a single row."""
        return self.shape[1] % BLOCK == 0

    def _state(self, dtype: torch.dtype) -> Any:
        state = import_bitsandbytes().functional.QuantState
        outer = {}
        if self.nested:
            code = _dynamic_code(self.scales.device)
            outer["state2"] = state(self.scales, code=code, blocksize=SCALES_BLOCK, dtype=torch.float32)
            outer["offset"] = self.offset[0]
        shape = self.shape if self.has_whole_rows else torch.Size([self.shape.numel()])
        return state(self.absmax, shape, blocksize=BLOCK, quant_type=self.code, dtype=dtype, **outer)

    def _apply(self, fn: Callable, recurse: bool = True) -> FourBitWeight:
        return super()._apply(keeping_types(fn), recurse)


class EightBitWeight(nn.Module):
    """An (out, in) matrix in 8 bits: `codes` times `absmax` / 127, the largest size in each row.

    Args:
        shape: (out, in) of the matrix.
        device: Where the tensors are; their values are not initialised.
    """

    rows_together = 1

    def __init__(self, shape: tuple[int, int], device: torch.device | str) -> None:
        super().__init__()
        self.shape = torch.Size(shape)
        self.codes = frozen(shape, torch.int8, device)
        self.absmax = frozen(shape[0], torch.float32, device)

    @torch.no_grad()
    def fill(self, parts: Iterator[Tensor]) -> None:
        """Takes the matrix, in parts of some rows each."""
        row = 0
        for part in parts:
            codes, absmax, _ = import_bitsandbytes().functional.int8_vectorwise_quant(part.half())
            self.codes[row : row + len(codes)] = codes
            self.absmax[row : row + len(codes)] = absmax
            row += len(codes)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """(out, in) the values that the codes stand for."""
        return self.codes.to(dtype) * (self.absmax / 127).to(dtype)[:, None]

    def multiply(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the type of x, which is quantised for it by rows, but for its outliers."""
        library = import_bitsandbytes()
        state = library.MatmulLtState()
        state.has_fp16_weights, state.is_training = False, False
        state.CB, state.SCB = self.codes, self.absmax
        return library.matmul(x, self.codes, state=state, threshold=OUTLIER)

    def _apply(self, fn: Callable, recurse: bool = True) -> EightBitWeight:
        return super()._apply(keeping_types(fn), recurse)


QuantizedWeight = FourBitWeight | EightBitWeight | weight_only.Int4Weight | weight_only.Int8Weight | BlockWeight


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is `quantized` and gets no gradient; gradients pass through to the input.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        bias: Whether there is a bias, which is not quantised.
        kind: One of TRAINING_KINDS and INFERENCE_KINDS.
        dtype: Type of the bias, and of the weight where it is asked for as such. Products are in the input's type.
        device: Where the tensors are; their values are not initialised.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        kind: str,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype, self.kind = in_features, out_features, dtype, kind
        self.quantized = _quantized_weight((out_features, in_features), kind, dtype, device)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = _FrozenProduct.apply(x, self.quantized)
        return y if self.bias is None else y + self.bias

    def load_weight(self, weight: Tensor, done: Callable[[Tensor], None] = lambda part: None) -> None:
        """Quantises a weight, a few megabytes of it at a time.

        Args:
            weight: (out, in), in any type and on any device.
            done: Called with each part of the weight that has been used.
        """
        self.quantized.fill(self._parts(weight, done))

    def _parts(self, weight: Tensor, done: Callable[[Tensor], None]) -> Iterator[Tensor]:
        """Some rows of a weight at a time, where the quantised one is, in a type that its library knows."""
        device = next(self.quantized.parameters(), weight).device
        dtype = weight.dtype if weight.dtype in (torch.float16, torch.bfloat16) else torch.float32
        together = self.quantized.rows_together
        rows = _AT_ONCE.get(device.type, _MANY_AT_ONCE) // self.in_features // together * together
        for part in weight.split(rows or together):
            yield part.to(device, dtype)
            done(part)

    def weight_shape(self) -> Tensor:
        """A tensor like the weight before it is quantised, without memory."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")

    def plain_weight(self) -> Tensor:
        """(out, in) the weight, de-quantised."""
        return self.quantized.dequantised(self.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable, recurse: bool = True) -> QuantizedLinear:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)


def _quantized_weight(
    shape: tuple[int, int], kind: str, dtype: torch.dtype, device: torch.device | str
) -> QuantizedWeight:
    if kind == block_weight.KIND:
        return BlockWeight(shape, dtype)
    if kind in weight_only.KINDS:
        return (weight_only.Int4Weight if kind == "int4" else weight_only.Int8Weight)(shape, dtype, device)
    if kind not in FOUR_BIT_KINDS:
        return EightBitWeight(shape, device)
    code, _, nested = kind.removeprefix("bnb.").partition("-")
    return FourBitWeight(shape, code, nested == "dq", device)


class _FrozenProduct(torch.autograd.Function):
    """x W^T. For the backward pass nothing but W is needed, and W is there: no activation is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedWeight) -> Tensor:
        ctx.weight = weight
        return weight.multiply(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad_output,) = grad_outputs
        return grad_output @ ctx.weight.dequantised(grad_output.dtype), None


def replace_linears(model: GPT, kind: str, dtype: torch.dtype) -> None:
    """Puts a `QuantizedLinear` in the place of every linear layer of the blocks: attention, MLPs and experts.

    Embedding, norms and routers stay, and what of latent attention is taken apart for decoding; the head, too, unless
    the kind is for CPUs. The blocks of GGUF files are the embedding's, too, and a tied head shares them. The layers of
    a model on the meta device get their weights by `load_weight`; others keep theirs, quantised.

    Args:
        model: The model; nothing of it may need gradients that reach the quantised weights.
        kind: One of TRAINING_KINDS and INFERENCE_KINDS.
        dtype: The type that the model computes in.

    Raises:
        ValueError: There is no such kind; or bitsandbytes, which quantises weights that are there, is not installed.
    """
    if kind not in (*TRAINING_KINDS, *INFERENCE_KINDS):
        kinds = ", ".join((*TRAINING_KINDS, "bnb.int8", *FOR_CPUS))
        raise ValueError(f"quantize={kind} is unknown. Choose one of: {kinds}.")
    with_head = kind in FOR_CPUS
    chosen = [(name, m) for name, m in model.named_modules() if is_replaced(m, name, with_head)]
    for name, linear in chosen:
        has_bias = linear.bias is not None
        sizes = linear.in_features, linear.out_features
        # The head costs more than any other layer if it is wrong: with int4 it is in 8 bits (measured, `weight_only`).
        of_layer = "int8" if name == "lm_head" and kind in weight_only.KINDS else kind
        layer = QuantizedLinear(*sizes, has_bias, of_layer, dtype, linear.weight.device)
        if not linear.weight.is_meta:
            layer.load_weight(linear.weight.detach())
            if layer.bias is not None:
                layer.bias.data.copy_(linear.bias)
        replace_module(model, name, layer)
    if kind == block_weight.KIND:
        _replace_embedding(model, dtype)


def _replace_embedding(model: GPT, dtype: torch.dtype) -> None:
    table = model.transformer.wte.weight
    num_embeddings, width = table.shape
    embedding = BlockEmbedding(num_embeddings, width, dtype)
    if not table.is_meta:
        embedding.load_weight(table.detach())
    replace_module(model, "transformer.wte", embedding)
    if model.config.tie_embeddings:
        model.lm_head.quantized = embedding.quantized


def is_replaced(module: nn.Module, name: str, with_head: bool = False) -> TypeGuard[nn.Linear]:
    """Whether `replace_linears` replaces this module of a GPT. A router is not a plain linear layer."""
    chosen = name.startswith("transformer.h.") and not name.endswith(KEPT)
    return type(module) is nn.Linear and (chosen or (with_head and name == "lm_head"))


def is_quantized(name: str) -> bool:
    """Whether the parameter of that name is a part of a quantised weight."""
    return ".quantized." in name


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear | BlockEmbedding]]:
    """The quantised layers, and the embedding where it is quantised, and their names."""
    kinds = (QuantizedLinear, BlockEmbedding)
    return ((name, module) for name, module in model.named_modules() if isinstance(module, kinds))


def quantized_linears(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """The quantised linear layers and their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLinear))


def kind_of(model: nn.Module) -> str | None:
    """How a model's layers are quantised; None if none is."""
    kinds = {layer.kind for _, layer in quantized_layers(model)}
    return "int4" if "int4" in kinds else next(iter(kinds), None)  # the head of such a model is in int8


def same_form(one: str, other: str) -> bool:
    """Whether two kinds store weights alike, as that for training and that for inference do."""
    return one.removesuffix("-training") == other.removesuffix("-training")


def num_parameters(model: GPT, trainable_only: bool = False) -> int:
    """Number of parameters as if nothing were quantised: not the bytes and scales of which quantised ones consist."""
    count = model.num_parameters(trainable_only)
    if trainable_only:
        return count
    for weight in {layer.quantized: None for _, layer in quantized_layers(model)}:  # a tied one counts once
        count += weight.shape.numel() - sum(p.numel() for p in weight.parameters())
    return count


# --- settings --------------------------------------------------------------------------------------------------------


def check_quantize(
    kind: str | None, precision: str, *, training: bool, device: torch.device | str | None = None
) -> None:
    """Refuses what is not supported, before any work starts.

    Args:
        kind: The value of --quantize.
        precision: The precision of the run, such as bf16-true.
        training: Whether the run trains.
        device: Where the model will be.

    Raises:
        ValueError: There is no such kind for this, it does not go with the precision or the device, or bitsandbytes is
            missing.
    """
    if kind is None:
        return
    kinds = TRAINING_KINDS if training else INFERENCE_KINDS
    if kind not in kinds:
        purpose = "training" if training else "inference"
        raise ValueError(f"quantize={kind} is not for {purpose}. Choose one of: {', '.join(kinds)}.")
    if precision != without_mixing(precision) or precision.startswith("64"):
        remedy = "32-true" if precision.startswith("64") else without_mixing(precision)
        raise ValueError(
            f"precision={precision} cannot be combined with quantize={kind}, whose products are in the type of the "
            f"other weights. Use precision={remedy}."
        )
    if kind not in FOR_CPUS:
        import_bitsandbytes()
    elif device is not None and torch.device(device).type != "cpu":
        remedy = "bnb.int8" if kind == "int8" else "bnb.nf4"
        raise ValueError(f"quantize={kind} is for CPUs, and the model goes to {device}. Use quantize={remedy}.")


def without_mixing(precision: str) -> str:
    """The precision that computes in the same type with weights of that type: bf16-mixed -> bf16-true."""
    return precision.replace("-mixed", "-true")


# --- bitsandbytes ----------------------------------------------------------------------------------------------------


_library: ModuleType | None = None  # no cached function: torch.compile looks into those


def import_bitsandbytes() -> ModuleType:
    """The library, without what importing it would do besides.

    It would set up torch's compiler for functions that no kernel of ours needs (8 s and 130 MB, measured with 0.50),
    and run machine code from the Hub where the package `kernels` is installed; where it is not, it advises to.

    Raises:
        ValueError: It is not installed, or does not work here; says what to do.
    """
    global _library
    if _library is None:
        _library = _import_quietly()
    return _library


def _import_quietly() -> ModuleType:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    compiler, kernels = torch.compile, sys.modules.get("kernels")
    # Whatever the names are declared as: for as long as the import takes, and None is a module not to be imported.
    names: dict[str, Any] = vars(torch)
    modules: dict[str, Any] = sys.modules
    names["compile"], modules["kernels"] = _not_compiled, None
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(
            f"Quantised weights and 8-bit optimizers need bitsandbytes, which cannot be imported here ({error}). "
            "Install it with `pip install 'bitsandbytes>=0.50'`."
        ) from error
    finally:
        torch.compile = compiler
        modules.pop("kernels") if kernels is None else modules.update(kernels=kernels)
    return bitsandbytes


def _not_compiled(function: Callable | None = None, **options: Any) -> Callable:
    return _not_compiled if function is None else function


_dynamic_codes: dict[torch.device, Tensor] = {}


def _dynamic_code(device: torch.device) -> Tensor:
    """(256,) what the 8 bits of a quantised scale stand for (https://arxiv.org/abs/1511.04561)."""
    if device not in _dynamic_codes:
        with torch.inference_mode(False):
            _dynamic_codes[device] = import_bitsandbytes().functional.create_dynamic_map().to(device)
    return _dynamic_codes[device]
