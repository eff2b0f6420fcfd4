"""Linear layers and attention for a few rows of one token each, as C++ (skinny_gemm.h) within the compiled decode step.

With one token at a time a linear layer only reads its weight, and is as quick as the memory is. The kernels that torch
has for it get half of that: they prepare themselves at every call, or want a copy of the weight in another order. These
read the weight where it lies, row after row, and fetch what comes next early; from a handful of rows on in tiles (AMX),
where the CPU has them. Attention reads what its row sees, not what the longest does. Sums are in float32.

Microseconds for a (1536, 576) matrix out of memory, 2 threads, on a CPU with AMX; left here, right by torch, from large
pages both:

    rows          1           2           4           8
    bfloat16   55  106     61  166     65  172    107  170
    int8       34   84     40   82     53  103     95  172
    int4       27   46     32   53     45   70     83  122

On Zen 4, without AMX, in bfloat16: 57 and 164 with 8 rows, 165 and 256 with 32.

They are for x86 CPUs with AVX-512; elsewhere the compiled step has torch's.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.kv_cache import AttentionPlan
from litgpt.model import CausalSelfAttention
from litgpt.quantization.layers import KEPT
from litgpt.quantization.weight_only import GROUP, Int4Weight, Int8Weight

VALUES = {torch.bfloat16: "bf16", torch.float32: "float"}  # types of inputs, and their names in C++
# Up to this many rows these are the quicker ones (measured, see the benchmarks).
FEW = {"linear": 8, "pairs": 32, "int8": 16, "int4": 16}
TILED = range(5, 33)  # rows for which CPUs with AMX multiply tiles
FEW_TOKENS = 96  # of prompts; for more, torch's linear layer is the quicker one

CODE = Path(__file__).with_suffix(".h")
LINEAR = """
AOTITorchError aoti_torch_cpu_skinny_linear(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* y) {
  return skinny_gemm::start(x, weight, nullptr, y);
}
"""
LINEAR_INT8 = """
AOTITorchError aoti_torch_cpu_skinny_linear_int8(
    AtenTensorHandle x, AtenTensorHandle codes, AtenTensorHandle scales, AtenTensorHandle* y) {
  return skinny_gemm::start(x, codes, scales, y);
}
"""
LINEAR_INT4 = """
AOTITorchError aoti_torch_cpu_skinny_linear_int4(
    AtenTensorHandle x, AtenTensorHandle codes, AtenTensorHandle scales, AtenTensorHandle* y) {
  return skinny_gemm::start_int4(x, codes, scales, y);
}
"""
ATTEND = """
AOTITorchError aoti_torch_cpu_decode_attention(AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v,
                                               AtenTensorHandle mask, double scale, AtenTensorHandle* y) {
  using skinny_gemm::Tensor;
  return skinny_gemm::attend(Tensor(q), Tensor(k), Tensor(v), Tensor(mask), scale, y);
}
"""


# The operators as torch knows them. They are never called: their place is in code that is compiled.


@torch.library.custom_op("litgpt::skinny_linear", mutates_args=())
def skinny_linear(x: Tensor, weight: Tensor) -> Tensor:
    """(B, in), (out, in) -> (B, out)."""
    raise NotImplementedError


@torch.library.custom_op("litgpt::skinny_linear_int8", mutates_args=())
def skinny_linear_int8(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """(B, in), (out, in), (out,) -> (B, out)."""
    raise NotImplementedError


@torch.library.custom_op("litgpt::skinny_linear_int4", mutates_args=())
def skinny_linear_int4(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """(B, padded in), (blocks, padded in, half), (groups, padded out, 2) -> (B, padded out)."""
    raise NotImplementedError


@torch.library.custom_op("litgpt::decode_attention", mutates_args=())
def decode_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """q (B, H, D), k and v (B, S, G, D), of which the last dimension is dense, mask (B, S) -> (B, H, D)."""
    raise NotImplementedError


@skinny_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.size(0), weight.size(0))


@skinny_linear_int8.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return x.new_empty(x.size(0), codes.size(0))


@skinny_linear_int4.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return x.new_empty(x.size(0), scales.size(1))


@decode_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


class PaddedEmbedding(nn.Embedding):
    """The embedding in the compiled step. What is not a token (-1), since its row has no request, is zero: the layers
    after it have nothing to multiply there."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, T) token ids -> (B, T, C)."""
        return super().forward(input.clamp(min=0)).masked_fill(input[..., None] < 0, 0)


