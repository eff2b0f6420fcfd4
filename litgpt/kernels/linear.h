// Products of some rows of inputs with the rows of a weight, (rows, in) x (out, in) -> (rows, out). With few rows a layer
// only reads its weight, and is as quick as the memory is: it is read where it lies, once, and fetched early.
#pragma once
#include "vectors.h"

namespace litgpt {

// How many rows of the weight are multiplied together with so many of inputs: as the registers allow.
constexpr int together(int inputs) {
  return REGISTERS == 32 ? (inputs <= 2 ? 8 : 4) : inputs == 1 ? 8 : inputs == 2 ? 4 : 2;
}

// The products of COUNT rows of the weight, which lie one after another, with INPUTS rows: y[input * COUNT + row].
template <int COUNT, int INPUTS, class W>
INLINE void dot(const float* x, long stride, const W* w, long in, float* y) {
  Floats sums[INPUTS][COUNT];
  UNROLLED for (int b = 0; b < INPUTS; ++b) UNROLLED for (int r = 0; r < COUNT; ++r) sums[b][r] = Floats{};
  const char* next = (const char*)(w + COUNT * in) + AHEAD;
  long k = 0;
  for (; k + LANES <= in; k += LANES) {
    Floats row[COUNT];
    UNROLLED for (int r = 0; r < COUNT; ++r) row[r] = load(w + r * in + k);
    fetch<COUNT * LANES * sizeof(W)>(next + k * COUNT * sizeof(W));
    UNROLLED for (int b = 0; b < INPUTS; ++b) {
      const Floats inputs = load(x + b * stride + k);
      UNROLLED for (int r = 0; r < COUNT; ++r) sums[b][r] = fma(inputs, row[r], sums[b][r]);
    }
  }
  UNROLLED for (int b = 0; b < INPUTS; ++b) {
    if (COUNT % 4 == 0) UNROLLED for (int r = 0; r < COUNT; r += 4) store_as(y + b * COUNT + r, sums_of_4(sums[b] + r));
    else UNROLLED for (int r = 0; r < COUNT; ++r) y[b * COUNT + r] = sum(sums[b][r]);
    for (long i = k; i < in; ++i)
      for (int r = 0; r < COUNT; ++r) y[b * COUNT + r] += x[b * stride + i] * wide(w[r * in + i]);
  }
}

// The same for any number of rows, `first` to `end` of the weight: y[input * y_stride + row].
template <int COUNT, int INPUTS, class W>
INLINE void dot_rows(const float* x, long x_stride, const W* w, long in, float* y, long y_stride, long first, long end) {
  float sums[INPUTS * COUNT];
  for (; first + COUNT <= end; first += COUNT) {
    dot<COUNT, INPUTS>(x, x_stride, w + first * in, in, sums);
    for (int b = 0; b < INPUTS; ++b) std::memcpy(y + b * y_stride + first, sums + b * COUNT, COUNT * sizeof(float));
  }
  for (; first < end; ++first) {
    dot<1, INPUTS>(x, x_stride, w + first * in, in, sums);
    for (int b = 0; b < INPUTS; ++b) y[b * y_stride + first] = sums[b];
  }
}

template <class W>
void dot_all(const float* x, long rows, long x_stride, const W* w, long in, float* y, long y_stride, long first, long end) {
  if (rows == 1) return dot_rows<together(1), 1>(x, x_stride, w, in, y, y_stride, first, end);
  if (rows == 2) return dot_rows<together(2), 2>(x, x_stride, w, in, y, y_stride, first, end);
  // All inputs for some rows of the weight before the next: those rows are in the nearest cache then.
  constexpr int COUNT = together(4), BLOCK = 16;
  static_assert(BLOCK % COUNT == 0);
  for (; first < end; first += BLOCK) {
    const long last = first + BLOCK < end ? first + BLOCK : end;
    long b = 0;
    for (; b + 4 <= rows; b += 4) dot_rows<COUNT, 4>(x + b * x_stride, x_stride, w, in, y + b * y_stride, y_stride, first, last);
    for (; b < rows; ++b) dot_rows<COUNT, 1>(x + b * x_stride, x_stride, w, in, y + b * y_stride, y_stride, first, last);
  }
}

#ifdef __AVX512BF16__
// Where the CPU multiplies pairs of bfloat16, and adds them up in float32.
template <int COUNT, int INPUTS>
INLINE void dot_pairs(const bf16* x, long stride, const bf16* w, long in, float* y) {
  __m512 sums[INPUTS][COUNT];
  UNROLLED for (int b = 0; b < INPUTS; ++b) UNROLLED for (int r = 0; r < COUNT; ++r) sums[b][r] = _mm512_setzero_ps();
  const char* next = (const char*)(w + COUNT * in) + AHEAD;
  const auto step = [&](long k, __mmask32 some) __attribute__((always_inline)) {
    __m512bh row[COUNT];
    UNROLLED for (int r = 0; r < COUNT; ++r) row[r] = (__m512bh)_mm512_maskz_loadu_epi16(some, w + r * in + k);
    fetch<COUNT * 64>(next + k * COUNT * sizeof(bf16));
    UNROLLED for (int b = 0; b < INPUTS; ++b) {
      const __m512bh inputs = (__m512bh)_mm512_maskz_loadu_epi16(some, x + b * stride + k);
      UNROLLED for (int r = 0; r < COUNT; ++r) sums[b][r] = _mm512_dpbf16_ps(sums[b][r], inputs, row[r]);
    }
  };
  long k = 0;
  for (; k + 32 <= in; k += 32) step(k, ~__mmask32(0));
  if (k < in) step(k, (__mmask32(1) << (in - k)) - 1);
  UNROLLED for (int b = 0; b < INPUTS; ++b)
    if (COUNT % 4 == 0) UNROLLED for (int r = 0; r < COUNT; r += 4) store_as(y + b * COUNT + r, sums_of_4((Floats*)sums[b] + r));
    else UNROLLED for (int r = 0; r < COUNT; ++r) y[b * COUNT + r] = sum((Floats)sums[b][r]);
}
template <int COUNT, int INPUTS>
INLINE void pair_rows(const bf16* x, long x_stride, const bf16* w, long in, float* y, long y_stride, long first, long end) {
  float sums[INPUTS * COUNT];
  for (; first + COUNT <= end; first += COUNT) {
    dot_pairs<COUNT, INPUTS>(x, x_stride, w + first * in, in, sums);
    for (int b = 0; b < INPUTS; ++b) std::memcpy(y + b * y_stride + first, sums + b * COUNT, COUNT * sizeof(float));
  }
  for (; first < end; ++first) {
    dot_pairs<1, INPUTS>(x, x_stride, w + first * in, in, sums);
    for (int b = 0; b < INPUTS; ++b) y[b * y_stride + first] = sums[b];
  }
}
inline void pairs_all(const bf16* x, long rows, long x_stride, const bf16* w, long in, float* y, long y_stride, long first, long end) {
  if (rows == 1) return pair_rows<4, 1>(x, x_stride, w, in, y, y_stride, first, end);
  if (rows == 2) return pair_rows<4, 2>(x, x_stride, w, in, y, y_stride, first, end);
  for (; first < end; first += 16) {
    const long last = first + 16 < end ? first + 16 : end;
    long b = 0;
    for (; b + 4 <= rows; b += 4) pair_rows<4, 4>(x + b * x_stride, x_stride, w, in, y + b * y_stride, y_stride, first, last);
    for (; b < rows; ++b) pair_rows<4, 1>(x + b * x_stride, x_stride, w, in, y + b * y_stride, y_stride, first, last);
  }
}
#endif

}  // namespace litgpt
