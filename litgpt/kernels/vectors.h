// Vectors of the widest kind that the compiler is told of (-mavx2, -mavx512f, -march=...): the one place that knows
// instruction sets. All kernels are written once over what is here.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))
// Arrays of vectors stay in registers only where the compiler takes the loops over them apart first.
#define UNROLLED _Pragma("GCC unroll 16")

namespace litgpt {

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int LANES = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int LANES = 4, REGISTERS = 32;
#else
constexpr int LANES = 4, REGISTERS = 16;
#endif

using Floats = float __attribute__((vector_size(4 * LANES)));
using Ints = int32_t __attribute__((vector_size(4 * LANES)));
using Unsigned = uint32_t __attribute__((vector_size(4 * LANES)));
using Shorts = int16_t __attribute__((vector_size(4 * LANES)));
using Bytes = uint8_t __attribute__((vector_size(4 * LANES)));
using Four = float __attribute__((vector_size(16)));

struct bf16 { uint16_t bits; };
struct half { uint16_t bits; };

template <class V> INLINE V load_as(const void* p) { V v; std::memcpy(&v, p, sizeof(V)); return v; }
template <class V> INLINE void store_as(void* p, V v) { std::memcpy(p, &v, sizeof(V)); }
template <class To, class From> INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y; std::memcpy(&y, &x, sizeof(To)); return y;
}

