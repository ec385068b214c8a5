// The border with Python: pointers are integers, everything else is a number.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <string>

#include "pieces.h"
#include "problem.h"

namespace nb = nanobind;
using namespace evenly;

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
  if (avx512 && isa != "avx2") return {&kernels_avx512, &pieces_avx512, "avx512"};
  if (avx2) return {&kernels_avx2, &pieces_avx2, "avx2"};
#endif
  return {&kernels_portable, &pieces_portable, "portable"};
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

int64_t bytes_of(int dtype, int64_t values) { return values * (dtype == F64 ? 8 : dtype == F32 ? 4 : 2); }
int64_t bytes_of(const Problem& p) { return bytes_of(p.dtype, p.K0 * p.R0 * p.K1 * p.R1); }

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
              uintptr_t running_mean, uintptr_t running_var, double momentum, int sdtype) const {
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
    q.sdtype = sdtype;
    expect_large(y, bytes_of(p));
    nb::gil_scoped_release unlocked;
    return chosen.kernels->forward(q);
  }

  // The output once more, from the statistics that an earlier pass kept.
  int again(uintptr_t x, uintptr_t y, uintptr_t stats, uintptr_t weight, uintptr_t bias, uintptr_t residual) const {
    Problem q = p;
    q.ready = 1, q.relu_bits = 0;
    q.x = at<void>(x), q.y = at<void>(y), q.stats = at<void>(stats);
    q.weight = at<void>(weight), q.bias = at<void>(bias), q.residual = at<void>(residual);
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

// ---- the pieces of layers whose gradient is not autograd's (pieces.h)

int sums(int dtype, int64_t K0, int64_t R0, int64_t K1, int64_t R1, uintptr_t x, uintptr_t g, uintptr_t m,
         uintptr_t first, uintptr_t second) {
  nb::gil_scoped_release unlocked;
  return chosen.pieces->sums({dtype, K0, R0, K1, R1}, at<void>(x), at<void>(g), at<double>(m), at<double>(first),
                             at<double>(second));
}

int products(int dtype, int64_t rows, int64_t n, uintptr_t g, uintptr_t x, uintptr_t out, int64_t apart) {
  nb::gil_scoped_release unlocked;
  return chosen.pieces->products(dtype, rows, n, at<void>(g), at<void>(x), at<double>(out), apart);
}

int advance(int dtype, int64_t rows, int64_t n, uintptr_t g, double gain, uintptr_t slope, uintptr_t x) {
  nb::gil_scoped_release unlocked;
  return chosen.pieces->advance(dtype, rows, n, at<void>(g), gain, at<double>(slope), at<void>(x));
}

int combine(int dtype, int64_t K0, int64_t R0, int64_t K1, int64_t R1, uintptr_t x, uintptr_t g, uintptr_t gain,
            uintptr_t m, uintptr_t slope, uintptr_t shift, uintptr_t y) {
  nb::gil_scoped_release unlocked;
  expect_large(y, bytes_of(dtype, K0 * R0 * K1 * R1));
  return chosen.pieces->combine({dtype, K0, R0, K1, R1}, at<void>(x), at<void>(g), at<double>(gain), at<double>(m),
                                at<double>(slope), at<double>(shift), at<void>(y));
}

int scan(int dtype, int64_t steps, int64_t width, uintptr_t a, double constant, uintptr_t v, uintptr_t start,
         uintptr_t before, uintptr_t last) {
  nb::gil_scoped_release unlocked;
  return chosen.pieces->scan(dtype, steps, width, at<void>(a), constant, at<void>(v), at<void>(start),
                             at<void>(before), at<void>(last));
}

int clip(int dtype, int64_t K0, int64_t R0, int64_t K1, int64_t R1, uintptr_t x, uintptr_t g, uintptr_t m,
         uintptr_t slope, uintptr_t shift, double limit, uintptr_t out) {
  nb::gil_scoped_release unlocked;
  expect_large(out, bytes_of(dtype, K0 * R0 * K1 * R1));
  return chosen.pieces->clip({dtype, K0, R0, K1, R1}, at<void>(x), at<void>(g), at<double>(m), at<double>(slope),
                             at<double>(shift), limit, at<void>(out));
}

Power power_of(int dtype, int wdtype, int64_t rows, int64_t channels, int64_t group, double eps, bool exact,
               uintptr_t x, uintptr_t out, uintptr_t weight, uintptr_t kept) {
  Power p{};
  p.dtype = dtype, p.wdtype = wdtype;
  p.rows = rows, p.channels = channels, p.group = group, p.eps = eps, p.exact = exact;
  p.x = at<void>(x), p.out = at<void>(out), p.weight = at<void>(weight), p.kept = at<double>(kept);
  expect_large(out, bytes_of(dtype, rows * channels));
  return p;
}

int power_forward(int dtype, int wdtype, int64_t rows, int64_t channels, int64_t group, double eps, bool exact,
                  uintptr_t x, uintptr_t out, uintptr_t weight, uintptr_t kept, uintptr_t bias, uintptr_t running, uintptr_t before,
                  uintptr_t steps, int64_t warmup, double alpha_fwd) {
  nb::gil_scoped_release unlocked;
  Power p = power_of(dtype, wdtype, rows, channels, group, eps, exact, x, out, weight, kept);
  p.bias = at<void>(bias), p.running = at<void>(running), p.before = at<void>(before);
  p.steps = at<int64_t>(steps), p.warmup = warmup, p.alpha_fwd = alpha_fwd;
  return chosen.pieces->power_forward(p);
}

int power_backward(int dtype, int wdtype, int64_t rows, int64_t channels, int64_t group, double eps, bool exact,
                   uintptr_t x, uintptr_t out, uintptr_t weight, uintptr_t kept, uintptr_t dy, uintptr_t state, double rate,
                   bool batch, uintptr_t dweight, uintptr_t dbias) {
  nb::gil_scoped_release unlocked;
  Power p = power_of(dtype, wdtype, rows, channels, group, eps, exact, x, out, weight, kept);
  p.dy = at<void>(dy), p.state = at<void>(state), p.rate = rate, p.batch = batch;
  p.dweight = at<void>(dweight), p.dbias = at<void>(dbias);
  return chosen.pieces->power_backward(p);
}

Online online_of(int dtype, int wdtype, int64_t steps, int64_t channels, int64_t group, double alpha_fwd,
                 double alpha_bkw, double eps, double guard_eps, double limit, uintptr_t x, uintptr_t out, uintptr_t weight,
                 uintptr_t bias, uintptr_t kept) {
  Online p{};
  p.dtype = dtype, p.wdtype = wdtype;
  p.steps = steps, p.channels = channels, p.group = group;
  p.alpha_fwd = alpha_fwd, p.alpha_bkw = alpha_bkw, p.eps = eps, p.guard_eps = guard_eps, p.limit = limit;
  p.x = at<void>(x), p.out = at<void>(out), p.weight = at<void>(weight), p.bias = at<void>(bias);
  p.kept = at<double>(kept);
  expect_large(out, bytes_of(dtype, steps * channels));
  return p;
}

int online_forward(int dtype, int wdtype, int64_t steps, int64_t channels, int64_t group, double alpha_fwd,
                   double alpha_bkw, double eps, double guard_eps, double limit, uintptr_t x, uintptr_t out, uintptr_t weight,
                   uintptr_t bias, uintptr_t kept, uintptr_t mean, uintptr_t var, uintptr_t mean_before,
                   uintptr_t var_before) {
  nb::gil_scoped_release unlocked;
  Online p = online_of(dtype, wdtype, steps, channels, group, alpha_fwd, alpha_bkw, eps, guard_eps, limit, x, out, weight,
                       bias, kept);
  p.mean = at<void>(mean), p.var = at<void>(var);
  p.mean_before = at<void>(mean_before), p.var_before = at<void>(var_before);
  return chosen.pieces->online_forward(p);
}

int online_backward(int dtype, int wdtype, int64_t steps, int64_t channels, int64_t group, double alpha_fwd,
                    double alpha_bkw, double eps, double guard_eps, double limit, uintptr_t x, uintptr_t out, uintptr_t weight,
                    uintptr_t bias, uintptr_t kept, uintptr_t dy, uintptr_t u, uintptr_t v, uintptr_t dweight,
                    uintptr_t dbias) {
  nb::gil_scoped_release unlocked;
  Online p = online_of(dtype, wdtype, steps, channels, group, alpha_fwd, alpha_bkw, eps, guard_eps, limit, x, out, weight,
                       bias, kept);
  p.dy = at<void>(dy), p.u = at<void>(u), p.v = at<void>(v);
  p.dweight = at<void>(dweight), p.dbias = at<void>(dbias);
  return chosen.pieces->online_backward(p);
}

OnlineNumbers numbers_of(int wdtype, int64_t steps, int64_t channels, int64_t positions, int64_t group, double alpha_fwd,
                         double alpha_bkw, double eps, double guard_eps, uintptr_t m, uintptr_t s, uintptr_t weight,
                         uintptr_t bias, uintptr_t out) {
  OnlineNumbers p{};
  p.wdtype = wdtype, p.steps = steps, p.channels = channels, p.positions = positions, p.group = group;
  p.alpha_fwd = alpha_fwd, p.alpha_bkw = alpha_bkw, p.eps = eps, p.guard_eps = guard_eps;
  p.m = at<double>(m), p.s = at<double>(s), p.weight = at<void>(weight), p.bias = at<void>(bias);
  p.out = at<double>(out);
  return p;
}

int online_numbers(int wdtype, int64_t steps, int64_t channels, int64_t positions, int64_t group, double alpha_fwd,
                   double alpha_bkw, double eps, double guard_eps, uintptr_t m, uintptr_t s, uintptr_t weight,
                   uintptr_t bias, uintptr_t out, uintptr_t kept, uintptr_t mean, uintptr_t var, uintptr_t mean_before,
                   uintptr_t var_before) {
  nb::gil_scoped_release unlocked;
  OnlineNumbers p = numbers_of(wdtype, steps, channels, positions, group, alpha_fwd, alpha_bkw, eps, guard_eps, m, s,
                               weight, bias, out);
  p.kept = at<double>(kept), p.mean = at<void>(mean), p.var = at<void>(var);
  p.mean_before = at<void>(mean_before), p.var_before = at<void>(var_before);
  return chosen.pieces->online_numbers(p);
}

int online_control(int wdtype, int64_t steps, int64_t channels, int64_t positions, int64_t group, double alpha_fwd,
                   double alpha_bkw, double eps, double guard_eps, uintptr_t m, uintptr_t s, uintptr_t weight,
                   uintptr_t bias, uintptr_t out, uintptr_t total_g, uintptr_t total_gd, uintptr_t u, uintptr_t v,
                   uintptr_t dweight, uintptr_t dbias) {
  nb::gil_scoped_release unlocked;
  OnlineNumbers p = numbers_of(wdtype, steps, channels, positions, group, alpha_fwd, alpha_bkw, eps, guard_eps, m, s,
                               weight, bias, out);
  p.total_g = at<double>(total_g), p.total_gd = at<double>(total_gd);
  p.u = at<void>(u), p.v = at<void>(v), p.dweight = at<void>(dweight), p.dbias = at<void>(dbias);
  return chosen.pieces->online_control(p);
}

}  // namespace

