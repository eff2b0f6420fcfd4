// Threads that share the units of work of one task after another.
//
// A task is done when its units are, whoever did them: a thread that another program has pushed off its core is not
// waited for unless it is in the middle of one. Threads look for work for a bounded time, then they sleep.
#pragma once
#include <pthread.h>
#include <sched.h>
#include <unistd.h>
#include <atomic>
#include <cstdint>

namespace litgpt {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A list of tasks, done in order. `units` is asked when its turn comes: how many there are may depend on what was done.
struct Tasks {
  long count;
  long (*units)(void* context, long task);
  void (*work)(void* context, long task, long unit);
  void* context;
};

class Pool {
 public:
  // Does the tasks with this many threads, the calling one among them.
  void run(const Tasks& tasks, long threads) {
    if (tasks.count <= 0) return;
    pthread_mutex_lock(&callers_);
    start(threads - 1);
    tasks_ = tasks;
    wanted_.store(threads - 1);
    finished_.store(false);
    next_task(0);
    if (threads > 1 && asleep_.load() > 0) {
      pthread_mutex_lock(&sleepers_);
      pthread_cond_broadcast(&wake_);
      pthread_mutex_unlock(&sleepers_);
    }
    for (long idle = 0; !finished_.load(std::memory_order_acquire);) {
      if (do_some()) idle = 0;
      else if (++idle < PATIENCE) pause();
      else sched_yield();  // the one that is waited for may need this core
    }
    pthread_mutex_unlock(&callers_);
  }

  static Pool& instance() {
    static Pool* pool = [] {
      pthread_atfork(nullptr, nullptr, [] { made() = new Pool; });  // a child has none of its parent's threads
      return nullptr;
    }();
    (void)pool;
    if (!made()) made() = new Pool;
    return *made();
  }

 private:
  static constexpr long PATIENCE = 2000;  // looks for a unit before the caller lets others have the core
  static constexpr long LOOKS = 4000;     // looks for work before a thread sleeps: 0.1 to 0.3 ms
  static constexpr uint64_t UNITS = 1u << 20, NEXT = UNITS - 1;  // more than a task may have; the bits of one such number

  // `ticket_` holds how many units the current task has and which of them is the next, and both change together: a thread
  // that comes late never takes a unit of a task that is over. While a unit is being done, its task is the current one.
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<long> done_{0};
  alignas(64) std::atomic<bool> finished_{true};
  std::atomic<long> task_{0}, asleep_{0}, wanted_{0};
  Tasks tasks_{};
  long started_ = 0;
  pthread_mutex_t callers_ = PTHREAD_MUTEX_INITIALIZER, sleepers_ = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t wake_ = PTHREAD_COND_INITIALIZER;

  static Pool*& made() { static Pool* pool = nullptr; return pool; }

  // Offers the units of the next task that has any. Only the thread is here that did the last unit of the one before.
  void next_task(long task) {
    long units = 0;
    while (task < tasks_.count && (units = tasks_.units(tasks_.context, task)) <= 0) ++task;
    if (task == tasks_.count) {
      finished_.store(true);
      return;
    }
    task_.store(task);
    done_.store(0);
    ticket_.store(uint64_t(units) * UNITS);
  }

  bool do_some() {
    const uint64_t seen = ticket_.load(std::memory_order_relaxed);
    if ((seen & NEXT) >= seen / UNITS) return false;
    const uint64_t mine = ticket_.fetch_add(1), unit = mine & NEXT, units = mine / UNITS;
    if (unit >= units) return false;
    const long task = task_.load();
    tasks_.work(tasks_.context, task, long(unit));
    if (done_.fetch_add(1) + 1 == long(units)) next_task(task + 1);
    return true;
  }

  void start(long helpers) {
    for (; started_ < helpers; ++started_) {
      pthread_t thread;
      auto* mine = new Helper{this, started_};
      if (pthread_create(&thread, nullptr, [](void* p) -> void* { static_cast<Helper*>(p)->help(); return nullptr; }, mine)) {
        delete mine;
        return;
      }
      pthread_detach(thread);
    }
  }

  struct Helper {
    Pool* pool;
    long number;

    void help() {
      for (;;) {
        bool is_wanted = number < pool->wanted_.load(std::memory_order_relaxed);
        for (long idle = 0; is_wanted && idle < LOOKS;)
          if (pool->do_some()) idle = 0;
          else ++idle, pause();
        pthread_mutex_lock(&pool->sleepers_);
        pool->asleep_.fetch_add(1);
        do {
          is_wanted = number < pool->wanted_.load();
          if (pool->finished_.load() || !is_wanted) pthread_cond_wait(&pool->wake_, &pool->sleepers_);
        } while (pool->finished_.load() || number >= pool->wanted_.load());
        pool->asleep_.fetch_sub(1);
        pthread_mutex_unlock(&pool->sleepers_);
      }
    }
  };
};

}  // namespace litgpt
