#include <immintrin.h>
#include <cstdlib>
#include <type_traits>
#pragma GCC push_options
#pragma GCC optimize("O3")  // what is around it, is compiled for the compiler's time
// Arrays of vectors are kept in registers only where the compiler takes the loops over them apart first, of which it
// has to be told: it otherwise stores every sum at every step.
#define UNROLLED _Pragma("GCC unroll 16")
namespace skinny_gemm {
constexpr int LANES = 16, TOGETHER = 4;
constexpr int AHEAD = 8192;  // bytes: how early memory is fetched (measured)
constexpr int KEYS_AHEAD = 16;
// A masked key has -30000 in the mask (MASKED of model.py), or what that is in its type: -29952 in bfloat16. A score
// falls as low by nothing else.
constexpr float MASKED = -30000, SEEN_ABOVE = MASKED / 2;

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

inline __m128 sums_of_4(const __m512* x) {
  __m256 halves[4];
  UNROLLED for (int i = 0; i < 4; ++i)
    halves[i] = _mm256_add_ps(_mm512_castps512_ps256(x[i]), (__m256)_mm512_extractf64x4_pd((__m512d)x[i], 1));
  const __m256 y = _mm256_hadd_ps(_mm256_hadd_ps(halves[0], halves[1]), _mm256_hadd_ps(halves[2], halves[3]));
  return _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
}

// The sums of each of COUNT vectors.
template <int COUNT> inline void sums_of(const __m512* x, float* y) {
  static_assert(COUNT == 1 || COUNT == TOGETHER);
  if (COUNT == TOGETHER) _mm_storeu_ps(y, sums_of_4(x));
  else *y = _mm512_reduce_add_ps(*x);
}

// Fetches lines of memory that are needed soon. They are asked for one after another, as they lie: a CPU that fetches
// ahead by itself gets half as much from several places in turn (measured on Zen 4).
template <int BYTES> inline void fetch(const char* p) {
  for (int line = 0; line < BYTES; line += 64) _mm_prefetch(p + line, _MM_HINT_T1);
}

// The products of COUNT rows of the weight, which lie one after another, with ROWS rows of inputs.
template <int COUNT, int ROWS, class W>
inline void dot(const float* const (&x)[ROWS], const W* w, long in, float (*y)[TOGETHER]) {
  __m512 sums[ROWS][COUNT];
  UNROLLED for (int b = 0; b < ROWS; ++b) UNROLLED for (int r = 0; r < COUNT; ++r) sums[b][r] = _mm512_setzero_ps();
  long k = 0;
  const char* next = (const char*)(w + COUNT * in) + AHEAD;
  for (; k + LANES <= in; k += LANES) {
    __m512 of_row[COUNT];
    UNROLLED for (int r = 0; r < COUNT; ++r) of_row[r] = load(w + r * in + k);
    fetch<COUNT * LANES * sizeof(W)>(next + k * COUNT * sizeof(W));
    UNROLLED for (int b = 0; b < ROWS; ++b) {
      const __m512 inputs = load(x[b] + k);
      UNROLLED for (int r = 0; r < COUNT; ++r) sums[b][r] = _mm512_fmadd_ps(inputs, of_row[r], sums[b][r]);
    }
  }
  UNROLLED for (int b = 0; b < ROWS; ++b) {
    sums_of<COUNT>(sums[b], y[b]);
    UNROLLED for (int r = 0; r < COUNT; ++r)
      for (long i = k; i < in; ++i) y[b][r] += x[b][i] * wide(w[r * in + i]);
  }
}

#ifdef __AVX512BF16__
// The same where the CPU multiplies pairs of bfloat16, and adds them up in float32.
template <int COUNT, int ROWS>
inline void dot(const bf16* const (&x)[ROWS], const bf16* w, long in, float (*y)[TOGETHER]) {
  __m512 sums[ROWS][COUNT];
  UNROLLED for (int b = 0; b < ROWS; ++b) UNROLLED for (int r = 0; r < COUNT; ++r) sums[b][r] = _mm512_setzero_ps();
  const char* next = (const char*)(w + COUNT * in) + AHEAD;
  const auto step = [&](long k, __mmask32 some) __attribute__((always_inline)) {
    __m512bh of_row[COUNT];
    UNROLLED for (int r = 0; r < COUNT; ++r) of_row[r] = (__m512bh)_mm512_maskz_loadu_epi16(some, w + r * in + k);
    fetch<COUNT * 64>(next + k * COUNT * sizeof(bf16));
    UNROLLED for (int b = 0; b < ROWS; ++b) {
      const __m512bh inputs = (__m512bh)_mm512_maskz_loadu_epi16(some, x[b] + k);
      UNROLLED for (int r = 0; r < COUNT; ++r) sums[b][r] = _mm512_dpbf16_ps(sums[b][r], inputs, of_row[r]);
    }
  };
  long k = 0;
  for (; k + 2 * LANES <= in; k += 2 * LANES) step(k, ~__mmask32(0));
  if (k < in) step(k, (__mmask32(1) << (in - k)) - 1);
  UNROLLED for (int b = 0; b < ROWS; ++b) sums_of<COUNT>(sums[b], y[b]);
}
template <class X, class W> struct Inputs { using type = float; };
template <> struct Inputs<bf16, bf16> { using type = bf16; };
#else
template <class X, class W> struct Inputs { using type = float; };
#endif

// `busy` are the rows of inputs that are multiplied.
template <int ROWS, class P, class X, class W> inline void linear_rows(
    const P* x, const W* w, const X* scales, X* y, const long* busy, long first, long out, long in) {
  const P* inputs[ROWS];
  for (int b = 0; b < ROWS; ++b) inputs[b] = x + busy[b] * in;
  float sums[ROWS][TOGETHER];
  const long count = out - first < TOGETHER ? out - first : TOGETHER;
  if (count == TOGETHER) dot<TOGETHER, ROWS>(inputs, w + first * in, in, sums);
  else for (long r = 0; r < count; ++r) {
    float one[ROWS][TOGETHER];
    dot<1, ROWS>(inputs, w + (first + r) * in, in, one);
    for (int b = 0; b < ROWS; ++b) sums[b][r] = one[b][0];
  }
  for (int b = 0; b < ROWS; ++b)
    for (long r = 0; r < count; ++r)
      store(y + busy[b] * out + first + r, scales ? sums[b][r] * wide(scales[first + r]) : sums[b][r]);
}

template <class P, class X, class W>
void linear_prepared(const P* x, const W* w, const X* scales, X* y, long rows, long out, long in) {
  // A row of zeros has no request: its products are zeros, too.
  long* busy = (long*)__builtin_malloc(rows * sizeof(long));
  long count = 0;
  for (long b = 0; b < rows; ++b) {
    long k = 0;
    while (k < in && wide(x[b * in + k]) == 0) ++k;
    if (k < in) busy[count++] = b;
    else for (long r = 0; r < out; ++r) store(y + b * out + r, 0);
  }
  const long blocks = (out + TOGETHER - 1) / TOGETHER;
#pragma omp parallel for schedule(static)
  for (long thread = 0; thread < THREADS; ++thread)
    for (long block = blocks * thread / THREADS; block < blocks * (thread + 1) / THREADS; ++block)
      for (long b = 0; b < count;) {
        const long first = block * TOGETHER, left = count - b;
        if (MOST_ROWS >= 4 && left >= 4) linear_rows<4>(x, w, scales, y, busy + b, first, out, in), b += 4;
        else if (MOST_ROWS >= 2 && left >= 2) linear_rows<2>(x, w, scales, y, busy + b, first, out, in), b += 2;
        else linear_rows<1>(x, w, scales, y, busy + b, first, out, in), b += 1;
      }
  __builtin_free(busy);
}

template <class X, class W> void linear(const X* x, const W* w, const X* scales, X* y, long rows, long out, long in) {
  if constexpr (std::is_same_v<typename Inputs<X, W>::type, X>) linear_prepared(x, w, scales, y, rows, out, in);
  else {
    float* inputs = (float*)__builtin_malloc(rows * in * sizeof(float));
    for (long i = 0; i < rows * in; ++i) inputs[i] = wide(x[i]);
    linear_prepared(inputs, w, scales, y, rows, out, in);
    __builtin_free(inputs);
  }
}

#ifdef TILED_FROM
// Tiles (AMX): 16 rows of the weight as they lie, times 16 rows of inputs, which are put into pairs of values first.
struct alignas(64) TileConfig { uint8_t palette = 1, start = 0, reserved[14] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; };
#define TILES __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512bf16")))

TILES inline void store_tile(const float* tile, bf16* y, long rows, long out) {  // 16 outputs each of some rows
  const __m512i places = _mm512_mullo_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(LANES));
  for (long b = 0; b < rows && b < LANES; ++b) {
    const __m512 values = _mm512_i32gather_ps(places, tile + b, 4);
    _mm256_storeu_si256((__m256i*)(y + b * out), (__m256i)_mm512_cvtneps_pbh(values));
  }
}

