// Threads are PyTorch's: the OpenMP runtime that its kernels were linked to is found by symbol, never linked. A second
// runtime would bring a second pool, oversubscribe the cores and keep its own thread count. Without that
// runtime (PyTorch built on another one) work runs on the calling thread. After a fork the runtime's threads are
// gone and GNU OpenMP waits for them for ever: the child runs on the calling thread.
#include <dlfcn.h>
#include <pthread.h>
#if defined(__linux__)
#include <link.h>
#endif

#include <atomic>
#include <cstring>
#include <string>

#include "problem.h"

namespace evenly {
namespace {

using ParallelFn = void (*)(void (*)(void*), void*, unsigned, unsigned);
using IntFn = int (*)();

struct Runtime {
  ParallelFn parallel = nullptr;
  IntFn max_threads = nullptr;
  IntFn in_parallel = nullptr;
  IntFn thread_number = nullptr;
};

std::atomic<bool> serial{false};

void after_fork_in_child() { serial.store(true); }

// Where to look for symbols: PyTorch's kernels and what they depend on. Their runtime may be private to them, as it is
// in the wheels for Arm, and other packages may have loaded one of their own.
void* scope() {
#if defined(__linux__)
  std::string path;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* found) {
        if (!info->dlpi_name || !std::strstr(info->dlpi_name, "/libtorch_cpu.so")) return 0;
        *static_cast<std::string*>(found) = info->dlpi_name;
        return 1;
      },
      &path);
  if (!path.empty())
    if (void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD)) return library;
#endif
  return RTLD_DEFAULT;
}

Runtime find_runtime() {
  Runtime r;
  void* const from = scope();
  r.parallel = reinterpret_cast<ParallelFn>(dlsym(from, "GOMP_parallel"));
  r.max_threads = reinterpret_cast<IntFn>(dlsym(from, "omp_get_max_threads"));
  r.in_parallel = reinterpret_cast<IntFn>(dlsym(from, "omp_in_parallel"));
  r.thread_number = reinterpret_cast<IntFn>(dlsym(from, "omp_get_thread_num"));
  if (!r.parallel || !r.max_threads || !r.in_parallel || !r.thread_number) r = Runtime{};
  pthread_atfork(nullptr, nullptr, after_fork_in_child);
  return r;
}

const Runtime& runtime() {
  static const Runtime r = find_runtime();
  return r;
}

// A range of tasks for each thread, so that the same thread has the same tasks in every call, and what it wrote is in
// its own cache; one that is done takes from the others.
constexpr int MOST = 64;  // threads with a range of their own

struct alignas(64) Range {
  std::atomic<int64_t> next{0};
  int64_t start = 0, end = 0;
};

struct Shared {
  int ranges = 0;
  bool backwards = false;
  Task task = nullptr;
  void* context = nullptr;
  Range* range = nullptr;
};

void worker(void* raw) {
  auto* s = static_cast<Shared*>(raw);
  const int own = runtime().thread_number();
  for (int i = 0; i < s->ranges; ++i) {
    Range& r = s->range[(own + i) % s->ranges];
    for (;;) {
      if (r.next.load(std::memory_order_relaxed) >= r.end) break;
      const int64_t task = r.next.fetch_add(1, std::memory_order_relaxed);
      if (task >= r.end) break;
      s->task(s->context, s->backwards ? r.start + r.end - 1 - task : task);
    }
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

void run_tasks(int64_t n, Task task, void* context, bool backwards) {
  int threads = n > 1 ? thread_count() : 1;
  if (threads > n) threads = static_cast<int>(n);
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) task(context, backwards ? n - 1 - i : i);
    return;
  }
  Shared s;
  Range ranges[MOST];
  s.ranges = threads < MOST ? threads : MOST;
  s.backwards = backwards;
  s.task = task;
  s.context = context;
  s.range = ranges;
  for (int i = 0; i < s.ranges; ++i) {
    ranges[i].start = n * i / s.ranges;
    ranges[i].next.store(ranges[i].start, std::memory_order_relaxed);
    ranges[i].end = n * (i + 1) / s.ranges;
  }
  runtime().parallel(worker, &s, static_cast<unsigned>(threads), 0);
}

}  // namespace evenly
