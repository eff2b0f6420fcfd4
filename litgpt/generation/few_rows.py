"""Linear layers for a few rows of inputs, as C++ within the compiled decode step.

With one token at a time a linear layer only reads its weight, and is as quick as the memory is. The kernels that torch
has for it get half of that: they prepare themselves at every call, or want a copy of the weight in another order. These
read the weight where it lies, row after row, and fetch what comes next early. Sums are in float32.

Microseconds for a (1536, 576) matrix out of memory, 2 threads; left here, right by torch, from large pages both:

    rows          1           2           4           8
    bfloat16   55  106     61  166     65  172    107  170
    int8       34   84     40   82     53  103     95  172
    int4       27   46     32   53     45   70     83  122

They are for x86 CPUs with AVX-512; elsewhere the compiled step has torch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.quantize import KEPT
from litgpt.weight_only import GROUP, Int4Weight, Int8Weight

VALUES = {torch.bfloat16: "bf16", torch.float32: "float"}  # types of inputs, and their names in C++
# Up to so many rows these are the quicker ones (measured, see the benchmarks).
FEW = {"linear": 8, "int8": 16, "int4": 16}

CODE = r"""
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC optimize("O3")  // what is around it, is compiled for the compiler's time
namespace few_rows {
constexpr int LANES = 16, TOGETHER = 4, GROUP = @GROUP@, THREADS = @THREADS@;
constexpr int AHEAD = 8192;  // bytes: how early memory is fetched (measured)

struct bf16 { uint16_t bits; };
inline float wide(float x) { return x; }
inline float wide(int8_t x) { return x; }
inline float wide(bf16 x) { uint32_t bits = uint32_t(x.bits) << 16; float y; __builtin_memcpy(&y, &bits, 4); return y; }
inline __m512 load(const float* p) { return _mm512_loadu_ps(p); }
inline __m512 load(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline __m512 load(const bf16* p) {
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
inline void store(float* p, float x) { *p = x; }
inline void store(bf16* p, float x) {  // rounds to the nearest, ties to even
  uint32_t bits; __builtin_memcpy(&bits, &x, 4);
  p->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The products of COUNT rows of the weight, which lie one after another, with ROWS rows of inputs.
template <int COUNT, int ROWS, class W> inline void dot(const float* x, const W* w, long in, float (*y)[TOGETHER]) {
  __m512 sums[ROWS][COUNT];
  for (int b = 0; b < ROWS; ++b) for (int r = 0; r < COUNT; ++r) sums[b][r] = _mm512_setzero_ps();
  long k = 0;
  for (; k + LANES <= in; k += LANES) {
    __m512 of_row[COUNT];
    for (int r = 0; r < COUNT; ++r) {
      _mm_prefetch((const char*)(w + r * in + k) + AHEAD, _MM_HINT_T0);
      of_row[r] = load(w + r * in + k);
    }
    for (int b = 0; b < ROWS; ++b) {
      const __m512 inputs = load(x + b * in + k);
      for (int r = 0; r < COUNT; ++r) sums[b][r] = _mm512_fmadd_ps(inputs, of_row[r], sums[b][r]);
    }
  }
  for (int b = 0; b < ROWS; ++b)
    for (int r = 0; r < COUNT; ++r) {
      y[b][r] = _mm512_reduce_add_ps(sums[b][r]);
      for (long i = k; i < in; ++i) y[b][r] += x[b * in + i] * wide(w[r * in + i]);
    }
}

template <int ROWS, class X, class W>
inline void linear_rows(const float* x, const W* w, const X* scales, X* y, long first, long out, long in) {
  float sums[ROWS][TOGETHER];
  const long count = out - first < TOGETHER ? out - first : TOGETHER;
  if (count == TOGETHER) dot<TOGETHER, ROWS>(x, w + first * in, in, sums);
  else for (long r = 0; r < count; ++r) {
    float one[ROWS][TOGETHER];
    dot<1, ROWS>(x, w + (first + r) * in, in, one);
    for (int b = 0; b < ROWS; ++b) sums[b][r] = one[b][0];
  }
  for (int b = 0; b < ROWS; ++b)
    for (long r = 0; r < count; ++r)
      store(y + b * out + first + r, scales ? sums[b][r] * wide(scales[first + r]) : sums[b][r]);
}

template <class X, class W> void linear(const X* x, const W* w, const X* scales, X* y, long rows, long out, long in) {
  float* inputs = (float*)__builtin_malloc(rows * in * sizeof(float));
  for (long i = 0; i < rows * in; ++i) inputs[i] = wide(x[i]);
  const long blocks = (out + TOGETHER - 1) / TOGETHER;
#pragma omp parallel for schedule(static)
  for (long thread = 0; thread < THREADS; ++thread)
    for (long block = blocks * thread / THREADS; block < blocks * (thread + 1) / THREADS; ++block)
      for (long b = 0; b < rows;) {
        const long first = block * TOGETHER, left = rows - b;
        const float* some = inputs + b * in;
        if (left >= 4) linear_rows<4>(some, w, scales, y + b * out, first, out, in), b += 4;
        else if (left >= 2) linear_rows<2>(some, w, scales, y + b * out, first, out, in), b += 2;
        else linear_rows<1>(some, w, scales, y + b * out, first, out, in), b += 1;
      }
  __builtin_free(inputs);
}

// Scales and middles of 16 rows of one group, which lie in pairs.
inline void load_pairs(const bf16* p, __m512* scale, __m512* middle) {
  const __m512i both = _mm512_loadu_si512(p);
  *scale = (__m512)_mm512_slli_epi32(both, 16);
  *middle = (__m512)_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000));
}
inline void load_pairs(const float* p, __m512* scale, __m512* middle) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512 low = _mm512_loadu_ps(p), high = _mm512_loadu_ps(p + LANES);
  *scale = _mm512_permutex2var_ps(low, even, high);
  *middle = _mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high);
}

