// A model's step as a list of operations, done in order by all threads: each token of a call goes through all of them. The
// list is made once per model (step_program.py); what differs from call to call is in a Call. Activations are float32.
#pragma once
#include <cmath>
#include <cstdlib>
#include "attention.h"
#include "threads.h"

namespace litgpt {

enum Kind : int64_t { START, EMBED, NORM, PREPARE, LINEAR, ROTATE, ATTEND, MERGE };
enum Activation : int64_t { NONE, SILU, GELU, GELU_TANH, CLAMPED };

// As in step_program.py. A row of x, y and so on begins every `..._stride` numbers, one row for each token.
struct Operation {
  int64_t kind;
  float *x, *y, *other;
  int64_t x_stride, y_stride, other_stride;
  const Matrix *m, *gated;  // of LINEAR: y = activation(x m) * (x gated)
  void* prepared;           // the inputs in the form that `m` wants
  const void *weight, *bias, *gated_bias;
  int64_t weight_type;
  const float* residual;  // y = residual + factor * ...
  int64_t residual_stride;
  int64_t count, width;       // NORM: parts of a row, and their width; ROTATE, ATTEND: query heads, and their size
  int64_t layer, groups;      // of the cache
  int64_t rotation, rotated;  // which of the tables, or -1; how many pairs
  int64_t activation, flag;   // NORM: whether the mean is taken away; ROTATE: whether pairs are neighbours; LINEAR: logits
  double factor, epsilon, offset, scale, cap, clip;
};

struct RingState { int64_t* table; int64_t slots, length, window, read_length; };
struct LayerState { void *keys, *values; int64_t type, ring; };

struct Call {
  int64_t tokens, rings, layers, threads;
  const int64_t *ids, *positions, *rows, *lengths;  // `rows` are those of the cache; the lengths are these rows'
  float* logits;
  int64_t logits_stride;
  const RingState* ring;
  const LayerState* layer;
  const float *frequencies, *magnitudes;  // (tables, pairs), (tables)
  int64_t tables, pairs, long_from;       // long_from: tokens of rows longer than that use the second table
  double query_beta, query_period;        // queries are multiplied by 1 + beta log(1 + position / period)
};

INLINE Floats activated(Floats x, int64_t kind) {
  switch (kind) {
    case SILU: return x / (1 + exp(-x));
    case GELU: return 0.5f * x * (1 + erf(x * 0.707106781f));
    case GELU_TANH: return 0.5f * x * (1 + tanh(0.797884561f * (x + 0.044715f * x * x * x)));
    default: return x;
  }
}

// f on LANES numbers at a time, the last ones in a copy.
template <class F> INLINE void by_lanes(long count, F f) {
  long i = 0;
  for (; i + LANES <= count; i += LANES) f(i, long(LANES));
  if (i < count) f(i, count - i);
}
INLINE Floats load_some(const float* p, long count) {
  if (count == LANES) return load(p);
  float room[LANES] = {};
  std::memcpy(room, p, count * sizeof(float));
  return load(room);
}
INLINE void store_some(float* p, Floats x, long count) { std::memcpy(p, &x, count * sizeof(float)); }

class Step {
 public:
  Step(const Operation* operations, long count, const Call& call) : operations_(operations), count_(count), call_(call) {}

  // 1 where memory is short.
  int run() {
    active_ = room<int32_t>(call_.tokens);
    for (long i = 0; i < call_.tokens; ++i)
      if (call_.positions[i] >= 0) active_[rows_++] = int32_t(i);
      else if (call_.logits) std::memset(call_.logits + i * call_.logits_stride, 0, call_.logits_stride * sizeof(float));
    long slots = 0, heads = 0, found = 0;
    for (long r = 0; r < call_.rings; ++r) slots = slots < read(r) ? read(r) : slots;
    for (long i = 0; i < count_; ++i)
      if (operations_[i].kind == ATTEND) {
        const Operation& o = operations_[i];
        heads = heads < o.count ? o.count : heads;
        found = found < o.count * o.width ? o.count * o.width : found;
      }
    room_ = slots / 2 + 1;
    pieces_ = (slots + PIECE_KEYS - 1) / PIECE_KEYS;
    stretches_ = room<Stretch>(rows_ * call_.rings * room_);
    numbers_ = room<int32_t>(rows_ * call_.rings);
    seen_ = room<int64_t>(rows_ * call_.rings);
    angles_ = room<float>(rows_ * call_.tables * call_.pairs * 2);
    found_ = room<float>(rows_ * pieces_ * found);
    masses_ = room<float>(rows_ * pieces_ * heads * 2);
    heads_ = heads, apart_ = found;
    if (failed_) return 1;
    Tasks tasks;
    tasks.count = count_;
    tasks.context = this;
    tasks.units = [](void* p, long task) { return static_cast<Step*>(p)->units(task); };
    tasks.work = [](void* p, long task, long unit) { static_cast<Step*>(p)->work(task, unit); };
    Pool::instance().run(tasks, call_.threads);
    return 0;
  }
  ~Step() {
    std::free(active_), std::free(stretches_), std::free(numbers_), std::free(seen_);
    std::free(angles_), std::free(found_), std::free(masses_);
  }