// 32 rows of the weight at a time, for one or two times 16 rows of inputs.
template <int PARTS> TILES __attribute__((noinline)) void linear_tiles(
    const uint32_t* pairs, const bf16* w, bf16* y, long rows, long first, long end, long in, long out) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.rows[tile] = LANES, config.bytes[tile] = 4 * LANES;
  _tile_loadconfig(&config);
  alignas(64) float sums[LANES * LANES];
  for (; first < end; first += 2 * LANES) {
    const bf16* some = w + first * in;
    const char* next = (const char*)(some + 2 * LANES * in);
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (long k = 0; k < in; k += 2 * LANES) {
      for (int line = 0; line < 2 * LANES; ++line) _mm_prefetch(next + (k + line) * 64, _MM_HINT_T1);
      const uint32_t* inputs = pairs + k / 2 * LANES * PARTS;
      _tile_loadd(4, some + k, 2 * in);
      _tile_loadd(5, some + LANES * in + k, 2 * in);
      _tile_loadd(6, inputs, 4 * LANES);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      if (PARTS == 2) {
        _tile_loadd(7, inputs + LANES * LANES, 4 * LANES);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    bf16* found = y + first;
    _tile_stored(0, sums, 4 * LANES); store_tile(sums, found, rows, out);
    _tile_stored(1, sums, 4 * LANES); store_tile(sums, found + LANES, rows, out);
    if (PARTS == 2) {
      found += LANES * out;
      _tile_stored(2, sums, 4 * LANES); store_tile(sums, found, rows - LANES, out);
      _tile_stored(3, sums, 4 * LANES); store_tile(sums, found + LANES, rows - LANES, out);
    }
  }
  _tile_release();
}

inline void linear_in_tiles(const bf16* x, const bf16* w, bf16* y, long rows, long out, long in) {
  const long parts = rows > LANES ? 2 : 1, blocks = out / (2 * LANES);
  uint32_t* pairs = (uint32_t*)aligned_alloc(64, parts * LANES * in * 2);
  const uint32_t* inputs = (const uint32_t*)x;
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (long k = 0; k < in / 2; k += LANES)  // tiles of 16 pairs by 16 rows of inputs
      for (long part = 0; part < parts; ++part)
        for (long pair = 0; pair < LANES; ++pair)
          for (long b = 0; b < LANES; ++b) {
            const long row = part * LANES + b;
            pairs[(k * parts + part * LANES + pair) * LANES + b] = row < rows ? inputs[row * in / 2 + k + pair] : 0;
          }
#pragma omp for schedule(static)
    for (long thread = 0; thread < THREADS; ++thread) {
      const long first = blocks * thread / THREADS * 2 * LANES, end = blocks * (thread + 1) / THREADS * 2 * LANES;
      if (parts == 2) linear_tiles<2>(pairs, w, y, rows, first, end, in, out);
      else linear_tiles<1>(pairs, w, y, rows, first, end, in, out);
    }
  }
  __builtin_free(pairs);
}
#endif

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
  UNROLLED for (int b = 0; b < ROWS; ++b) UNROLLED for (int p = 0; p < PARTS; ++p) sums[b][p] = _mm512_setzero_ps();
  for (long g = 0; g < in / GROUP; ++g) {
    __m512 of_group[ROWS][PARTS];
    UNROLLED for (int b = 0; b < ROWS; ++b) UNROLLED for (int p = 0; p < PARTS; ++p) of_group[b][p] = _mm512_setzero_ps();
    for (long k = g * GROUP; k < (g + 1) * GROUP; ++k) {
      const uint8_t* codes = w + k * half;
      _mm_prefetch((const char*)codes + AHEAD, _MM_HINT_T0);
      UNROLLED for (int p = 0; p < PIECES; ++p) {
        const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + p * LANES)));
        const __m512 low = _mm512_permutexvar_ps(both, values);  // looks at the lowest 4 bits
        const __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), values);
        UNROLLED for (int b = 0; b < ROWS; ++b) {
          const __m512 input = _mm512_set1_ps(x[b * in + k]);
          of_group[b][p] = _mm512_fmadd_ps(input, low, of_group[b][p]);
          of_group[b][PIECES + p] = _mm512_fmadd_ps(input, high, of_group[b][PIECES + p]);
        }
      }
    }
    UNROLLED for (int p = 0; p < PARTS; ++p) {
      __m512 scale, middle;
      load_pairs(scales + 2 * (g * out + (p < PIECES ? p * LANES : half + (p - PIECES) * LANES)), &scale, &middle);
      UNROLLED for (int b = 0; b < ROWS; ++b) {
        sums[b][p] = _mm512_fmadd_ps(scale, of_group[b][p], sums[b][p]);
        sums[b][p] = _mm512_fmadd_ps(middle, _mm512_set1_ps(group_sums[b * (in / GROUP) + g]), sums[b][p]);
      }
    }
  }
  UNROLLED for (int b = 0; b < ROWS; ++b)
    UNROLLED for (int p = 0; p < PARTS; ++p) {
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
  for (; MOST_ROWS >= 4 && b + 4 <= rows; b += 4)
    dot_int4<PIECES, 4>(x + b * in, sums + b * groups, w, scales, y + b * out, in, out, half);
  for (; MOST_ROWS >= 2 && b + 2 <= rows; b += 2)
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

// Attention of one token of each row: q (B, H, D), k and v (B, S, G, D) in strides, mask (B, S), y (B, H, D). What the
// mask hides is not read.
inline __m512 exp(__m512 x) {  // of numbers that are not positive; 2^whole times a polynomial (relative error 2e-7)
  const __m512 log2e = _mm512_set1_ps(1.44269504f), ln2 = _mm512_set1_ps(0.693147181f);
  x = _mm512_max_ps(x, _mm512_set1_ps(-87));
  const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(x, log2e), 8);
  const __m512 rest = _mm512_fnmadd_ps(whole, ln2, x);
  __m512 y = _mm512_set1_ps(1.f / 720);
  for (float c : {1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(c));
  return _mm512_scalef_ps(y, whole);
}

// The vectors of a head, in an order that is quick to load: of bfloat16 the even values, then the odd ones.
template <int PIECES> inline void load_head(const float* p, __m512* vectors) {
  UNROLLED for (int d = 0; d < PIECES; ++d) vectors[d] = load(p + d * LANES);
}
template <int PIECES> inline void load_head(const bf16* p, __m512* vectors) {
  UNROLLED for (int d = 0; d + 1 < PIECES; d += 2) {
    const __m512i pairs = _mm512_loadu_si512(p + d * LANES);
    vectors[d] = (__m512)_mm512_slli_epi32(pairs, 16);
    vectors[d + 1] = (__m512)_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000));
  }
  if (PIECES % 2) vectors[PIECES - 1] = load(p + (PIECES - 1) * LANES);
}
template <int PIECES> inline int place(const float*, int d, int lane) { return d * LANES + lane; }
template <int PIECES> inline int place(const bf16*, int d, int lane) {
  return d / 2 * 2 + 1 < PIECES ? d / 2 * 2 * LANES + 2 * lane + d % 2 : d * LANES + lane;
}