// The products of PIECES times 16 rows whose codes are in the lower halves of the bytes, and of as many in the upper
// ones, with ROWS rows of inputs. `w` are the codes of the first piece, a column of a block being `half` bytes;
// `group_sums` are those of the inputs in each group.
template <int PIECES, int ROWS, class X> inline void dot_int4(
    const float* x, const float* group_sums, const uint8_t* w, const X* scales, X* y, long in, long out, long half) {
  constexpr int PARTS = 2 * PIECES;  // the lower halves of the pieces, then the upper ones
  const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  __m512 sums[ROWS][PARTS];
  for (int b = 0; b < ROWS; ++b) for (int p = 0; p < PARTS; ++p) sums[b][p] = _mm512_setzero_ps();
  for (long g = 0; g < in / GROUP; ++g) {
    __m512 of_group[ROWS][PARTS];
    for (int b = 0; b < ROWS; ++b) for (int p = 0; p < PARTS; ++p) of_group[b][p] = _mm512_setzero_ps();
    for (long k = g * GROUP; k < (g + 1) * GROUP; ++k) {
      const uint8_t* codes = w + k * half;
      _mm_prefetch((const char*)codes + AHEAD, _MM_HINT_T0);
      for (int p = 0; p < PIECES; ++p) {
        const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + p * LANES)));
        const __m512 low = _mm512_permutexvar_ps(both, values);  // looks at the lowest 4 bits
        const __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), values);
        for (int b = 0; b < ROWS; ++b) {
          const __m512 input = _mm512_set1_ps(x[b * in + k]);
          of_group[b][p] = _mm512_fmadd_ps(input, low, of_group[b][p]);
          of_group[b][PIECES + p] = _mm512_fmadd_ps(input, high, of_group[b][PIECES + p]);
        }
      }
    }
    for (int p = 0; p < PARTS; ++p) {
      __m512 scale, middle;
      load_pairs(scales + 2 * (g * out + (p < PIECES ? p * LANES : half + (p - PIECES) * LANES)), &scale, &middle);
      for (int b = 0; b < ROWS; ++b) {
        sums[b][p] = _mm512_fmadd_ps(scale, of_group[b][p], sums[b][p]);
        sums[b][p] = _mm512_fmadd_ps(middle, _mm512_set1_ps(group_sums[b * (in / GROUP) + g]), sums[b][p]);
      }
    }
  }
  for (int b = 0; b < ROWS; ++b)
    for (int p = 0; p < PARTS; ++p) {
      float lanes[LANES];
      _mm512_storeu_ps(lanes, sums[b][p]);
      X* of_part = y + b * out + (p < PIECES ? p * LANES : half + (p - PIECES) * LANES);
      for (int i = 0; i < LANES; ++i) store(of_part + i, lanes[i]);
    }
}