 private:
  const Operation* operations_;
  const long count_;
  const Call& call_;
  int32_t *active_ = nullptr, *numbers_ = nullptr;  // the tokens that have a position; of stretches
  Stretch* stretches_ = nullptr;
  int64_t* seen_ = nullptr;
  float *angles_ = nullptr, *found_ = nullptr, *masses_ = nullptr;
  long rows_ = 0, room_ = 0, pieces_ = 0, heads_ = 0, apart_ = 0;
  bool failed_ = false;

  template <class T> T* room(long count) {
    T* p = (T*)std::malloc(count * sizeof(T) + 64);
    failed_ = failed_ || !p;
    return p;
  }
  long read(long ring) const { return call_.ring[ring].read_length; }
  long pieces_of(long row, long ring) const { return (seen_[row * call_.rings + ring] + PIECE_KEYS - 1) / PIECE_KEYS; }

  long units(long task) const {
    const Operation& o = operations_[task];
    switch (o.kind) {
      case START: return rows_ ? 1 : 0;
      case PREPARE: return prepared_bytes(*o.m, rows_) ? rows_ : 0;
      case LINEAR: return rows_ ? units_of(*o.m, call_.threads) : 0;
      case ATTEND: {
        long pieces = 0;
        for (long row = 0; row < rows_; ++row) pieces += pieces_of(row, call_.layer[o.layer].ring);
        return pieces * o.groups;
      }
      default: return rows_;
    }
  }

  void work(long task, long unit) {
    const Operation& o = operations_[task];
    switch (o.kind) {
      case START: return start();
      case EMBED: return embed(o, unit);
      case NORM: return norm(o, unit);
      case PREPARE: return prepare(*o.m, o.x + unit * o.x_stride, unit, rows_, o.prepared);
      case LINEAR: return linear(o, unit);
      case ROTATE: return rotate(o, unit);
      case ATTEND: return attend(o, unit);
      case MERGE: return merge(o, unit);
    }
  }

  // Gives the new tokens their slots, and finds out what each of them sees, and by what it is rotated.
  void start() {
    for (long r = 0; r < call_.rings; ++r) {
      const RingState& ring = call_.ring[r];
      for (long i = 0; i < rows_; ++i) {
        const long token = active_[i], position = call_.positions[token];
        ring.table[call_.rows[token] * ring.slots + position % ring.length] = position;
      }
      for (long i = 0; i < rows_; ++i) {
        const long at = i * call_.rings + r;
        seen_[at] = see(ring.table + call_.rows[active_[i]] * ring.slots, ring.read_length, call_.positions[active_[i]],
                        ring.window, stretches_ + at * room_, numbers_ + at);
      }
    }
    for (long i = 0; i < rows_; ++i)
      for (long t = 0; t < call_.tables; ++t)
        for (long p = 0; p < call_.pairs; ++p) {
          const float angle = float(call_.positions[active_[i]]) * call_.frequencies[t * call_.pairs + p];
          float* pair = angles_ + ((i * call_.tables + t) * 2) * call_.pairs + p;
          pair[0] = cosf(angle) * call_.magnitudes[t];
          pair[call_.pairs] = sinf(angle) * call_.magnitudes[t];
        }
  }

