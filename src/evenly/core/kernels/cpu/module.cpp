// The border with Python: pointers are integers, everything else is a number.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <string>

#include "problem.h"

namespace nb = nanobind;
using namespace evenly;

namespace {

struct Choice {
  const Kernels* kernels;
  const char* name;
};

Choice best() {
#ifdef EVENLY_X86
  __builtin_cpu_init();
  const char* wanted = std::getenv("EVENLY_CPU_ISA");
  const std::string isa = wanted ? wanted : "";
  if (isa == "portable") return {&kernels_portable, "portable"};
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx512 && isa != "avx2") return {&kernels_avx512, "avx512"};
  if (avx2) return {&kernels_avx2, "avx2"};
#endif
  return {&kernels_portable, "portable"};
}

const Choice chosen = best();

// Fresh memory costs a page fault for every 4 KiB, which for a large tensor is several times the time to write it.
// Ask for huge pages before the first write, as PyTorch does under THP_MEM_ALLOC_ENABLE=1.
void expect_large(uintptr_t address, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t huge = int64_t{1} << 21;
  if (bytes < 8 * huge || address == 0) return;
  const uintptr_t first = (address + huge - 1) / huge * huge;
  const uintptr_t last = (address + static_cast<uintptr_t>(bytes)) / huge * huge;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

int64_t bytes_of(const Problem& p) {
  const int64_t size = p.dtype == F64 ? 8 : p.dtype == F32 ? 4 : 2;
  return p.K0 * p.R0 * p.K1 * p.R1 * size;
}

// Statistics that nobody keeps.
struct Scratch {
  alignas(64) char here[4096];
  void* heap = nullptr;
  void* take(size_t bytes) { return bytes <= sizeof(here) ? here : (heap = std::malloc(bytes)); }
  ~Scratch() { std::free(heap); }
};

template <class P>
P* at(uintptr_t address) {
  return reinterpret_cast<P*>(address);
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

  int rows() const { return p.mask || p.scale >= SCALE_L2 ? 5 : 3; }
  size_t stats_bytes() const { return static_cast<size_t>(rows() * p.K0 * p.K1) * (p.dtype == F64 ? 8 : 4); }

  // The same problem with a mask, whose index is (o / outer) * size + (o / div) % size.
  Layout masked(uintptr_t mask, int64_t outer, int64_t div, int64_t size) const {
    Layout l = *this;
    l.p.mask = at<uint8_t>(mask), l.p.mouter = outer, l.p.mdiv = div, l.p.msize = size;
    return l;
  }

  int forward(uintptr_t x, uintptr_t y, uintptr_t stats, uintptr_t weight, uintptr_t bias, uintptr_t residual,
              uintptr_t bits, uintptr_t mean_in, uintptr_t var_in, uintptr_t mean_out, uintptr_t var_out,
              uintptr_t running_mean, uintptr_t running_var, double momentum) const {
    Problem q = p;
    q.x = at<void>(x), q.y = at<void>(y), q.stats = at<void>(stats);
    q.weight = at<void>(weight), q.bias = at<void>(bias), q.residual = at<void>(residual);
    q.bits = at<uint8_t>(bits);
    q.relu_bits = p.relu_bits && bits;
    q.mean_in = at<void>(mean_in), q.var_in = at<void>(var_in);
    Scratch scratch;
    if (!stats) {
      q.stats = scratch.take(stats_bytes());
      if (!q.stats) return NO_MEMORY;
    }
    q.mean_out = at<void>(mean_out), q.var_out = at<void>(var_out);
    q.running_mean = at<void>(running_mean), q.running_var = at<void>(running_var);
    q.momentum = momentum;
    expect_large(y, bytes_of(p));
    nb::gil_scoped_release unlocked;
    return chosen.kernels->forward(q);
  }

  int backward(uintptr_t dy, uintptr_t x, uintptr_t stats, uintptr_t weight, uintptr_t bias, uintptr_t residual,
               uintptr_t bits, uintptr_t dx, uintptr_t dweight, uintptr_t dbias, uintptr_t dresidual,
               uintptr_t dmean, uintptr_t dvar) const {
    Problem q = p;
    q.dy = at<void>(dy), q.x = at<void>(x), q.stats = at<void>(stats);
    Scratch scratch;
    if (!stats) {  // they were not kept: measure again
      q.stats = scratch.take(stats_bytes());
      if (!q.stats) return NO_MEMORY;
      Problem m = p;
      m.x = q.x, m.stats = q.stats, m.relu_bits = 0;
      if (const int status = chosen.kernels->forward(m)) return status;
    }
    q.weight = at<void>(weight), q.bias = at<void>(bias), q.residual = at<void>(residual);
    q.bits = at<uint8_t>(bits);
    q.dx = at<void>(dx), q.dweight = at<void>(dweight), q.dbias = at<void>(dbias);
    q.dresidual = at<void>(dresidual);
    q.dmean = at<void>(dmean), q.dvar = at<void>(dvar);
    expect_large(dx, bytes_of(p));
    expect_large(dresidual, bytes_of(p));
    nb::gil_scoped_release unlocked;
    return chosen.kernels->backward(q);
  }
};

}  // namespace

NB_MODULE(_kernels, m) {
  nb::set_leak_warnings(false);  // Layouts are cached by Python until it exits
  m.doc() = "Fused normalization kernels for the CPU.";
  nb::class_<Layout>(m, "Layout")
      .def(nb::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int, int, int, int, bool, bool, bool, double,
                    double>())
      .def("masked", &Layout::masked)
      .def("forward", &Layout::forward)
      .def("backward", &Layout::backward)
      .def_prop_ro("bits_bytes", [](const Layout& l) { return chosen.kernels->bits_bytes(l.p); })
      .def_prop_ro("bits_row", [](const Layout& l) { return chosen.kernels->bits_row(l.p); });
  m.def("isa", [] { return std::string(chosen.name); });
  m.def("threads", &thread_count);
  m.def("pool", [] { return std::string(pool_name()); });
  m.def("set_serial", &set_serial);
}