NB_MODULE(_kernels, m) {
  nb::set_leak_warnings(false);  // Layouts are cached by Python until it exits
  m.doc() = "Fused normalization kernels for the CPU.";
  nb::class_<Layout>(m, "Layout")
      .def(nb::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int, int, int, int, bool, bool, bool, double,
                    double>())
      .def("masked", &Layout::masked)
      .def("forward", &Layout::forward)
      .def("again", &Layout::again)
      .def("backward", &Layout::backward)
      .def_prop_ro("bits_bytes", [](const Layout& l) { return chosen.kernels->bits_bytes(l.p); })
      .def_prop_ro("bits_row", [](const Layout& l) { return chosen.kernels->bits_row(l.p); });
  m.def("sums", &sums);
  m.def("products", &products);
  m.def("advance", &advance);
  m.def("combine", &combine);
  m.def("scan", &scan);
  m.def("clip", &clip);
  m.def("power_forward", &power_forward);
  m.def("power_backward", &power_backward);
  m.def("online_forward", &online_forward);
  m.def("online_backward", &online_backward);
  m.def("online_numbers", &online_numbers);
  m.def("online_control", &online_control);
  m.def("isa", [] { return std::string(chosen.name); });
  m.def("threads", &thread_count);
  m.def("pool", [] { return std::string(pool_name()); });
  m.def("set_serial", &set_serial);
}
