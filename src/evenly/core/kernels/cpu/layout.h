// A pattern and a shape, lowered and ready to launch on the memory of tensors.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <cstdlib>
#include <string>

#include "pieces.h"
#include "problem.h"
#include "tensors.h"

namespace evenly {
namespace {

struct Choice {
  const Kernels* kernels;
  const Pieces* pieces;
  const char* name;
};

Choice best() {
#ifdef EVENLY_X86
  __builtin_cpu_init();
  const char* wanted = std::getenv("EVENLY_CPU_ISA");
  const std::string isa = wanted ? wanted : "";
  if (isa == "portable") return {&kernels_portable, &pieces_portable, "portable"};
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx512 && isa != "avx2") {
#ifdef EVENLY_AVX512_BF16
    if (__builtin_cpu_supports("avx512bf16") && isa != "avx512")
      return {&kernels_avx512_bf16, &pieces_avx512, "avx512 and avx512_bf16"};
#endif
    return {&kernels_avx512, &pieces_avx512, "avx512"};
  }
  if (avx2) return {&kernels_avx2, &pieces_avx2, "avx2"};
#endif
  return {&kernels_portable, &pieces_portable, "portable"};
}

const Choice chosen = best();

// Fresh memory costs a page fault for every 4 KiB, which for a large tensor is several times the time to write it.
// Ask for huge pages before the first write, as PyTorch does under THP_MEM_ALLOC_ENABLE=1.
void expect_large(Memory memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t huge = int64_t{1} << 21;
  if (bytes < 8 * huge || !memory) return;
  const auto address = reinterpret_cast<uintptr_t>(memory.at);
  const uintptr_t first = (address + huge - 1) / huge * huge;
  const uintptr_t last = (address + static_cast<uintptr_t>(bytes)) / huge * huge;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

int64_t bytes_of(int dtype, int64_t values) { return values * (dtype == F64 ? 8 : dtype == F32 ? 4 : 2); }

// Bytes of the tensors of a pass from which on its outputs are written past the caches. Measured with 2 MiB of second
// cache a core, the next reader included: up to 1.5 times faster from here on where the inputs come from memory, as they
// do in a network, and up to a fifth slower where all of them are in the third cache; from 24 MiB on faster in any case.
std::atomic<int64_t> far_from{16 << 20};

// Other Python threads may go on meanwhile, unless the work is over sooner than that takes.
template <class Work>
void run(int64_t values, Work work) {
  constexpr int64_t few = int64_t{1} << 13;
  int status = OK;
  if (values < few) {
    status = work();
  } else {
    nb::gil_scoped_release unlocked;
    status = work();
  }
  if (status == OK) return;
  PyErr_SetString(PyExc_MemoryError, "The CPU kernels could not allocate their working memory.");
  throw nb::python_error();
}

// Statistics that nobody keeps.
struct Scratch {
  alignas(64) char here[4096];
  void* heap = nullptr;
  void* take(size_t bytes) { return bytes <= sizeof(here) ? here : (heap = std::malloc(bytes)); }
  ~Scratch() { std::free(heap); }
};

template <class P>
P* at(Memory memory) {
  return static_cast<P*>(memory.at);
}

// The choices that do not change from call to call, and the sizes: made once for a pattern and a shape.
struct Layout {
  Problem p{};

  Layout(int64_t K0, int64_t R0, int64_t K1, int64_t R1, int64_t wdiv, int64_t wsize, int dtype, int wdtype,
         int act, int scale, bool center, bool given, bool relu_bits, double eps, double correction) {
    p.K0 = K0, p.R0 = R0, p.K1 = K1, p.R1 = R1;
    p.wdiv = wdiv, p.wsize = wsize;
    p.dtype = dtype, p.wdtype = wdtype;
    p.act = act, p.scale = scale;
    p.center = center, p.given = given, p.relu_bits = relu_bits;
    p.eps = eps, p.correction = correction;
  }

  int64_t values() const { return p.K0 * p.R0 * p.K1 * p.R1; }
  int64_t bytes() const { return bytes_of(p.dtype, values()); }
  int rows() const { return p.mask || p.scale >= SCALE_L2 ? 5 : 3; }
  size_t stats_bytes() const { return static_cast<size_t>(rows() * p.K0 * p.K1) * (p.dtype == F64 ? 8 : 4); }

  Problem fresh() const {
    Problem q = p;
    q.far = far_from.load(std::memory_order_relaxed);
    return q;
  }

  // The same problem with a mask, whose index is (o / outer) * size + (o / div) % size.
  Layout masked(Memory mask, int64_t outer, int64_t div, int64_t size) const {
    Layout l = *this;
    l.p.mask = at<uint8_t>(mask), l.p.mouter = outer, l.p.mdiv = div, l.p.msize = size;
    return l;
  }

  void forward(Memory x, Memory y, Memory stats, Memory weight, Memory bias, Memory residual, Memory bits,
               Memory mean_in, Memory var_in, Memory mean_out, Memory var_out, Memory running_mean,
               Memory running_var, double momentum, int sdtype) const {
    Problem q = fresh();
    q.x = x.at, q.y = y.at, q.stats = stats.at;
    q.weight = weight.at, q.bias = bias.at, q.residual = residual.at;
    q.bits = at<uint8_t>(bits);
    q.relu_bits = p.relu_bits && bits;
    q.mean_in = mean_in.at, q.var_in = var_in.at;
    q.mean_out = mean_out.at, q.var_out = var_out.at;
    q.running_mean = running_mean.at, q.running_var = running_var.at;
    q.momentum = momentum;
    q.sdtype = sdtype;
    expect_large(y, bytes());
    run(values(), [&] {
      Scratch scratch;
      if (!q.stats) q.stats = scratch.take(stats_bytes());
      return q.stats ? chosen.kernels->forward(q) : NO_MEMORY;
    });
  }

  // The output once more, from the statistics that an earlier pass kept.
  void again(Memory x, Memory y, Memory stats, Memory weight, Memory bias, Memory residual) const {
    Problem q = fresh();
    q.ready = 1, q.relu_bits = 0;
    q.x = x.at, q.y = y.at, q.stats = stats.at;
    q.weight = weight.at, q.bias = bias.at, q.residual = residual.at;
    expect_large(y, bytes());
    run(values(), [&] { return chosen.kernels->forward(q); });
  }

  void backward(Memory dy, Memory x, Memory stats, Memory weight, Memory bias, Memory residual, Memory bits, Memory dx,
                Memory dweight, Memory dbias, Memory dresidual, Memory dmean, Memory dvar) const {
    Problem q = fresh();
    q.dy = dy.at, q.x = x.at, q.stats = stats.at;
    q.weight = weight.at, q.bias = bias.at, q.residual = residual.at;
    q.bits = at<uint8_t>(bits);
    q.relu_bits = p.relu_bits && bits;
    q.dx = dx.at, q.dweight = dweight.at, q.dbias = dbias.at;
    q.dresidual = dresidual.at;
    q.dmean = dmean.at, q.dvar = dvar.at;
    expect_large(dx, bytes());
    expect_large(dresidual, bytes());
    run(values(), [&]() -> int {
      Scratch scratch;
      if (!q.stats) {  // they were not kept: measure again
        q.stats = scratch.take(stats_bytes());
        if (!q.stats) return NO_MEMORY;
        Problem m = fresh();
        m.x = q.x, m.stats = q.stats, m.relu_bits = 0;
        if (const int status = chosen.kernels->forward(m)) return status;
      }
      return chosen.kernels->backward(q);
    });
  }
};

}  // namespace
}  // namespace evenly