template <int PIECES, class X> inline void rows_int4(
    const float* x, const float* sums, const uint8_t* w, const X* scales, X* y, long rows, long in, long out,
    long half) {
  const long groups = in / GROUP;
  long b = 0;
  for (; b + 4 <= rows; b += 4)
    dot_int4<PIECES, 4>(x + b * in, sums + b * groups, w, scales, y + b * out, in, out, half);
  for (; b + 2 <= rows; b += 2)
    dot_int4<PIECES, 2>(x + b * in, sums + b * groups, w, scales, y + b * out, in, out, half);
  for (; b < rows; ++b) dot_int4<PIECES, 1>(x + b * in, sums + b * groups, w, scales, y + b * out, in, out, half);
}

template <class X> void linear_int4(
    const X* x, const uint8_t* w, const X* scales, X* y, long rows, long out, long in, long half) {
  float* inputs = (float*)__builtin_malloc(rows * (in + in / GROUP) * sizeof(float));
  float* sums = inputs + rows * in;
  for (long i = 0; i < rows * in; ++i) inputs[i] = wide(x[i]);
  for (long g = 0; g < rows * in / GROUP; ++g) {
    sums[g] = 0;
    for (long k = 0; k < GROUP; ++k) sums[g] += inputs[g * GROUP + k];
  }
  const long in_block = half / LANES, pieces = out / (2 * LANES);
#pragma omp parallel for schedule(static)
  for (long thread = 0; thread < THREADS; ++thread) {
    const long end = pieces * (thread + 1) / THREADS;
    for (long piece = pieces * thread / THREADS; piece < end;) {
      const long block = piece / in_block, inner = piece % in_block * LANES, first = block * 2 * half + inner;
      const uint8_t* codes = w + block * in * half + inner;
      if (in_block == 2 && inner == 0 && piece + 1 < end)
        rows_int4<2>(inputs, sums, codes, scales + 2 * first, y + first, rows, in, out, half), piece += 2;
      else
        rows_int4<1>(inputs, sums, codes, scales + 2 * first, y + first, rows, in, out, half), piece += 1;
    }
  }
  __builtin_free(inputs);
}

struct Tensor {
  void* data; const int64_t* sizes; int64_t dim; int32_t dtype;
  explicit Tensor(AtenTensorHandle handle) {
    aoti_torch_get_data_ptr(handle, &data); int64_t* s; aoti_torch_get_sizes(handle, &s); sizes = s;
    aoti_torch_get_dim(handle, &dim); aoti_torch_get_dtype(handle, &dtype);
  }
};

inline AtenTensorHandle empty(int64_t rows, int64_t out, int32_t dtype) {
  const int64_t sizes[] = {rows, out}, strides[] = {out, 1};
  AtenTensorHandle made;
  aoti_torch_empty_strided(2, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &made);
  return made;
}

template <class X> AOTITorchError run_int4(Tensor x, Tensor codes, Tensor scales, AtenTensorHandle y) {
  linear_int4((const X*)x.data, (const uint8_t*)codes.data, (const X*)scales.data, (X*)Tensor(y).data, x.sizes[0],
              scales.sizes[1], x.sizes[1], codes.sizes[2]);
  return AOTI_TORCH_SUCCESS;
}

inline AOTITorchError start_int4(
    AtenTensorHandle x, AtenTensorHandle codes, AtenTensorHandle scales, AtenTensorHandle* y) {
  Tensor inputs(x), pairs(scales);
  *y = empty(inputs.sizes[0], pairs.sizes[1], inputs.dtype);
  return run_int4<@VALUE@>(inputs, Tensor(codes), pairs, *y);
}

template <class X> AOTITorchError run(Tensor x, Tensor w, const X* scales, AtenTensorHandle y) {
  X* result = (X*)Tensor(y).data;
  const long rows = x.sizes[0], in = x.sizes[1], out = w.sizes[0];
  if (scales) linear((const X*)x.data, (const int8_t*)w.data, scales, result, rows, out, in);
  else linear((const X*)x.data, (const X*)w.data, scales, result, rows, out, in);
  return AOTI_TORCH_SUCCESS;
}

