// Products with the blocks of GGUF files, as they lie there. What a block stands for is said in
// litgpt/quantization/blocks.py: value = step * code - offset, both of its group of 32 or 16 values.
//
// Inputs are in 8 bits with a scale for each 32, so that a group is an integer product of 32 pairs of bytes; what the offset
// takes away is the offset times the sum of the group's inputs. All is done on vectors of 32 bytes: one group of 32.
#pragma once
#include "vectors.h"

namespace litgpt {

using Codes = uint8_t __attribute__((vector_size(32)));
using Eight = float __attribute__((vector_size(32)));
using EightInts = int32_t __attribute__((vector_size(32)));
using EightBytes = uint8_t __attribute__((vector_size(8)));

constexpr int SPAN = 32;  // inputs that share a scale

// Sums of four products each; codes without a sign and below 64.
INLINE EightInts dot_codes(Codes codes, Codes x) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return (EightInts)_mm256_dpbusd_epi32(__m256i{}, (__m256i)codes, (__m256i)x);
#elif defined(__AVXVNNI__)
  return (EightInts)_mm256_dpbusd_avx_epi32(__m256i{}, (__m256i)codes, (__m256i)x);
#elif defined(__AVX2__)
  return (EightInts)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)codes, (__m256i)x), _mm256_set1_epi16(1));
#else
  EightInts y;
  for (int i = 0; i < 2; ++i) {
    Bytes a, b;
    std::memcpy(&a, (const char*)&codes + 16 * i, 16), std::memcpy(&b, (const char*)&x + 16 * i, 16);
    const Ints part = total(dot4(Sums{}, a, b));
    std::memcpy((char*)&y + 16 * i, &part, 16);
  }
  return y;
#endif
}

// The same, where codes have a sign and eight bits: the sign goes to the inputs.
INLINE EightInts dot_signed(Codes codes, Codes x) {
#if defined(__AVX2__)
  return dot_codes((Codes)_mm256_sign_epi8((__m256i)codes, (__m256i)codes), (Codes)_mm256_sign_epi8((__m256i)x, (__m256i)codes));
#elif defined(__x86_64__)
  Codes a, b;
  for (int i = 0; i < 2; ++i) {
    const __m128i c = load_as<__m128i>((const char*)&codes + 16 * i), v = load_as<__m128i>((const char*)&x + 16 * i);
    store_as((char*)&a + 16 * i, _mm_sign_epi8(c, c)), store_as((char*)&b + 16 * i, _mm_sign_epi8(v, c));
  }
  return dot_codes(a, b);
#else
  return dot_codes(codes, x);  // both have signs there
#endif
}

INLINE Eight floats_of(EightInts x) { return __builtin_convertvector(x, Eight); }
INLINE Eight floats_of(EightBytes x) { return floats_of(__builtin_convertvector(x, EightInts)); }
INLINE float total_of(Eight x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }
INLINE float number(const uint8_t* p) { return wide(load_as<half>(p)); }
INLINE Codes bytes_at(const uint8_t* p) { return load_as<Codes>(p); }
template <int BITS> INLINE Codes shifted(Codes x) {
#if defined(__x86_64__)  // which shifts no bytes: what comes in from a neighbour is masked by whoever calls
  using Words = uint16_t __attribute__((vector_size(32)));
  return bit_cast<Codes>(bit_cast<Words>(x) >> BITS);
#else
  return x >> BITS;
#endif
}
// 16 bytes of two codes each -> 32 codes, the lower halves first.
INLINE Codes nibbles(const uint8_t* p) {
  using Half = uint8_t __attribute__((vector_size(16)));
  using Words = uint16_t __attribute__((vector_size(16)));
  const Half both = load_as<Half>(p), upper = bit_cast<Half>(bit_cast<Words>(both) >> 4);
  return __builtin_shufflevector(both, upper, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22,
                                 23, 24, 25, 26, 27, 28, 29, 30, 31) & 15;
}
// 4 bytes -> 32 codes that are 16 where the bit is set, 0 elsewhere.
INLINE Codes fifth_bits(const uint8_t* p) {
  const uint32_t bits = load_as<uint32_t>(p);
#if defined(__AVX512VL__) && defined(__AVX512BW__)
  return (Codes)_mm256_maskz_set1_epi8(bits, 16);
#else
  // Byte i gets the byte of the bits that it is in, and keeps the one bit.
  using Longs = uint64_t __attribute__((vector_size(32)));
  constexpr uint64_t EACH = 0x0101010101010101;
  const Longs bytes = {(bits & 255) * EACH, (bits >> 8 & 255) * EACH, (bits >> 16 & 255) * EACH, (bits >> 24) * EACH};
  const Codes which = bit_cast<Codes>(Longs{} + 0x8040201008040201);
  return (Codes)((bit_cast<Codes>(bytes) & which) == which) & 16;
#endif
}

