// A weight of any kind, and its products with inputs that are prepared for it.
#pragma once
#include "blocks.h"
#include "int4.h"
#include "linear.h"
#ifdef __AMX_BF16__
#include "amx.h"
#endif

namespace litgpt {

enum Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT8 = 3, INT4 = 4, BLOCKS = 5 };  // and those after it

// As `Matrix` in native.py.
struct Matrix {
  int32_t type, scale_type;
  int64_t out, in;
  const void *values, *scales;
  int64_t exact;  // whether inputs stay in float32 where the CPU multiplies pairs of bfloat16
};

// Calls f with a pointer of the type.
template <class F> INLINE void with_type(int32_t type, const void* p, F f) {
  if (type == FLOAT32) f((const float*)p);
  else if (type == BFLOAT16) f((const bf16*)p);
  else f((const half*)p);
}

// Calls f with a format of blocks, of those in native.py's order.
template <class F> INLINE void with_format(int32_t type, F f) {
  switch (type - BLOCKS) {
    case 0: return f(Small<4, false>{});
    case 1: return f(Small<4, true>{});
    case 2: return f(Small<5, false>{});
    case 3: return f(Small<5, true>{});
    case 4: return f(Q8_0{});
    case 5: return f(Q2_K{});
    case 6: return f(Q3_K{});
    case 7: return f(Q4_K{});
    case 8: return f(Q5_K{});
    case 9: return f(Q6_K{});
  }
}

// A row of numbers of any type, as float32.
inline void widen(const void* x, int32_t type, long offset, long count, float* y) {
  with_type(type, x, [&](auto* p) {
    p += offset;
    long i = 0;
    for (; i + LANES <= count; i += LANES) store(y + i, load(p + i));
    for (; i < count; ++i) y[i] = wide(p[i]);
  });
}
inline float value_at(const void* x, int32_t type, long i) {
  float y = 0;
  with_type(type, x, [&](auto* p) { y = wide(p[i]); });
  return y;
}

// In which form the inputs have to be.
enum Form { FLOATS, PAIRS, TILES, GROUPS, SPANS };

INLINE Form form_of(const Matrix& m, [[maybe_unused]] long rows) {
  if (m.type == INT4) return GROUPS;
  if (m.type >= BLOCKS) return SPANS;
#ifdef __AVX512BF16__
  if (m.type == BFLOAT16 && !m.exact) {
#ifdef __AMX_BF16__
    if (suits_tiles(rows, m.out, m.in)) return TILES;
#endif
    return PAIRS;
  }
#endif
  return FLOATS;
}

// Bytes of prepared inputs; 0 where they are used as they are.
inline int64_t prepared_bytes(const Matrix& m, long rows) {
  switch (form_of(m, rows)) {
    case PAIRS: return rows * m.in * 2;
    case TILES: return (rows + 15) / 16 * 16 * m.in * 2;
    case GROUPS: return rows * ((m.in + GROUP - 1) / GROUP) * (long)sizeof(GroupInputs);
    case SPANS: return rows * SpanInputs::bytes(m.in);
    default: return 0;
  }
}

// Row `b` of the inputs.
inline void prepare(const Matrix& m, const float* x, long b, long rows, void* prepared) {
  switch (form_of(m, rows)) {
    case PAIRS: {
      bf16* y = (bf16*)prepared + b * m.in;
      for (long i = 0; i < m.in; ++i) narrow(x[i], y + i);
      break;
    }
    case GROUPS:
      quantise_inputs(x, m.in, (GroupInputs*)prepared + b * ((m.in + GROUP - 1) / GROUP));
      break;
    case SPANS: quantise_spans(x, m.in, b, prepared); break;
#ifdef __AMX_BF16__
    case TILES: put_into_tiles(x, b, rows, m.in, (uint32_t*)prepared); break;
#endif
    default: break;
  }
}