inline AOTITorchError start(AtenTensorHandle x, AtenTensorHandle w, AtenTensorHandle scales, AtenTensorHandle* y) {
  Tensor inputs(x), weight(w);
  *y = empty(inputs.sizes[0], weight.sizes[0], inputs.dtype);
  const void* of_rows = scales ? Tensor(scales).data : nullptr;
  return run(inputs, weight, (const @VALUE@*)of_rows, *y);
}
}  // namespace few_rows
#pragma GCC pop_options
"""
LINEAR = """
AOTITorchError aoti_torch_cpu_linear_few(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* y) {
  return few_rows::start(x, weight, nullptr, y);
}
"""
LINEAR_INT8 = """
AOTITorchError aoti_torch_cpu_linear_few_int8(
    AtenTensorHandle x, AtenTensorHandle codes, AtenTensorHandle scales, AtenTensorHandle* y) {
  return few_rows::start(x, codes, scales, y);
}
"""


LINEAR_INT4 = """
AOTITorchError aoti_torch_cpu_linear_few_int4(
    AtenTensorHandle x, AtenTensorHandle codes, AtenTensorHandle scales, AtenTensorHandle* y) {
  return few_rows::start_int4(x, codes, scales, y);
}
"""


# The operators as torch knows them. They are never called: their place is in code that is compiled.


@torch.library.custom_op("litgpt::linear_few", mutates_args=())
def linear_few(x: Tensor, weight: Tensor) -> Tensor:
    """(B, in), (out, in) -> (B, out)."""
    raise NotImplementedError


@torch.library.custom_op("litgpt::linear_few_int8", mutates_args=())
def linear_few_int8(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """(B, in), (out, in), (out,) -> (B, out)."""
    raise NotImplementedError


@torch.library.custom_op("litgpt::linear_few_int4", mutates_args=())
def linear_few_int4(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """(B, padded in), (blocks, padded in, half), (groups, padded out, 2) -> (B, padded out)."""
    raise NotImplementedError


@linear_few.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.size(0), weight.size(0))


@linear_few_int8.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return x.new_empty(x.size(0), codes.size(0))


@linear_few_int4.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return x.new_empty(x.size(0), scales.size(1))


class FewRowsLinear(nn.Linear):
    """A linear layer in the compiled step, with the model's weight."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = torch.ops.litgpt.linear_few(x.reshape(-1, self.in_features).contiguous(), self.weight)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class FewRowsInt8(Int8Weight):
    """An int8 matrix in the compiled step."""

    def multiply(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        flat = x.reshape(-1, self.shape[1]).contiguous()
        y = torch.ops.litgpt.linear_few_int8(flat, self.codes, self.scales.to(x.dtype))
        return y.view(*x.shape[:-1], self.shape[0])


class FewRowsInt4(Int4Weight):
    """An int4 matrix in the compiled step."""

    def multiply(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        flat = F.pad(x.reshape(-1, self.shape[1]), (0, -self.shape[1] % GROUP)).contiguous()
        y = torch.ops.litgpt.linear_few_int4(flat, self.codes, self.scales.to(x.dtype))
        return y[:, : self.shape[0]].view(*x.shape[:-1], self.shape[0])


def use(model: nn.Module, rows: int, dtype: torch.dtype) -> dict[torch._ops.OpOverload, list[str]]:
    """Has a model that is to be compiled use these kernels where they are the quicker ones.

    Args:
        model: The model; its layers change their class, not their weights.
        rows: How many rows the step has.
        dtype: The type that the model computes in.

    Returns:
        What AOTInductor is to write into the code for the operators (`custom_ops_to_c_shims`).
    """
    known = torch.backends.cpu.get_cpu_capability() == "AVX512" and dtype in VALUES
    if not known or rows > max(FEW.values()):
        return {}
    for name, module in model.named_modules():
        if name.endswith(KEPT):  # its matrix is taken apart
            continue
        if type(module) is nn.Linear and rows <= FEW["linear"]:
            module.__class__ = FewRowsLinear
        elif type(module) is Int8Weight and rows <= FEW["int8"]:
            module.__class__ = FewRowsInt8
        elif type(module) is Int4Weight and rows <= FEW["int4"] and module.codes.size(2) % 16 == 0:
            module.__class__ = FewRowsInt4
    constants = {"GROUP": GROUP, "THREADS": torch.get_num_threads(), "VALUE": VALUES[dtype]}
    code = CODE
    for name, value in constants.items():
        code = code.replace(f"@{name}@", str(value))
    return {  # `extern` is put before each piece
        torch.ops.litgpt.linear_few.default: [f'"C++" {{{code}}}', LINEAR],
        torch.ops.litgpt.linear_few_int8.default: [LINEAR_INT8],
        torch.ops.litgpt.linear_few_int4.default: [LINEAR_INT4],
    }
