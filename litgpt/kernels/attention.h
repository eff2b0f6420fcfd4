// Attention of single tokens to what their rows of the cache hold: q (H, D) in float32, keys and values (slots, G, D) of any
// type. A token sees stretches of slots; long ones are cut into pieces, which threads share and `merge_heads` puts together.
#pragma once
#include "matrix.h"

namespace litgpt {

constexpr long PIECE_KEYS = 256;  // a piece of the keys that a token sees

constexpr float LOWEST = -3e38f;

struct Stretch { int32_t first, end; };

// Which slots of a ring a token at `position` sees: those that hold a position within its window. Returns how many slots,
// and writes the stretches, of which there may be (slots + 1) / 2.
inline long see(const int64_t* table, long slots, long position, long window, Stretch* stretches, int32_t* count) {
  const long from = window > 0 && position >= window ? position - window + 1 : 0;
  long seen = 0, number = 0;
  for (long s = 0; s < slots;) {
    while (s < slots && (table[s] < from || table[s] > position)) ++s;
    if (s == slots) break;
    const long first = s;
    while (s < slots && table[s] >= from && table[s] <= position) ++s;
    stretches[number++] = {int32_t(first), int32_t(s)};
    seen += s - first;
  }
  *count = int32_t(number);
  return seen;
}

// The slots of a piece, one stretch after another: f(first, end, where the first stands in the piece).
template <class F> INLINE void for_piece(const Stretch* stretches, long count, long piece, F f) {
  long skip = piece * PIECE_KEYS, left = PIECE_KEYS, place = 0;
  for (long i = 0; i < count && left > 0; ++i) {
    long first = stretches[i].first;
    const long length = stretches[i].end - first;
    if (skip >= length) { skip -= length; continue; }
    first += skip;
    long end = stretches[i].end;
    if (end - first > left) end = first + left;
    skip = 0;
    f(first, end, place);
    place += end - first;
    left -= end - first;
  }
}

// What COUNT heads of one group find in a piece of so many keys: y (COUNT, D) is the sum of values weighted by
// exp(score - most), `mass` that of the weights. `k` and `v` are those of the row and the group, a slot every `stride`
// values.
template <int COUNT, class T>
inline void attend_piece(const float* q, const T* k, const T* v, long stride, long size, float scale, float cap,
                         const Stretch* stretches, long count, long piece, long keys, float* y, float* most, float* mass) {
  alignas(64) float scores[COUNT][PIECE_KEYS + LANES];
  for_piece(stretches, count, piece, [&](long first, long end, long place) {
    for (long s = first; s < end; s += 4, place += 4) {
      const long some = end - s < 4 ? end - s : 4;
      const T* rows[4];
      UNROLLED for (int i = 0; i < 4; ++i) rows[i] = k + (s + (i < some ? i : 0)) * stride;
      Floats sums[COUNT][4];
      UNROLLED for (int h = 0; h < COUNT; ++h) UNROLLED for (int i = 0; i < 4; ++i) sums[h][i] = Floats{};
      long d = 0;
      for (; d + LANES <= size; d += LANES) {
        Floats part[4];
        UNROLLED for (int i = 0; i < 4; ++i) part[i] = load(rows[i] + d);
        UNROLLED for (int h = 0; h < COUNT; ++h) {
          const Floats query = load(q + h * size + d);
          UNROLLED for (int i = 0; i < 4; ++i) sums[h][i] = fma(query, part[i], sums[h][i]);
        }
      }
      for (int h = 0; h < COUNT; ++h) {
        Four found = sums_of_4(sums[h]);
        for (long j = d; j < size; ++j)
          for (int i = 0; i < 4; ++i) found[i] += q[h * size + j] * wide(rows[i][j]);
        std::memcpy(scores[h] + place, &found, some * sizeof(float));
      }
    }
  });
  const long padded = (keys + LANES - 1) / LANES * LANES;
  for (int h = 0; h < COUNT; ++h) {
    float* of_head = scores[h];
    for (long s = keys; s < padded; ++s) of_head[s] = 0;
    for (long s = 0; s < padded; s += LANES) {
      Floats score = load(of_head + s) * scale;
      if (cap > 0) score = cap * tanh(score * (1 / cap));
      store(of_head + s, score);
    }
    for (long s = keys; s < padded; ++s) of_head[s] = LOWEST;
    Floats highest = all(LOWEST), total = Floats{};
    for (long s = 0; s < padded; s += LANES) highest = max(highest, load(of_head + s));
    const float peak = largest(highest);
    for (long s = 0; s < padded; s += LANES) {
      const Floats weight = exp(load(of_head + s) - peak);
      store(of_head + s, weight);
      total += weight;
    }
    most[h] = peak;
    mass[h] = sum(total);
  }
  constexpr int WIDE = REGISTERS == 32 ? 4 : 2;  // vectors of the values that are added up at a time
  const auto add_values = [&](long d, auto vectors) __attribute__((always_inline)) {
    constexpr int VECTORS = decltype(vectors)::value;
    Floats sums[COUNT][VECTORS];
    UNROLLED for (int h = 0; h < COUNT; ++h) UNROLLED for (int i = 0; i < VECTORS; ++i) sums[h][i] = Floats{};
    for_piece(stretches, count, piece, [&](long first, long end, long place) {
      for (long s = first; s < end; ++s, ++place) {
        Floats part[VECTORS];
        UNROLLED for (int i = 0; i < VECTORS; ++i) part[i] = load(v + s * stride + d + i * LANES);
        UNROLLED for (int h = 0; h < COUNT; ++h) {
          const Floats weight = all(scores[h][place]);
          UNROLLED for (int i = 0; i < VECTORS; ++i) sums[h][i] = fma(weight, part[i], sums[h][i]);
        }
      }
    });
    UNROLLED for (int h = 0; h < COUNT; ++h)
      UNROLLED for (int i = 0; i < VECTORS; ++i) store(y + h * size + d + i * LANES, sums[h][i]);
  };
  long d = 0;
  for (; d + WIDE * LANES <= size; d += WIDE * LANES) add_values(d, std::integral_constant<int, WIDE>());
  for (; d + LANES <= size; d += LANES) add_values(d, std::integral_constant<int, 1>());
  for (; d < size; ++d)
    for (int h = 0; h < COUNT; ++h) {
      float total = 0;
      for_piece(stretches, count, piece, [&](long first, long end, long place) {
        for (long s = first; s < end; ++s, ++place) total += scores[h][place] * wide(v[s * stride + d]);
      });
      y[h * size + d] = total;
    }
}

// One head: pieces of it lie `apart` numbers from each other, `most` and `mass` `heads` numbers. A sink is one more key,
// which has no value.
inline void merge_head(const float* found, const float* most, const float* mass, long pieces, long apart, long heads,
                       long size, const float* sink, float* y) {
  float peak = sink ? *sink : LOWEST;
  for (long p = 0; p < pieces; ++p) peak = most[p * heads] > peak ? most[p * heads] : peak;
  float total = sink ? __builtin_expf(*sink - peak) : 0;
  for (long p = 0; p < pieces; ++p) {
    const float weight = __builtin_expf(most[p * heads] - peak);
    total += weight * mass[p * heads];
    for (long d = 0; d < size; ++d) y[d] = (p ? y[d] : 0) + weight * found[p * apart + d];
  }
  for (long d = 0; d < size; ++d) y[d] /= total;
}

}  // namespace litgpt