template <class X> struct Attention {
  const X *q, *k, *v, *mask;
  X* y;
  long heads, groups, size, keys;  // H, G, D, S
  const int64_t *k_strides, *v_strides;
  long mask_stride;
  float scale;

  // COUNT heads from `first` on, of group `g` in row `b`, which sees keys from `from` to `to` at most; D is PIECES
  // vectors, so that all of them are in registers.
  template <int PIECES, int COUNT> void some(long b, long g, long first, long from, long to, float* scores) const {
    const long count = to - from, padded = (count + LANES - 1) / LANES * LANES;
    const X* of_mask = mask + b * mask_stride + from;
    const X* of_keys = k + b * k_strides[0] + from * k_strides[1] + g * k_strides[2];
    const X* of_values = v + b * v_strides[0] + from * v_strides[1] + g * v_strides[2];
    __m512 vectors[COUNT][PIECES], piece[PIECES];
    UNROLLED for (int h = 0; h < COUNT; ++h) {
      load_head<PIECES>(q + (b * heads + first + h) * size, vectors[h]);
      UNROLLED for (int d = 0; d < PIECES; ++d) vectors[h][d] = _mm512_mul_ps(vectors[h][d], _mm512_set1_ps(scale));
    }
    for (long s = 0; s < padded; s += 4) {
      __m512 sums[COUNT][4];
      float added[4];
      UNROLLED for (int i = 0; i < 4; ++i) {
        added[i] = s + i < count ? wide(of_mask[s + i]) : MASKED;
        UNROLLED for (int h = 0; h < COUNT; ++h) sums[h][i] = _mm512_setzero_ps();
        if (added[i] < SEEN_ABOVE) continue;
        const X* key = of_keys + (s + i) * k_strides[1];
        // Keys of one group do not lie together: the CPU does not see by itself what comes next.
        const X* value = of_values + (s + i) * v_strides[1];
        for (size_t line = 0; line < PIECES * LANES * sizeof(X); line += 64) {
          _mm_prefetch((const char*)(key + KEYS_AHEAD * k_strides[1]) + line, _MM_HINT_T0);
          _mm_prefetch((const char*)value + line, _MM_HINT_T1);  // for the second half
        }
        load_head<PIECES>(key, piece);
        UNROLLED for (int d = 0; d < PIECES; ++d)
          UNROLLED for (int h = 0; h < COUNT; ++h) sums[h][i] = _mm512_fmadd_ps(vectors[h][d], piece[d], sums[h][i]);
      }
      UNROLLED for (int h = 0; h < COUNT; ++h)
        _mm_storeu_ps(scores + h * padded + s, _mm_add_ps(sums_of_4(sums[h]), _mm_loadu_ps(added)));
    }
    float factors[COUNT];
    UNROLLED for (int h = 0; h < COUNT; ++h) {
      float* of_head = scores + h * padded;
      __m512 most = _mm512_set1_ps(MASKED), total = _mm512_setzero_ps();
      for (long s = 0; s < padded; s += LANES) most = _mm512_max_ps(most, load(of_head + s));
      most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
      for (long s = 0; s < padded; s += LANES) {
        const __m512 weight = exp(_mm512_sub_ps(load(of_head + s), most));
        total = _mm512_add_ps(total, weight);
        _mm512_storeu_ps(of_head + s, weight);
      }
      factors[h] = 1 / _mm512_reduce_add_ps(total);
    }
    UNROLLED for (int h = 0; h < COUNT; ++h) UNROLLED for (int d = 0; d < PIECES; ++d) vectors[h][d] = _mm512_setzero_ps();
    for (long s = 0; s < count; ++s) {
      if (wide(of_mask[s]) < SEEN_ABOVE) continue;
      load_head<PIECES>(of_values + s * v_strides[1], piece);
      __m512 weights[COUNT];
      UNROLLED for (int h = 0; h < COUNT; ++h) weights[h] = _mm512_set1_ps(scores[h * padded + s]);
      UNROLLED for (int d = 0; d < PIECES; ++d)
        UNROLLED for (int h = 0; h < COUNT; ++h) vectors[h][d] = _mm512_fmadd_ps(weights[h], piece[d], vectors[h][d]);
    }
    UNROLLED for (int h = 0; h < COUNT; ++h)
      UNROLLED for (int d = 0; d < PIECES; ++d) {
        float lanes[LANES];
        _mm512_storeu_ps(lanes, _mm512_mul_ps(vectors[h][d], _mm512_set1_ps(factors[h])));
        X* found = y + (b * heads + first + h) * size;
        for (int i = 0; i < LANES; ++i) store(found + place<PIECES>(found, d, i), lanes[i]);
      }
  }

  void group(long b, long g) const {
    constexpr int PIECES = HEAD_SIZE / LANES, MOST = PIECES <= 4 ? 4 : PIECES <= 8 ? 2 : 1;
    constexpr int TOGETHER = HEADS < MOST ? HEADS : MOST, LEFT = HEADS % TOGETHER;  // HEADS are those of a group
    const X* of_mask = mask + b * mask_stride;
    long from = 0, to = keys;
    const __m512 limit = _mm512_set1_ps(SEEN_ABOVE);
    while (to >= LANES && _mm512_cmp_ps_mask(load(of_mask + to - LANES), limit, _CMP_GE_OQ) == 0) to -= LANES;
    while (to > 0 && wide(of_mask[to - 1]) < SEEN_ABOVE) --to;
    while (from < to && wide(of_mask[from]) < SEEN_ABOVE) ++from;
    if (from == to) {  // an idle row
      for (long i = 0; i < HEADS * size; ++i) store(y + (b * heads + g * HEADS) * size + i, 0);
      return;
    }
    float* scores = (float*)__builtin_malloc(TOGETHER * (to - from + LANES) * sizeof(float));
    for (long first = g * HEADS; first < (g + 1) * HEADS - LEFT; first += TOGETHER)
      some<PIECES, TOGETHER>(b, g, first, from, to, scores);
    if (LEFT) some<PIECES, LEFT ? LEFT : TOGETHER>(b, g, (g + 1) * HEADS - LEFT, from, to, scores);
    __builtin_free(scores);
  }

  void operator()(long rows) const {
#pragma omp parallel for schedule(dynamic)
    for (long unit = 0; unit < rows * groups; ++unit) group(unit / groups, unit % groups);
  }
};

