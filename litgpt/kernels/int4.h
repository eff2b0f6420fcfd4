// Products with weights in 4 bits: value = (code - 8) * scale + middle, those two of its group of 32 in a row.
//
// Codes lie in blocks of 16 rows, of which each has its lanes: for each group 4 times 64 bytes, of which byte 4 r + i holds
// in its lower half the code of row r and input 8 j + i, in its upper half that of input 8 j + 4 + i, j being which of the
// four it is. Scales lie as (blocks, groups, 2, 16): of a group the scales of the 16 rows, then their middles.
//
// Inputs are 16-bit numbers with a scale for each group, 256 * upper + lower in two bytes: two integer products per code
// are quicker than one of floats, and rounding to 16 bits is finer than float32 sums of a few thousand values are.
#pragma once
#include <cmath>
#include "vectors.h"

namespace litgpt {

constexpr int GROUP = 32, BLOCK_ROWS = 16, BLOCK_BYTES = GROUP * BLOCK_ROWS / 2;

struct GroupInputs {
  int8_t upper[GROUP], lower[GROUP];
  float scale, sum;  // the sum is that of the 16-bit numbers
};

// One row of inputs; beyond `in` there are zeros. A group with a number that is not finite has no finite scale.
inline void quantise_inputs(const float* x, long in, GroupInputs* y) {
  for (long g = 0; g * GROUP < in; ++g) {
    const long count = in - g * GROUP < GROUP ? in - g * GROUP : GROUP;
    alignas(64) float values[GROUP] = {};
    std::memcpy(values, x + g * GROUP, count * sizeof(float));
    Floats most = Floats{}, none = Floats{};
    for (int i = 0; i < GROUP; i += LANES) {
      const Floats v = load(values + i);
      most = max(most, max(v, -v));
      none += v * 0;
    }
    const float size = largest(most), nothing = sum(none);
    constexpr float LARGEST = 32512;  // 127 * 256, so that the upper byte stays below 128 when the lower one is rounded
    const float factor = size > 0 && nothing == 0 ? LARGEST / size : 0;
    int32_t total = 0;
    for (int i = 0; i < GROUP; ++i) {
      const int32_t code = int32_t(values[i] * factor + (values[i] < 0 ? -0.5f : 0.5f)) * (factor != 0);
      const int32_t upper = (code + 128) >> 8;
      y[g].upper[i] = int8_t(upper);
      y[g].lower[i] = int8_t(code - upper * 256);
      total += code;
    }
    y[g].scale = size / LARGEST + nothing;
    y[g].sum = float(total);
  }
}

// A block of 16 rows of the weight with INPUTS rows: y[input * stride + row].
template <int INPUTS, class S>
INLINE void dot_int4(const GroupInputs* x, const uint8_t* codes, const S* scales, long groups, float* y, long stride) {
  constexpr int PARTS = BLOCK_ROWS / LANES;
  Floats sums[INPUTS][PARTS];
  UNROLLED for (int b = 0; b < INPUTS; ++b) UNROLLED for (int p = 0; p < PARTS; ++p) sums[b][p] = Floats{};
  for (long g = 0; g < groups; ++g, codes += BLOCK_BYTES, scales += 2 * BLOCK_ROWS) {
    fetch<BLOCK_BYTES>((const char*)codes + AHEAD);
    fetch<2 * BLOCK_ROWS * sizeof(S)>((const char*)scales + AHEAD / 4);
    UNROLLED for (int p = 0; p < PARTS; ++p) {
      Sums upper[INPUTS], lower[INPUTS];
      UNROLLED for (int b = 0; b < INPUTS; ++b) upper[b] = lower[b] = Sums{};
      UNROLLED for (int j = 0; j < 4; ++j) {
        const Bytes both = load_as<Bytes>(codes + 64 * j + 4 * LANES * p);
        const Bytes first = lower_half(both), second = upper_half(both);
        UNROLLED for (int b = 0; b < INPUTS; ++b) {
          const GroupInputs& inputs = x[b * groups + g];
          upper[b] = dot4(dot4(upper[b], first, all_four(inputs.upper + 8 * j)), second, all_four(inputs.upper + 8 * j + 4));
          lower[b] = dot4(dot4(lower[b], first, all_four(inputs.lower + 8 * j)), second, all_four(inputs.lower + 8 * j + 4));
        }
      }
      const Floats scale = load(scales + LANES * p), middle = load(scales + BLOCK_ROWS + LANES * p);
      UNROLLED for (int b = 0; b < INPUTS; ++b) {
        const GroupInputs& inputs = x[b * groups + g];
        const Floats product = to_floats((total(upper[b]) << 8) + total(lower[b])) - all(8 * inputs.sum);
        sums[b][p] = fma(product * all(inputs.scale), scale, fma(middle, all(inputs.scale * inputs.sum), sums[b][p]));
      }
    }
  }
  UNROLLED for (int b = 0; b < INPUTS; ++b)
    UNROLLED for (int p = 0; p < PARTS; ++p) store(y + b * stride + p * LANES, sums[b][p]);
}

template <class S>
void int4_all(const GroupInputs* x, long rows, const uint8_t* codes, const S* scales, long in, float* y, long y_stride,
              long first, long end) {  // `first` begins a block; `end` may be within one
  const long groups = (in + GROUP - 1) / GROUP;
  constexpr int MOST = REGISTERS == 32 ? 4 : 2;
  alignas(64) float found[MOST * BLOCK_ROWS];
  for (; first < end; first += BLOCK_ROWS) {
    const uint8_t* block = codes + first / BLOCK_ROWS * groups * BLOCK_BYTES;
    const S* of_block = scales + first / BLOCK_ROWS * groups * 2 * BLOCK_ROWS;
    const long count = end - first < BLOCK_ROWS ? end - first : BLOCK_ROWS;
    for (long b = 0; b < rows;) {
      const GroupInputs* inputs = x + b * groups;
      int done = 1;
      if (rows - b >= MOST) dot_int4<MOST>(inputs, block, of_block, groups, found, BLOCK_ROWS), done = MOST;
      else dot_int4<1>(inputs, block, of_block, groups, found, BLOCK_ROWS);
      for (int i = 0; i < done; ++i) std::memcpy(y + (b + i) * y_stride + first, found + i * BLOCK_ROWS, count * sizeof(float));
      b += done;
    }
  }
}

// Rows of the weight as numbers, (end - first, in).
template <class S, class Y>
void widen_int4(const uint8_t* codes, const S* scales, long in, Y* y, long first, long end) {
  const long groups = (in + GROUP - 1) / GROUP;
  for (long row = first; row < end; ++row) {
    const long block = row / BLOCK_ROWS, r = row % BLOCK_ROWS;
    for (long g = 0; g < groups; ++g) {
      const uint8_t* bytes = codes + (block * groups + g) * BLOCK_BYTES + 4 * r;
      const S* pair = scales + (block * groups + g) * 2 * BLOCK_ROWS + r;
      const float scale = wide(pair[0]), middle = wide(pair[BLOCK_ROWS]);
      float values[GROUP];
      for (int j = 0; j < 4; ++j)
        for (int i = 0; i < 4; ++i) {
          const uint8_t both = bytes[64 * j + i];
          values[8 * j + i] = (float(both & 15) - 8) * scale + middle;
          values[8 * j + 4 + i] = (float(both >> 4) - 8) * scale + middle;
        }
      const long count = in - g * GROUP < GROUP ? in - g * GROUP : GROUP;
      for (long i = 0; i < count; ++i) narrow(values[i], y + (row - first) * in + g * GROUP + i);
    }
  }
}

}  // namespace litgpt
