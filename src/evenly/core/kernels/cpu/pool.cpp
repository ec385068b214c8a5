// Threads are PyTorch's: the OpenMP runtime that is loaded with it is found by symbol, never linked. A second
// runtime would bring a second pool, oversubscribe the cores and keep its own thread count. Without that
// runtime (PyTorch built on another one) work runs on the calling thread. After a fork the runtime's threads are
// gone and GNU OpenMP waits for them for ever: the child runs on the calling thread.
#include <dlfcn.h>
#include <pthread.h>

#include <atomic>

#include "problem.h"

namespace evenly {
namespace {

using ParallelFn = void (*)(void (*)(void*), void*, unsigned, unsigned);
using IntFn = int (*)();

struct Runtime {
  ParallelFn parallel = nullptr;
  IntFn max_threads = nullptr;
  IntFn in_parallel = nullptr;
};

std::atomic<bool> serial{false};

void after_fork_in_child() { serial.store(true); }

Runtime find_runtime() {
  Runtime r;
  r.parallel = reinterpret_cast<ParallelFn>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  r.max_threads = reinterpret_cast<IntFn>(dlsym(RTLD_DEFAULT, "omp_get_max_threads"));
  r.in_parallel = reinterpret_cast<IntFn>(dlsym(RTLD_DEFAULT, "omp_in_parallel"));
  if (!r.parallel || !r.max_threads || !r.in_parallel) r = Runtime{};
  pthread_atfork(nullptr, nullptr, after_fork_in_child);
  return r;
}

const Runtime& runtime() {
  static const Runtime r = find_runtime();
  return r;
}

struct Shared {
  std::atomic<int64_t> next{0};
  int64_t n;
  Task task;
  void* context;
};

void worker(void* raw) {
  auto* s = static_cast<Shared*>(raw);
  for (;;) {
    const int64_t i = s->next.fetch_add(1, std::memory_order_relaxed);
    if (i >= s->n) return;
    s->task(s->context, i);
  }
}

}  // namespace

void set_serial(bool value) { serial.store(value); }

int thread_count() {
  const Runtime& r = runtime();
  if (!r.parallel || serial.load(std::memory_order_relaxed) || r.in_parallel()) return 1;
  return r.max_threads();
}

const char* pool_name() { return runtime().parallel ? "PyTorch's OpenMP" : "one thread"; }

void run_tasks(int64_t n, Task task, void* context) {
  int threads = n > 1 ? thread_count() : 1;
  if (threads > n) threads = static_cast<int>(n);
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) task(context, i);
    return;
  }
  Shared s;
  s.n = n;
  s.task = task;
  s.context = context;
  runtime().parallel(worker, &s, static_cast<unsigned>(threads), 0);
}

}  // namespace evenly