  void embed(const Operation& o, long row) const {
    float* y = o.y + row * o.y_stride;
    widen(o.m->values, o.m->type, call_.ids[active_[row]] * o.m->in, o.m->in, y);
    if (o.factor != 1)
      for (long i = 0; i < o.m->in; ++i) y[i] *= float(o.factor);
  }

  void norm(const Operation& o, long row) const {
    for (long part = 0; part < o.count; ++part) {
      const float* x = o.x + row * o.x_stride + part * o.width;
      float* y = o.y + row * o.y_stride + part * o.width;
      const float* residual = o.residual ? o.residual + row * o.residual_stride + part * o.width : nullptr;
      Floats squares = Floats{}, all_of = Floats{};
      if (o.flag) by_lanes(o.width, [&](long i, long count) { all_of += load_some(x + i, count); });
      const float mean = sum(all_of) / float(o.width);
      by_lanes(o.width, [&](long i, long count) {
        Floats v = load_some(x + i, count) - mean;
        for (long j = count; j < LANES; ++j) v[j] = 0;
        squares = fma(v, v, squares);
      });
      const float scale = 1 / std::sqrt(sum(squares) / float(o.width) + float(o.epsilon));
      const auto scaled = [&](auto* weight) {
        by_lanes(o.width, [&](long i, long count) {
          Floats v = (load_some(x + i, count) - mean) * scale;
          if (weight) for (long j = 0; j < count; ++j) v[j] *= float(o.offset) + wide(weight[i + j]);
          if (o.bias) for (long j = 0; j < count; ++j) v[j] += wide(((decltype(weight))o.bias)[i + j]);
          if (residual) v = load_some(residual + i, count) + float(o.factor) * v;
          store_some(y + i, v, count);
        });
      };
      with_type(o.weight_type, o.weight, scaled);
    }
    if (o.m) prepare(*o.m, o.y + row * o.y_stride, row, rows_, o.prepared);
  }

  void linear(const Operation& o, long unit) const {
    const long size = rows_of_unit(*o.m, call_.threads), first = unit * size;
    const long end = first + size < o.m->out ? first + size : o.m->out;
    multiply(*o.m, o.x, o.x_stride, o.prepared, rows_, o.y, o.y_stride, first, end);
    if (o.gated) multiply(*o.gated, o.x, o.x_stride, o.prepared, rows_, o.other, o.other_stride, first, end);
    for (long row = 0; row < rows_; ++row) {
      float* y = o.y + row * o.y_stride;
      const auto add = [&](const void* bias, float* to) {
        if (bias) with_type(o.weight_type, bias, [&](auto* b) { for (long i = first; i < end; ++i) to[i] += wide(b[i]); });
      };
      add(o.bias, y);
      if (o.clip > 0) for (long i = first; i < end; ++i) y[i] = y[i] > o.clip ? o.clip : y[i] < -o.clip ? -o.clip : y[i];
      if (o.gated) {
        float* other = o.other + row * o.other_stride;
        add(o.gated_bias, other);
        by_lanes(end - first, [&](long i, long count) {
          Floats gate = load_some(y + first + i, count), value = load_some(other + first + i, count);
          if (o.activation == CLAMPED) {
            const Floats limit = all(o.scale);
            gate = -max(-limit, -gate), value = -max(-limit, -max(-limit, value));
            gate = gate / (1 + exp(-float(o.cap) * gate)), value += 1;
          } else gate = activated(gate, o.activation);
          store_some(y + first + i, gate * value, count);
        });
      } else if (o.activation != NONE) {
        by_lanes(end - first, [&](long i, long count) {
          store_some(y + first + i, activated(load_some(y + first + i, count), o.activation), count);
        });
      }
      if (o.residual) {
        const float* residual = o.residual + row * o.residual_stride;
        for (long i = first; i < end; ++i) y[i] = residual[i] + float(o.factor) * y[i];
      }
      if (o.flag) {  // logits, which go where the call wants them
        float* to = call_.logits + active_[row] * call_.logits_stride;
        by_lanes(end - first, [&](long i, long count) {
          Floats v = load_some(y + first + i, count) * float(o.scale);
          if (o.cap > 0) v = float(o.cap) * tanh(v * float(1 / o.cap));
          store_some(to + first + i, v, count);
        });
      }
    }
  }