class SkinnyLinear(nn.Linear):
    """A linear layer in the compiled step, with the model's weight."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = torch.ops.litgpt.skinny_linear(input.reshape(-1, self.in_features).contiguous(), self.weight)
        y = y.view(*input.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class SkinnyInt8(Int8Weight):
    """An int8 matrix in the compiled step."""

    def multiply(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        flat = x.reshape(-1, self.shape[1]).contiguous()
        y = torch.ops.litgpt.skinny_linear_int8(flat, self.codes, self.scales.to(x.dtype))
        return y.view(*x.shape[:-1], self.shape[0])


class SkinnyInt4(Int4Weight):
    """An int4 matrix in the compiled step."""

    def multiply(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        flat = F.pad(x.reshape(-1, self.shape[1]), (0, -self.shape[1] % GROUP)).contiguous()
        y = torch.ops.litgpt.skinny_linear_int4(flat, self.codes, self.scales.to(x.dtype))
        return y[:, : self.shape[0]].view(*x.shape[:-1], self.shape[0])


class DecodeAttention(CausalSelfAttention):
    """Attention in the compiled step."""

    def attended(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
        """q (B, 1, H, D), k and v (B, S, G, D) -> (B, 1, H, D)."""
        if k.dtype != q.dtype:
            k, v = k.to(q.dtype), v.to(q.dtype)
        # The mask is no copy, so that all layers have the same.
        return torch.ops.litgpt.decode_attention(q[:, 0].contiguous(), k, v, plan.mask[:, 0, 0], self.scale)[:, None]


def has_tiles() -> bool:
    """Whether the CPU multiplies tiles of bfloat16 (AMX); asks the system to let this process use them."""
    return torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()


def use(model: nn.Module, rows: int, dtype: torch.dtype) -> dict[torch._ops.OpOverload, list[str]]:
    """Has a model that is to be compiled use these kernels where they are the quicker ones.

    Args:
        model: The model; its layers change their class, not their weights.
        rows: How many rows the step has.
        dtype: The type that the model computes in.

    Returns:
        What AOTInductor is to write into the code for the operators (`custom_ops_to_c_shims`).
    """
    if not _has_kernels(dtype):
        return {}
    tiled = dtype == torch.bfloat16 and rows in TILED and has_tiles()
    few = FEW["pairs" if _has_pairs(dtype) else "linear"]
    for name, module in model.named_modules():
        if name.endswith(KEPT):  # its matrix is taken apart
            continue
        if type(module) is nn.Embedding:
            module.__class__ = PaddedEmbedding
        elif type(module) is CausalSelfAttention and _suits(module):
            module.__class__ = DecodeAttention
        elif type(module) is nn.Linear and (rows <= few or (tiled and _fills_tiles(module))):
            module.__class__ = SkinnyLinear
        elif type(module) is Int8Weight and (rows <= FEW["int8"] or module.shape[1] % 16):  # torch's reads over the end
            module.__class__ = SkinnyInt8
        elif (
            type(module) is Int4Weight
            and rows <= FEW["int4"]
            and module.codes.size(2) % 16 == 0
            and not module.neighbours
        ):
            module.__class__ = SkinnyInt4
    constants = {"MOST_ROWS": rows}
    if tiled:
        constants["TILED_FROM"] = TILED.start
    attention = next((module for module in model.modules() if isinstance(module, DecodeAttention)), None)
    if attention is not None:
        constants["HEAD_SIZE"] = attention.head_size
        constants["HEADS"] = attention.sizes[0] // attention.sizes[1]  # that share keys
    return _written(dtype, constants)


def use_for_prefill(model: nn.Module, dtype: torch.dtype) -> dict[torch._ops.OpOverload, list[str]]:
    """As `use`, for prefill, of any number of tokens: linear layers of a few.

    torch's prepares the weight anew at each call, which for few tokens takes longer than the product. With AMX that
    product is too quick for the kernels here.
    """
    if not _has_kernels(dtype) or not _has_pairs(dtype) or has_tiles():
        return {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not name.endswith(KEPT):
            module.__class__ = SkinnyLinear
    return _written(dtype, {"MOST_ROWS": FEW_TOKENS, "TORCHS_FROM": FEW_TOKENS + 1})


def _has_kernels(dtype: torch.dtype) -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and dtype in VALUES


def _has_pairs(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies pairs of values."""
    return dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()


def _written(dtype: torch.dtype, constants: dict[str, int]) -> dict[torch._ops.OpOverload, list[str]]:
    """The C++ of the operators, with its constants."""
    usual = {"HEAD_SIZE": 16, "HEADS": 1, "GROUP": GROUP, "THREADS": torch.get_num_threads(), "VALUE": VALUES[dtype]}
    defines = "".join(f"#define {name} {value}\n" for name, value in (usual | constants).items())
    return {  # `extern` is put before each piece
        torch.ops.litgpt.skinny_linear.default: [f'"C++" {{\n{defines}{CODE.read_text()}}}', LINEAR],
        torch.ops.litgpt.skinny_linear_int8.default: [LINEAR_INT8],
        torch.ops.litgpt.skinny_linear_int4.default: [LINEAR_INT4],
        torch.ops.litgpt.decode_attention.default: [ATTEND],
    }


def _fills_tiles(linear: nn.Linear) -> bool:
    return linear.in_features % 32 == 0 and linear.out_features % 32 == 0


def _suits(attention: CausalSelfAttention) -> bool:
    """Whether the kernel can do what a layer wants."""
    return attention.softcap is None and attention.sinks is None and attention.head_size % 16 == 0