// The formats. GROUP values share a step; `steps` and `offsets` are those of the groups of a block, `codes` the j-th 32.

template <int BITS, bool WITH_OFFSET> struct Small {
  static constexpr int VALUES = 32, GROUP = 32, START = WITH_OFFSET ? 4 : 2, BYTES = START + (BITS == 5 ? 4 : 0) + 16;
  static constexpr bool SIGNED = false;
  INLINE static void scales(const uint8_t* p, float* steps, float* offsets) {
    steps[0] = number(p);
    offsets[0] = WITH_OFFSET ? -number(p + 2) : steps[0] * (1 << (BITS - 1));
  }
  template <int J> INLINE static Codes codes(const uint8_t* p) {
    if constexpr (BITS == 5) return nibbles(p + START + 4) | fifth_bits(p + START);
    else return nibbles(p + START);
  }
};

struct Q8_0 {
  static constexpr int VALUES = 32, GROUP = 32, BYTES = 34;
  static constexpr bool SIGNED = true;
  INLINE static void scales(const uint8_t* p, float* steps, float* offsets) { steps[0] = number(p), offsets[0] = 0; }
  template <int J> INLINE static Codes codes(const uint8_t* p) { return bytes_at(p + 2); }
};

struct Q2_K {
  static constexpr int VALUES = 256, GROUP = 16, BYTES = 84;
  static constexpr bool SIGNED = false;
  INLINE static void scales(const uint8_t* p, float* steps, float* offsets) {
    const float scale = number(p + 80), minimum = number(p + 82);
    UNROLLED for (int i = 0; i < 16; i += 8) {
      const EightBytes both = load_as<EightBytes>(p + i);
      store_as(steps + i, floats_of(both & 15) * scale), store_as(offsets + i, floats_of(both >> 4) * minimum);
    }
  }
  template <int J> INLINE static Codes codes(const uint8_t* p) {
    return shifted<2 * (J % 4)>(bytes_at(p + 16 + 32 * (J / 4))) & 3;
  }
};

struct Q3_K {
  static constexpr int VALUES = 256, GROUP = 16, BYTES = 110;
  static constexpr bool SIGNED = false;
  INLINE static void scales(const uint8_t* p, float* steps, float* offsets) {
    const float scale = number(p + 108);
    const uint8_t* packed = p + 96;
    for (int i = 0; i < 16; ++i) {
      const int low = packed[i % 8] >> 4 * (i / 8) & 15, high = packed[8 + i % 4] >> 2 * (i / 4) & 3;
      steps[i] = scale * float((low | high << 4) - 32), offsets[i] = 4 * steps[i];
    }
  }
  template <int J> INLINE static Codes codes(const uint8_t* p) {
    const Codes high = shifted<J>(bytes_at(p)) & 1, low = shifted<2 * (J % 4)>(bytes_at(p + 32 + 32 * (J / 4))) & 3;
    return low | (high + high + high + high);
  }
};

// Eight scales and eight minimums of 6 bits in 12 bytes.
INLINE void six_bits(const uint8_t* p, float* steps, float* offsets) {
  const float scale = number(p), minimum = number(p + 2);
  const uint32_t a = load_as<uint32_t>(p + 4), b = load_as<uint32_t>(p + 8), c = load_as<uint32_t>(p + 12);
  const uint64_t scales = (a & 0x3f3f3f3f) | uint64_t((c & 0x0f0f0f0f) | (a >> 2 & 0x30303030)) << 32;
  const uint64_t minimums = (b & 0x3f3f3f3f) | uint64_t((c >> 4 & 0x0f0f0f0f) | (b >> 2 & 0x30303030)) << 32;
  store_as(steps, floats_of(bit_cast<EightBytes>(scales)) * scale);
  store_as(offsets, floats_of(bit_cast<EightBytes>(minimums)) * minimum);
}

struct Q4_K {
  static constexpr int VALUES = 256, GROUP = 32, BYTES = 144;
  static constexpr bool SIGNED = false;
  INLINE static void scales(const uint8_t* p, float* steps, float* offsets) { six_bits(p, steps, offsets); }
  template <int J> INLINE static Codes codes(const uint8_t* p) {
    return shifted<4 * (J % 2)>(bytes_at(p + 16 + 32 * (J / 2))) & 15;
  }
};