struct Tensor {
  void* data; int64_t *sizes, *strides; int64_t dim; int32_t dtype;
  explicit Tensor(AtenTensorHandle handle) {
    aoti_torch_get_data_ptr(handle, &data); aoti_torch_get_sizes(handle, &sizes);
    aoti_torch_get_strides(handle, &strides);
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
  return run_int4<VALUE>(inputs, Tensor(codes), pairs, *y);
}

template <class X> AOTITorchError run(Tensor x, Tensor w, const X* scales, AtenTensorHandle y) {
  X* result = (X*)Tensor(y).data;
  const long rows = x.sizes[0], in = x.sizes[1], out = w.sizes[0];
  if (scales) linear((const X*)x.data, (const int8_t*)w.data, scales, result, rows, out, in);
#ifdef TILED_FROM
  else if (rows >= TILED_FROM && in % (2 * LANES) == 0 && out % (2 * LANES) == 0)
    linear_in_tiles((const bf16*)x.data, (const bf16*)w.data, (bf16*)result, rows, out, in);
#endif
  else linear((const X*)x.data, (const X*)w.data, scales, result, rows, out, in);
  return AOTI_TORCH_SUCCESS;
}

inline AOTITorchError start(AtenTensorHandle x, AtenTensorHandle w, AtenTensorHandle scales, AtenTensorHandle* y) {
  Tensor inputs(x), weight(w);
  *y = empty(inputs.sizes[0], weight.sizes[0], inputs.dtype);
#ifdef TORCHS_FROM
  if (inputs.sizes[0] >= TORCHS_FROM) {
    const int64_t sizes[] = {weight.sizes[1], weight.sizes[0]}, strides[] = {1, weight.sizes[1]};
    AtenTensorHandle turned;
    aoti_torch__reinterpret_tensor(w, 2, sizes, strides, 0, &turned);
    const AOTITorchError error = aoti_torch_cpu_mm_out(*y, x, turned);
    aoti_torch_delete_tensor_object(turned);
    return error;
  }
#endif
  const void* of_rows = scales ? Tensor(scales).data : nullptr;
  return run(inputs, weight, (const VALUE*)of_rows, *y);
}

inline AOTITorchError attend(Tensor q, Tensor k, Tensor v, Tensor mask, double scale, AtenTensorHandle* y) {
  const int64_t strides[] = {q.sizes[1] * q.sizes[2], q.sizes[2], 1};
  aoti_torch_empty_strided(3, q.sizes, strides, q.dtype, aoti_torch_device_type_cpu(), 0, y);
  Attention<VALUE>{(const VALUE*)q.data, (const VALUE*)k.data, (const VALUE*)v.data, (const VALUE*)mask.data,
                   (VALUE*)Tensor(*y).data, q.sizes[1], k.sizes[2], q.sizes[2], k.sizes[1], k.strides, v.strides,
                   mask.sizes[0] > 1 ? mask.strides[0] : 0, float(scale)}(q.sizes[0]);
  return AOTI_TORCH_SUCCESS;
}
}  // namespace skinny_gemm
#pragma GCC pop_options