// One value.
INLINE float wide(float x) { return x; }
INLINE float wide(int8_t x) { return x; }
INLINE float wide(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
INLINE float wide(half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#elif defined(__aarch64__)
  return bit_cast<__fp16>(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(rest << 13) * 0x1p112f));
#endif
}
INLINE void narrow(float x, float* p) { *p = x; }
INLINE void narrow(float x, bf16* p) {  // to the nearest, ties to even
  const uint32_t bits = bit_cast<uint32_t>(x);
  p->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
INLINE void narrow(float x, half* p) {
#if defined(__F16C__)
  p->bits = _cvtss_sh(x, 0);
#elif defined(__aarch64__)
  p->bits = bit_cast<uint16_t>(__fp16(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) p->bits = uint16_t(sign | 0x7e00);
  else if (size >= 0x477ff000) p->bits = uint16_t(sign | 0x7c00);
  else if (size < 0x38800000)  // a subnormal: the addition rounds
    p->bits = uint16_t(sign | (bit_cast<uint32_t>(bit_cast<float>(size) + 0.5f) - 0x3f000000));
  else p->bits = uint16_t(sign | (((size + 0xfff + (size >> 13 & 1)) >> 13) - 0x1c000));
#endif
}

// LANES values.
INLINE Floats all(float x) { return x - Floats{}; }
INLINE Floats load(const float* p) { return load_as<Floats>(p); }
INLINE void store(float* p, Floats x) { store_as(p, x); }
#if defined(__AVX512F__)
INLINE Floats load(const bf16* p) {
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
INLINE Floats load(const half* p) { return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INLINE Floats load(const int8_t* p) {
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
INLINE Floats fma(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE Floats max(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
INLINE Floats load(const bf16* p) {
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
INLINE Floats load(const half* p) { return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE Floats load(const int8_t* p) {
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
INLINE Floats fma(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE Floats max(Floats a, Floats b) { return (Floats)_mm256_max_ps((__m256)a, (__m256)b); }
#elif defined(__aarch64__)
INLINE Floats load(const bf16* p) { return (Floats)vshll_n_u16(vld1_u16(&p->bits), 16); }
INLINE Floats load(const half* p) { return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
INLINE Floats load(const int8_t* p) {
  return (Floats)vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(load_as<int32_t>(p)))))));
}
INLINE Floats fma(Floats a, Floats b, Floats c) { return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
INLINE Floats max(Floats a, Floats b) { return (Floats)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
#else
INLINE Floats load(const bf16* p) {
  return (Floats)_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)p)), 16);
}
INLINE Floats load(const half* p) { return Floats{wide(p[0]), wide(p[1]), wide(p[2]), wide(p[3])}; }
INLINE Floats load(const int8_t* p) {
  return (Floats)_mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(load_as<int32_t>(p))));
}
INLINE Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
INLINE Floats max(Floats a, Floats b) { return (Floats)_mm_max_ps((__m128)a, (__m128)b); }
#endif
INLINE Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }
template <class T> INLINE void store_narrow(T* p, Floats x) {
  UNROLLED for (int i = 0; i < LANES; ++i) narrow(x[i], p + i);
}
INLINE void store_narrow(float* p, Floats x) { store(p, x); }

// Sums and maxima over the lanes.
INLINE Four folded(Floats x) {  // four sums of a quarter of the lanes each
#if defined(__AVX512F__)
  const __m256 y = _mm256_add_ps(_mm512_castps512_ps256((__m512)x), (__m256)_mm512_extractf64x4_pd((__m512d)x, 1));
  return (Four)_mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
#elif defined(__AVX2__)
  return (Four)_mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
#else
  return (Four)x;
#endif
}
INLINE Four sums_of_4(const Floats* x) {  // the sum of each
  const Four a = folded(x[0]), b = folded(x[1]), c = folded(x[2]), d = folded(x[3]);
#if defined(__x86_64__)
  return (Four)_mm_hadd_ps(_mm_hadd_ps((__m128)a, (__m128)b), _mm_hadd_ps((__m128)c, (__m128)d));
#else
  return (Four)vpaddq_f32(vpaddq_f32((float32x4_t)a, (float32x4_t)b), vpaddq_f32((float32x4_t)c, (float32x4_t)d));
#endif
}
INLINE float sum(Floats x) { const Four y = folded(x); return (y[0] + y[2]) + (y[1] + y[3]); }
INLINE float largest(Floats x) {
  float y = x[0];
  for (int i = 1; i < LANES; ++i) y = x[i] > y ? x[i] : y;
  return y;
}

// 2^whole times a polynomial: the relative error is 2e-7. Below -87 it is as good as zero.
INLINE Floats exp(Floats x) {
  x = -max(all(-88.0f), -max(all(-87.0f), x));  // in this order what is no number stays so
  const Floats magic = all(0x1.8p23f), shifted = fma(x, all(1.44269504f), magic), whole = shifted - magic;
  const Floats rest = fma(whole, all(-1.42860677e-6f), fma(whole, all(-0.693145752f), x));
  Floats y = all(1.f / 720);
  constexpr float FACTORS[] = {1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1, 1};
  UNROLLED for (int i = 0; i < 6; ++i) y = fma(y, rest, all(FACTORS[i]));
  const Ints power = (bit_cast<Ints>(shifted) - 0x4b400000 + 127) << 23;
  return y * bit_cast<Floats>(power);
}

INLINE Floats tanh(Floats x) {
  // Near zero the quotient would lose digits.
  const Floats square = x * x, near = x * (1 - square * (0.333333333f - square * (0.133333333f - square * 0.0539682540f)));
  const Floats far = 1 - 2 / (exp(x + x) + 1);
  return bit_cast<Floats>(square < 0.01f ? bit_cast<Ints>(near) : bit_cast<Ints>(far));
}
// By formula 7.1.26 of Abramowitz and Stegun: the error is below 2e-7.
INLINE Floats erf(Floats x) {
  const Floats size = max(x, -x), t = 1 / (1 + 0.3275911f * size);
  const Floats y = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
  const Floats found = 1 - y * exp(-size * size);
  return bit_cast<Floats>(x < 0 ? bit_cast<Ints>(-found) : bit_cast<Ints>(found));
}

constexpr long AHEAD = 8192;  // bytes: how early memory is fetched (measured)

// Fetches memory that is needed soon, line after line, as it lies: a CPU that fetches ahead by itself gets half as much
// from several places in turn (measured on Zen 4).
template <int BYTES> INLINE void fetch(const char* p) {
  UNROLLED for (int line = 0; line < BYTES; line += 64) __builtin_prefetch(p + line, 0, 2);
}

// Sums of the products of four neighbouring bytes, one factor without a sign and below 16, the other with one; exact for
// up to eight additions to one `Sums`.
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
using Sums = Ints;
INLINE Sums dot4(Sums sums, Bytes a, Bytes b) { return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)a, (__m512i)b); }
INLINE Ints total(Sums sums) { return sums; }
#elif defined(__AVX512F__)
using Sums = Shorts;
INLINE Sums dot4(Sums sums, Bytes a, Bytes b) { return sums + (Shorts)_mm512_maddubs_epi16((__m512i)a, (__m512i)b); }
INLINE Ints total(Sums sums) { return (Ints)_mm512_madd_epi16((__m512i)sums, _mm512_set1_epi16(1)); }
#elif defined(__AVXVNNI__)
using Sums = Ints;
INLINE Sums dot4(Sums sums, Bytes a, Bytes b) {
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)a, (__m256i)b);
}
INLINE Ints total(Sums sums) { return sums; }
#elif defined(__AVX2__)
using Sums = Shorts;
INLINE Sums dot4(Sums sums, Bytes a, Bytes b) { return sums + (Shorts)_mm256_maddubs_epi16((__m256i)a, (__m256i)b); }
INLINE Ints total(Sums sums) { return (Ints)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1)); }
#elif defined(__ARM_FEATURE_DOTPROD)
using Sums = Ints;
INLINE Sums dot4(Sums sums, Bytes a, Bytes b) { return (Ints)vdotq_s32((int32x4_t)sums, (int8x16_t)a, (int8x16_t)b); }
INLINE Ints total(Sums sums) { return sums; }
#elif defined(__aarch64__)
using Sums = Ints;
INLINE Sums dot4(Sums sums, Bytes a, Bytes b) {
  const int16x8_t low = vmull_s8(vget_low_s8((int8x16_t)a), vget_low_s8((int8x16_t)b));
  const int16x8_t high = vmull_high_s8((int8x16_t)a, (int8x16_t)b);
  return (Ints)vpadalq_s16((int32x4_t)sums, vpaddq_s16(low, high));
}
INLINE Ints total(Sums sums) { return sums; }
#else
using Sums = Shorts;
INLINE Sums dot4(Sums sums, Bytes a, Bytes b) { return sums + (Shorts)_mm_maddubs_epi16((__m128i)a, (__m128i)b); }
INLINE Ints total(Sums sums) { return (Ints)_mm_madd_epi16((__m128i)sums, _mm_set1_epi16(1)); }
#endif
INLINE Bytes all_four(const int8_t* p) { return (Bytes)(Ints{} + load_as<int32_t>(p)); }  // in each lane
INLINE Bytes lower_half(Bytes x) { return x & 15; }
INLINE Bytes upper_half(Bytes x) {
#if defined(__x86_64__)
  return bit_cast<Bytes>(bit_cast<Unsigned>(x) >> 4) & 15;
#else
  return x >> 4;
#endif
}

}  // namespace litgpt
