// What the library offers to Python, as C functions (see native.py).
#include <cstdlib>
#include "step.h"
#if defined(__AMX_TILE__)
#include <sys/syscall.h>
#endif

using namespace litgpt;

namespace {

struct Linear {
  const Matrix* m;
  const void* x;
  int32_t x_type, y_type;
  void* y;
  long rows, threads;
  float *inputs, *products;
  void* prepared;

  long units(long task) const { return task == 0 ? (inputs || prepared ? rows : 0) : units_of(*m, threads); }
  void work(long task, long unit) const {
    if (task == 0) {
      const float* row = (const float*)x + unit * m->in;
      if (inputs) {
        widen(x, x_type, unit * m->in, m->in, inputs + unit * m->in);
        row = inputs + unit * m->in;
      }
      if (prepared) prepare(*m, row, unit, rows, prepared);
      return;
    }
    const long size = rows_of_unit(*m, threads), first = unit * size, end = first + size < m->out ? first + size : m->out;
    float* found = products ? products : (float*)y;
    multiply(*m, inputs ? inputs : (const float*)x, m->in, prepared, rows, found, m->out, first, end);
    if (products)
      for (long b = 0; b < rows; ++b)
        for (long i = b * m->out + first; i < b * m->out + end; ++i) {
          if (y_type == BFLOAT16) narrow(found[i], (bf16*)y + i);
          else narrow(found[i], (half*)y + i);
        }
  }
};

struct Widening {
  const Matrix* m;
  void* y;
  int32_t y_type;
  long first, end, rows;

  long units(long) const { return (end - first + rows - 1) / rows; }
  void work(long, long unit) const {
    const long from = first + unit * rows, to = from + rows < end ? from + rows : end, offset = (from - first) * m->in;
    if (y_type == FLOAT32) widen_rows(*m, (float*)y + offset, from, to);
    else if (y_type == BFLOAT16) widen_rows(*m, (bf16*)y + offset, from, to);
    else widen_rows(*m, (half*)y + offset, from, to);
  }
};

template <class Job> void run(Job& job, long count, long threads) {
  Tasks tasks;
  tasks.count = count;
  tasks.context = &job;
  tasks.units = [](void* p, long task) { return static_cast<Job*>(p)->units(task); };
  tasks.work = [](void* p, long task, long unit) { static_cast<Job*>(p)->work(task, unit); };
  Pool::instance().run(tasks, threads);
}

void* room(long bytes) { return bytes ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr; }

}  // namespace

extern "C" {

// 0 if this process may run what is here.
__attribute__((visibility("default"))) int litgpt_start() {
#if defined(__AMX_TILE__)
  constexpr long ASK = 0x1023, TILES = 18;  // the system lets a process use tiles that has asked
  return syscall(SYS_arch_prctl, ASK, TILES) ? 1 : 0;
#else
  return 0;
#endif
}

// y (rows, out) = x (rows, in) m^T. 1 where memory is short.
__attribute__((visibility("default"))) int litgpt_linear(
    const Matrix* m, const void* x, int32_t x_type, void* y, int32_t y_type, int64_t rows, int64_t threads) {
  if (rows == 0 || m->out == 0) return 0;
  Linear job{m, x, x_type, y_type, y, rows, threads, nullptr, nullptr, nullptr};
  const long prepared = prepared_bytes(*m, rows);
  if (x_type != FLOAT32 && !(job.inputs = (float*)room(rows * m->in * 4))) return 1;
  if (y_type != FLOAT32 && !(job.products = (float*)room(rows * m->out * 4))) return 1;
  if (prepared && !(job.prepared = room(prepared))) return 1;
  run(job, 2, threads);
  std::free(job.inputs), std::free(job.products), std::free(job.prepared);
  return 0;
}

// y (end - first, in) = the rows of m as numbers.
__attribute__((visibility("default"))) void litgpt_widen(
    const Matrix* m, void* y, int32_t y_type, int64_t first, int64_t end, int64_t threads) {
  if (end <= first || m->in == 0) return;
  Widening job{m, y, y_type, first, end, (1 << 14) / m->in / 16 * 16 + 16};
  run(job, 1, threads);
}

// Takes the tokens of a call through a model. 1 where memory is short.
__attribute__((visibility("default"))) int litgpt_step(const Operation* operations, int64_t count, const Call* call) {
  return Step(operations, count, *call).run();
}

__attribute__((visibility("default"))) int64_t litgpt_prepared_bytes(const Matrix* m, int64_t rows) {
  int64_t most = 0;
  for (int64_t some = 1; some <= rows; ++some) most = most < prepared_bytes(*m, some) ? prepared_bytes(*m, some) : most;
  return most;
}

}  // extern "C"