struct Q5_K {
  static constexpr int VALUES = 256, GROUP = 32, BYTES = 176;
  static constexpr bool SIGNED = false;
  INLINE static void scales(const uint8_t* p, float* steps, float* offsets) { six_bits(p, steps, offsets); }
  template <int J> INLINE static Codes codes(const uint8_t* p) {
    const Codes high = J < 4 ? bytes_at(p + 16) << (J < 4 ? 4 - J : 0) : shifted<(J > 4 ? J - 4 : 0)>(bytes_at(p + 16));
    return (shifted<4 * (J % 2)>(bytes_at(p + 48 + 32 * (J / 2))) & 15) | (high & 16);
  }
};

struct Q6_K {
  static constexpr int VALUES = 256, GROUP = 16, BYTES = 210;
  static constexpr bool SIGNED = false;
  INLINE static void scales(const uint8_t* p, float* steps, float* offsets) {
    const float scale = number(p + 208);
    UNROLLED for (int i = 0; i < 16; i += 8) {
      using Signed = int8_t __attribute__((vector_size(8)));
      const Eight some = floats_of(__builtin_convertvector(load_as<Signed>(p + 192 + i), EightInts)) * scale;
      store_as(steps + i, some), store_as(offsets + i, some * 32);
    }
  }
  template <int J> INLINE static Codes codes(const uint8_t* p) {
    const Codes low = shifted<4 * (J / 2 % 2)>(bytes_at(p + 64 * (J / 4) + 32 * (J % 2))) & 15;
    const Codes high = shifted<2 * (J % 4)>(bytes_at(p + 128 + 32 * (J / 4))) & 3;
    return low | (high << 4);
  }
};

// A row of inputs: `in` bytes, then the scale of each 32, the sums of each 16 and of each 32 (times the scale).
struct SpanInputs {
  const int8_t* values;
  const float *scales, *sums16, *sums32;
  SpanInputs(const void* prepared, long in, long row)
      : values((const int8_t*)prepared + row * bytes(in)),
        scales((const float*)(values + in)), sums16(scales + in / 32), sums32(sums16 + in / 16) {}
  static long bytes(long in) { return in + in / 8 * 4; }
};

// Takes a row of inputs. A span with a number that is not finite has no finite scale.
inline void quantise_spans(const float* x, long in, long row, void* prepared) {
  const SpanInputs y(prepared, in, row);
  for (long g = 0; g < in / SPAN; ++g) {
    const float* v = x + g * SPAN;
    Floats most = Floats{}, none = Floats{};
    for (int i = 0; i < SPAN; i += LANES) {
      const Floats some = load(v + i);
      most = max(most, max(some, -some));
      none += some * 0;
    }
    const float size = largest(most), nothing = sum(none);
    const float factor = size > 0 && nothing == 0 ? 127 / size : 0, scale = size / 127 + nothing;
    int32_t sums[2] = {};
    for (int i = 0; i < SPAN; ++i) {
      const int32_t code = factor != 0 ? int32_t(v[i] * factor + (v[i] < 0 ? -0.5f : 0.5f)) : 0;
      ((int8_t*)y.values)[g * SPAN + i] = int8_t(code);
      sums[i / 16] += code;
    }
    ((float*)y.scales)[g] = scale;
    for (int i = 0; i < 2; ++i) ((float*)y.sums16)[2 * g + i] = scale * float(sums[i]);
    ((float*)y.sums32)[g] = scale * float(sums[0] + sums[1]);
  }
}

template <class F, int J> INLINE Eight steps_of(const float* steps) {
  if constexpr (F::GROUP == 32) return steps[J] - Eight{};
  const float a = steps[2 * J], b = steps[2 * J + 1];
  return Eight{a, a, a, a, b, b, b, b};
}

// The j-th 32 values of a block with each row of inputs, and the ones after it.
template <class F, int INPUTS, int J>
INLINE void dot_spans(const uint8_t* p, const float* steps, const SpanInputs* x, long span, Eight* sums) {
  if constexpr (J < F::VALUES / SPAN) {
    const Codes codes = F::template codes<J>(p);
    const Eight step = steps_of<F, J>(steps);
    UNROLLED for (int b = 0; b < INPUTS; ++b) {
      const Codes inputs = load_as<Codes>(x[b].values + (span + J) * SPAN);
      const EightInts product = F::SIGNED ? dot_signed(codes, inputs) : dot_codes(codes, inputs);
      sums[b] += floats_of(product) * (step * x[b].scales[span + J]);
    }
    dot_spans<F, INPUTS, J + 1>(p, steps, x, span, sums);
  }
}