  // Rotates queries and keys, and puts keys and values into the cache.
  void rotate(const Operation& o, long row) const {
    const long token = active_[row], position = call_.positions[token];
    float* x = o.x + row * o.x_stride;
    if (o.rotation >= 0) {
      const long table = call_.long_from >= 0 ? call_.lengths[token] > call_.long_from : o.rotation;
      const float* cosines = angles_ + ((row * call_.tables + table) * 2) * call_.pairs;
      const float* sines = cosines + call_.pairs;
      for (long head = 0; head < o.count + o.groups; ++head) {
        float* values = x + head * o.width;
        for (long p = 0; p < call_.pairs; ++p) {
          float* first = values + (o.flag ? 2 * p : p);
          float* second = values + (o.flag ? 2 * p + 1 : p + call_.pairs);
          const float a = *first, b = *second;
          *first = a * cosines[p] - b * sines[p];
          *second = b * cosines[p] + a * sines[p];
        }
      }
      if (call_.query_beta != 0) {
        const float factor = 1 + float(call_.query_beta) * log1pf(float(position / long(call_.query_period)));
        for (long i = 0; i < o.count * o.width; ++i) x[i] *= factor;
      }
    }
    const LayerState& layer = call_.layer[o.layer];
    const RingState& ring = call_.ring[layer.ring];
    const long size = o.groups * o.width, place = (call_.rows[token] * ring.slots + position % ring.length) * size;
    const float* keys = x + o.count * o.width;
    with_type(layer.type, layer.keys, [&](auto* k) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(k)>>;
      T* to = (T*)k + place;
      T* values = (T*)layer.values + place;
      for (long i = 0; i < size; ++i) narrow(keys[i], to + i), narrow(keys[size + i], values + i);
    });
  }

  void attend(const Operation& o, long unit) const {
    const LayerState& layer = call_.layer[o.layer];
    const RingState& ring = call_.ring[layer.ring];
    const long group = unit % o.groups;
    long piece = unit / o.groups, row = 0;
    for (long pieces; piece >= (pieces = pieces_of(row, layer.ring)); ++row) piece -= pieces;
    const long heads = o.count / o.groups, stride = o.groups * o.width, at = row * call_.rings + layer.ring;
    const long left = seen_[at] - piece * PIECE_KEYS, keys = left < PIECE_KEYS ? left : PIECE_KEYS;
    const long place = call_.rows[active_[row]] * ring.slots * stride + group * o.width;
    constexpr int MOST = REGISTERS == 32 ? 4 : 2;
    with_type(layer.type, layer.keys, [&](auto* k) {
      const auto* v = (decltype(k))layer.values + place;
      k += place;
      for (long first = 0; first < heads;) {
        const long head = group * heads + first, many = heads - first < MOST ? heads - first : MOST;
        const float* q = o.x + row * o.x_stride + head * o.width;
        float* y = found_ + (row * pieces_ + piece) * apart_ + head * o.width;
        float* most = masses_ + (row * pieces_ + piece) * 2 * heads_ + head;
        const auto some = [&](auto count) {
          attend_piece<decltype(count)::value>(q, k, v, stride, o.width, float(o.scale), float(o.cap), stretches_ + at * room_,
                                               numbers_[at], piece, keys, y, most, most + heads_);
        };
        if (many == MOST) some(std::integral_constant<int, MOST>());
        else if (many == 3) some(std::integral_constant<int, (MOST > 3 ? 3 : 1)>());
        else if (many == 2) some(std::integral_constant<int, 2>());
        else some(std::integral_constant<int, 1>());
        first += many;
      }
    });
  }

  void merge(const Operation& o, long row) const {
    const float* masses = masses_ + row * pieces_ * 2 * heads_;
    for (long head = 0; head < o.count; ++head) {
      const float sink = o.weight ? value_at(o.weight, o.weight_type, head) : 0;
      merge_head(found_ + row * pieces_ * apart_ + head * o.width, masses + head, masses + heads_ + head,
                 pieces_of(row, call_.layer[o.layer].ring), apart_, 2 * heads_, o.width, o.weight ? &sink : nullptr,
                 o.y + row * o.y_stride + head * o.width);
    }
    if (o.m) prepare(*o.m, o.y + row * o.y_stride, row, rows_, o.prepared);
  }
};

}  // namespace litgpt
