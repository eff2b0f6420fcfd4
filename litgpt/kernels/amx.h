// Tiles (AMX): 16 rows of a bfloat16 weight as they lie, times 16 rows of inputs, which are put into pairs of values first.
#pragma once
#include "vectors.h"

namespace litgpt {

constexpr long FEWEST_TILED = 5, TILE = 16;  // rows of inputs for which tiles are the quicker way (measured)

INLINE bool suits_tiles(long rows, long out, long in) { return rows >= FEWEST_TILED && out % 32 == 0 && in % 32 == 0; }

// Row `b`: tiles of 16 pairs by 16 rows. What is beyond the last row is multiplied too, and not kept.
inline void put_into_tiles(const float* x, long b, long rows, long in, uint32_t* y) {
  const long parts = (rows + TILE - 1) / TILE;
  uint32_t* of_row = y + b / TILE * TILE * TILE + b % TILE;
  for (long pair = 0; pair < in / 2; ++pair) {
    struct { bf16 first, second; } both;
    narrow(x[2 * pair], &both.first);
    narrow(x[2 * pair + 1], &both.second);
    of_row[(pair / TILE * parts * TILE + pair % TILE) * TILE] = bit_cast<uint32_t>(both);
  }
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

INLINE void keep_tile(const float* tile, float* y, long y_stride, long rows) {  // 16 outputs each of some rows
  const __m512i places = _mm512_mullo_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(TILE));
  for (long b = 0; b < rows && b < TILE; ++b) _mm512_storeu_ps(y + b * y_stride, _mm512_i32gather_ps(places, tile + b, 4));
}

// 32 rows of the weight at a time, for PARTS times 16 rows of inputs from `part` on.
template <int PARTS> inline void some_tiles(
    const uint32_t* pairs, const bf16* w, float* y, long y_stride, long rows, long first, long end, long in, long part,
    long parts) {
  alignas(64) float sums[TILE * TILE];
  for (; first < end; first += 2 * TILE) {
    const bf16* some = w + first * in;
    const char* next = (const char*)(some + 2 * TILE * in);
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (long k = 0; k < in; k += 2 * TILE) {
      for (int line = 0; line < 2 * TILE; ++line) _mm_prefetch(next + (k + line) * 64, _MM_HINT_T1);
      const uint32_t* inputs = pairs + (k / 2 * parts + part * TILE) * TILE;
      _tile_loadd(4, some + k, 2 * in);
      _tile_loadd(5, some + TILE * in + k, 2 * in);
      _tile_loadd(6, inputs, 4 * TILE);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      if (PARTS == 2) {
        _tile_loadd(7, inputs + TILE * TILE, 4 * TILE);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    float* found = y + part * TILE * y_stride + first;
    const long left = rows - part * TILE;
    _tile_stored(0, sums, 4 * TILE); keep_tile(sums, found, y_stride, left);
    _tile_stored(1, sums, 4 * TILE); keep_tile(sums, found + TILE, y_stride, left);
    if (PARTS == 2) {
      found += TILE * y_stride;
      _tile_stored(2, sums, 4 * TILE); keep_tile(sums, found, y_stride, left - TILE);
      _tile_stored(3, sums, 4 * TILE); keep_tile(sums, found + TILE, y_stride, left - TILE);
    }
  }
}

inline void tiles_all(
    const uint32_t* pairs, const bf16* w, float* y, long y_stride, long rows, long first, long end, long in) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.rows[tile] = TILE, config.bytes[tile] = 4 * TILE;
  _tile_loadconfig(&config);
  const long parts = (rows + TILE - 1) / TILE;
  for (; first < end; first += 2 * TILE) {  // of which all inputs are multiplied while they are in the nearest cache
    long part = 0;
    for (; part + 2 <= parts; part += 2)
      some_tiles<2>(pairs, w, y, y_stride, rows, first, first + 2 * TILE, in, part, parts);
    if (part < parts) some_tiles<1>(pairs, w, y, y_stride, rows, first, first + 2 * TILE, in, part, parts);
  }
  _tile_release();
}

}  // namespace litgpt