// A row of the weight with INPUTS rows: y[input].
template <class F, int INPUTS> INLINE void dot_blocks(const uint8_t* p, long in, const SpanInputs* x, float* y) {
  constexpr int GROUPS = F::VALUES / F::GROUP;
  Eight sums[INPUTS], taken[INPUTS];
  float rest[INPUTS];
  UNROLLED for (int b = 0; b < INPUTS; ++b) sums[b] = taken[b] = Eight{}, rest[b] = 0;
  for (long k = 0; k < in; k += F::VALUES, p += F::BYTES) {
    __builtin_prefetch(p + AHEAD / 4, 0, 2);
    if constexpr (F::BYTES > 64) __builtin_prefetch(p + AHEAD / 4 + 64, 0, 2);
    if constexpr (F::BYTES > 128) __builtin_prefetch(p + AHEAD / 4 + 128, 0, 2);
    alignas(32) float steps[GROUPS], offsets[GROUPS];
    F::scales(p, steps, offsets);
    dot_spans<F, INPUTS, 0>(p, steps, x, k / SPAN, sums);
    if constexpr (F::SIGNED) continue;
    UNROLLED for (int b = 0; b < INPUTS; ++b) {
      const float* inputs = F::GROUP == 32 ? x[b].sums32 + k / 32 : x[b].sums16 + k / 16;
      if constexpr (GROUPS == 1) rest[b] += offsets[0] * inputs[0];
      else UNROLLED for (int i = 0; i < GROUPS; i += 8) taken[b] += load_as<Eight>(offsets + i) * load_as<Eight>(inputs + i);
    }
  }
  UNROLLED for (int b = 0; b < INPUTS; ++b) y[b] = total_of(sums[b] - taken[b]) - rest[b];
}

template <class F>
void blocks_all(const void* prepared, long rows, const uint8_t* w, long in, float* y, long y_stride, long first, long end) {
  constexpr int MOST = 4;
  const long size = in / F::VALUES * F::BYTES;
  for (long row = first; row < end; ++row) {
    long b = 0;
    for (; b + MOST <= rows; b += MOST) {
      const SpanInputs x[MOST] = {{prepared, in, b}, {prepared, in, b + 1}, {prepared, in, b + 2}, {prepared, in, b + 3}};
      float found[MOST];
      dot_blocks<F, MOST>(w + row * size, in, x, found);
      for (int i = 0; i < MOST; ++i) y[(b + i) * y_stride + row] = found[i];
    }
    for (; b < rows; ++b) {
      const SpanInputs x[1] = {{prepared, in, b}};
      dot_blocks<F, 1>(w + row * size, in, x, y + b * y_stride + row);
    }
  }
}

template <class F, int J> INLINE void widen_spans(const uint8_t* p, const float* steps, const float* offsets, float* y) {
  if constexpr (J < F::VALUES / SPAN) {
    const Codes codes = F::template codes<J>(p);
    for (int i = 0; i < SPAN; ++i) {
      const int group = (J * SPAN + i) / F::GROUP;
      const float code = F::SIGNED ? float(int8_t(codes[i])) : float(codes[i]);
      y[J * SPAN + i] = code * steps[group] - offsets[group];
    }
    widen_spans<F, J + 1>(p, steps, offsets, y);
  }
}

// Rows of the weight as numbers, (end - first, in).
template <class F> void widen_block(const uint8_t* p, float* y) {
  float steps[F::VALUES / F::GROUP], offsets[F::VALUES / F::GROUP];
  F::scales(p, steps, offsets);
  widen_spans<F, 0>(p, steps, offsets, y);
}
template <class F, class Y> void widen_blocks(const uint8_t* w, long in, Y* y, long first, long end) {
  const uint8_t* p = w + first * (in / F::VALUES) * F::BYTES;
  for (const Y* last = y + (end - first) * in; y < last; y += F::VALUES, p += F::BYTES) {
    alignas(64) float values[F::VALUES];
    widen_block<F>(p, values);
    for (int i = 0; i < F::VALUES; ++i) narrow(values[i], y + i);
  }
}

}  // namespace litgpt