// How many rows of the weight are one unit of work: enough for the memory to be read at its speed, few enough that the
// threads are done at the same time.
inline long rows_of_unit(const Matrix& m, long threads) {
  constexpr long BYTES = 1 << 16, STEP = 32;
  const long bits = m.type == FLOAT32 ? 32 : m.type == INT8 ? 8 : m.type == INT4 ? 5 : m.type >= BLOCKS ? 6 : 16;
  const long by_size = BYTES * 8 / (bits * (m.in ? m.in : 1)), by_threads = m.out / (4 * threads);
  long rows = by_size < by_threads ? by_size : by_threads;
  rows = (rows + STEP - 1) / STEP * STEP;
  if (rows < STEP) rows = STEP;
  while ((m.out + rows - 1) / rows > 1 << 18) rows *= 2;
  return rows;
}
inline long units_of(const Matrix& m, long threads) {
  const long rows = rows_of_unit(m, threads);
  return (m.out + rows - 1) / rows;
}

// Columns `first` to `end` of the products: y[row * y_stride + column]. `first` is a multiple of 32.
inline void multiply(const Matrix& m, const float* x, long x_stride, const void* prepared, long rows, float* y, long y_stride,
                     long first, long end) {
  if (m.type >= BLOCKS)
    return with_format(m.type, [&](auto format) {
      blocks_all<decltype(format)>(prepared, rows, (const uint8_t*)m.values, m.in, y, y_stride, first, end);
    });
  switch (m.type) {
    case FLOAT32: return dot_all(x, rows, x_stride, (const float*)m.values, m.in, y, y_stride, first, end);
    case FLOAT16: return dot_all(x, rows, x_stride, (const half*)m.values, m.in, y, y_stride, first, end);
    case BFLOAT16: {
      const bf16* w = (const bf16*)m.values;
#ifdef __AVX512BF16__
#ifdef __AMX_BF16__
      if (form_of(m, rows) == TILES) return tiles_all((const uint32_t*)prepared, w, y, y_stride, rows, first, end, m.in);
#endif
      if (form_of(m, rows) == PAIRS) return pairs_all((const bf16*)prepared, rows, m.in, w, m.in, y, y_stride, first, end);
#endif
      return dot_all(x, rows, x_stride, w, m.in, y, y_stride, first, end);
    }
    case INT8: {
      dot_all(x, rows, x_stride, (const int8_t*)m.values, m.in, y, y_stride, first, end);
      for (long b = 0; b < rows; ++b)
        with_type(m.scale_type, m.scales, [&](auto* scales) {
          for (long r = first; r < end; ++r) y[b * y_stride + r] *= wide(scales[r]);
        });
      return;
    }
    case INT4:
      with_type(m.scale_type, m.scales, [&](auto* scales) {
        int4_all((const GroupInputs*)prepared, rows, (const uint8_t*)m.values, scales, m.in, y, y_stride, first, end);
      });
  }
}

// Rows of the weight as numbers, (end - first, in).
template <class Y> void widen_rows(const Matrix& m, Y* y, long first, long end) {
  if (m.type >= BLOCKS)
    return with_format(m.type, [&](auto format) {
      widen_blocks<decltype(format)>((const uint8_t*)m.values, m.in, y, first, end);
    });
  if (m.type == INT4) {
    with_type(m.scale_type, m.scales, [&](auto* scales) {
      widen_int4((const uint8_t*)m.values, scales, m.in, y, first, end);
    });
    return;
  }
  const auto rows_from = [&](auto* values) {
    for (long row = first; row < end; ++row, y += m.in) {
      const float scale = m.type == INT8 ? value_at(m.scales, m.scale_type, row) : 1;
      auto* w = values + row * m.in;
      long i = 0;
      for (; i + LANES <= m.in; i += LANES) store_narrow(y + i, load(w + i) * scale);
      for (; i < m.in; ++i) narrow(wide(w[i]) * scale, y + i);
    }
  };
  if (m.type == INT8) rows_from((const int8_t*)m.values);
  else with_type(m.type, m.values, rows_from);
}

}  // namespace litgpt
