// The kernels. Compiled once for each instruction set (isa_*.cpp), so everything but the table has internal linkage.
//
// A problem is a contiguous block (K0, R0, K1, R1), see problem.h. Two families of loops cover it:
//   runs:  each statistic is a set of R0 runs of R1 contiguous values;
//   cols:  R1 is short: rows of K1*R1 values are added up column by column, and columns are merged afterwards.
//
// Statistics: in a block of about 4096 values that stays in the first cache, a mean and then the moments about it
// (the corrected two-pass algorithm); blocks are merged in order in double precision (Chan et al.). The partition
// into blocks depends on the shape alone, so that results do not depend on the number of threads.
// Chan, Golub & LeVeque, "Algorithms for computing the sample variance", The American Statistician 37 (1983).

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "problem.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace evenly {
namespace EVENLY_ISA {
namespace {

#include "vectors.inl"

constexpr int64_t BLOCK = 4096;      // values whose moments are taken at a time
constexpr int64_t UNIT = 16384;      // longest piece of a run whose gradient sums are taken at a time
constexpr int64_t PARALLEL = 32768;  // fewer values than this: one thread
constexpr int64_t TASK = 16384;      // values a task should have
constexpr int64_t SHORT_RUN = 32;    // shorter runs are treated as columns

EVENLY_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
EVENLY_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
EVENLY_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class F>
void parallel(int64_t n, const F& f) {
  run_tasks(n, [](void* context, int64_t i) { (*static_cast<const F*>(context))(i); },
            const_cast<void*>(static_cast<const void*>(&f)));
}

// A buffer that frees itself.
template <class S>
struct Buffer {
  S* data = nullptr;
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data); }
  bool allocate(int64_t n) {
    data = static_cast<S*>(std::malloc(static_cast<size_t>(n > 0 ? n : 1) * sizeof(S)));
    return data != nullptr;
  }
  bool zeros(int64_t n) {
    data = static_cast<S*>(std::calloc(static_cast<size_t>(n > 0 ? n : 1), sizeof(S)));
    return data != nullptr;
  }
};

// ---- moments --------------------------------------------------------------------------------------------------

struct Moments {
  double n = 0, mean = 0, m2 = 0;

  EVENLY_INLINE void merge(double bn, double bmean, double bm2) {
    if (n == 0) {
      n = bn, mean = bmean, m2 = bm2;
      return;
    }
    const double delta = bmean - mean, total = n + bn;
    const double moved = mean + delta * (bn / total);
    // An infinite value makes the mean infinite, as a plain sum would.
    mean = std::isfinite(delta) ? moved : mean + bmean;
    m2 += bm2 + delta * delta * (n * bn / total);
    n = total;
  }
};

// A float accumulator cannot hold this sum of squares: too large, or so small that squares have underflowed.
EVENLY_INLINE bool out_of_range(double s2) { return !(s2 < 1e38) || s2 < 1e-25; }

template <class T>
void moments_slow(const T* p, int64_t nr, int64_t stride, int64_t len, bool raw, const uint8_t* mask, Moments& out) {
  double n = 0, sum = 0;
  for (int64_t r = 0; r < nr; ++r)
    for (int64_t i = 0; i < len; ++i)
      if (!mask || mask[r * stride + i]) n += 1, sum += to_double(p[r * stride + i]);
  if (n == 0) return;
  const double pivot = raw ? 0 : sum / n;
  double s1 = 0, s2 = 0;
  for (int64_t r = 0; r < nr; ++r)
    for (int64_t i = 0; i < len; ++i)
      if (!mask || mask[r * stride + i]) {
        const double d = to_double(p[r * stride + i]) - pivot;
        s1 += d;
        s2 += d * d;
      }
  if (raw)
    out.merge(n, 0, s2);
  else if (!std::isfinite(pivot))
    out.merge(n, pivot, NAN);
  else
    out.merge(n, pivot + s1 / n, s2 - s1 * (s1 / n));
}

// Merge the moments of nr runs of len values, stride apart. raw: sum of squares about zero.
template <class T>
void moments_block(const T* p, int64_t nr, int64_t stride, int64_t len, bool raw, Moments& out) {
  using X = Tr<T>;
  using A = typename X::A;
  using V = typename X::V;
  constexpr int W = X::W;
  const double n = static_cast<double>(nr * len), inverse = 1 / n;
  A pivot = 0;
  if (!raw) {
    V a0{}, a1{}, a2{}, a3{};
    for (int64_t r = 0; r < nr; ++r) {
      const T* q = p + r * stride;
      int64_t i = 0;
      for (; i + 4 * W <= len; i += 4 * W) {
        a0 += X::load(q + i);
        a1 += X::load(q + i + W);
        a2 += X::load(q + i + 2 * W);
        a3 += X::load(q + i + 3 * W);
      }
      for (; i + W <= len; i += W) a0 += X::load(q + i);
      if (i < len) a1 += load_part(q + i, static_cast<int>(len - i));
    }
    pivot = static_cast<A>(sum_lanes((a0 + a1) + (a2 + a3)) * inverse);
  }
  const V m = splat(pivot);
  V s0{}, s1{}, s2{}, s3{}, q0{}, q1{}, q2{}, q3{};
  for (int64_t r = 0; r < nr; ++r) {
    const T* q = p + r * stride;
    int64_t i = 0;
    for (; i + 4 * W <= len; i += 4 * W) {
      const V d0 = X::load(q + i) - m, d1 = X::load(q + i + W) - m;
      const V d2 = X::load(q + i + 2 * W) - m, d3 = X::load(q + i + 3 * W) - m;
      s0 += d0, s1 += d1, s2 += d2, s3 += d3;
      q0 += d0 * d0, q1 += d1 * d1, q2 += d2 * d2, q3 += d3 * d3;
    }
    for (; i + W <= len; i += W) {
      const V d = X::load(q + i) - m;
      s0 += d, q0 += d * d;
    }
    if (i < len) {
      const int left = static_cast<int>(len - i);
      const V d = keep(first_lanes<A>(left), load_part(q + i, left) - m);
      s1 += d, q1 += d * d;
    }
  }
  const double s = sum_lanes((s0 + s1) + (s2 + s3)), ss = sum_lanes((q0 + q1) + (q2 + q3));
  if (sizeof(A) == 4 ? out_of_range(ss) : !std::isfinite(ss)) {
    const bool constant = ss == 0 && s == 0 && to_double(p[0]) == pivot && to_double(p[len - 1]) == pivot;
    if (!constant) return moments_slow(p, nr, stride, len, raw, nullptr, out);
  }
  if (raw)
    out.merge(n, 0, ss);
  else
    out.merge(n, pivot + s * inverse, ss > s * (s * inverse) ? ss - s * (s * inverse) : 0);
}

// ---- geometry -------------------------------------------------------------------------------------------------

enum { SCALAR = 0, VECTOR = 1, COLUMN = 2 };  // how the affine parameters vary along a run

struct Geometry {
  bool cols = false;
  int mode = SCALAR;
  int64_t seg = 0, nseg = 1;  // runs: a run is nseg segments of one weight (SCALAR) or of one period (VECTOR)
  int64_t period = 0;         // VECTOR: expanded weights
  int64_t width = 0;          // cols: values in a row, a multiple of K1*R1
  int64_t bits_row = 0;       // bytes of sign bits for a segment, or a row
};

inline bool plan(const Problem& p, Geometry& g) {
  const int64_t L = p.K1 * p.R1, P = p.wdiv * p.wsize;
  const bool affine = p.wsize > 1;
  if (p.R0 > 1 && p.R1 < SHORT_RUN && (!affine || L % P == 0)) {
    g.cols = true;
    g.mode = COLUMN;
    // Widen short rows so that vectors are full.
    int64_t q = 1;
    while ((q * L) % 16 != 0 && q < 16) q *= 2;
    while (q * L < 64) q *= 2;
    if (q > p.R0) q = 1;
    g.width = q * L;
    g.bits_row = ceil_div(g.width, 8);
    return true;
  }
  g.seg = p.R1;
  if (affine) {
    if (p.wdiv % p.R1 == 0) {
      g.mode = SCALAR;
    } else if (p.wdiv >= 16 && p.R1 % p.wdiv == 0) {
      g.mode = SCALAR;
      g.seg = p.wdiv;
      g.nseg = p.R1 / p.wdiv;
    } else {
      g.mode = VECTOR;
      g.period = P;
      if (p.R1 % P == 0) {
        g.seg = P;
        g.nseg = p.R1 / P;
      } else if (P % p.R1 != 0) {
        return false;
      }
    }
  }
  g.bits_row = ceil_div(g.seg, 8);
  return true;
}

int64_t bits_bytes(const Problem& p) {
  Geometry g;
  if (!plan(p, g)) return -1;
  if (g.cols) return p.K0 * ceil_div(p.R0 * p.K1 * p.R1, g.width) * g.bits_row;
  return p.K0 * p.R0 * p.K1 * g.nseg * g.bits_row;
}

int64_t bits_row(const Problem& p) {
  Geometry g;
  if (!plan(p, g)) return -1;
  return g.cols ? g.width : g.seg;
}

// Weight or bias in the accumulation type, each value repeated wdiv times where repeat is set.
template <class A>
struct Parameters {
  Buffer<A> own;
  const A* at = nullptr;

  template <class S>
  void copy(const S* from, int64_t n, int64_t times) {
    int64_t i = 0;
    if constexpr (sizeof(A) == 4 && sizeof(S) <= 4) {
      if (times == 1)
        for (; i + WF <= n; i += WF) raw_store(own.data + i, Tr<S>::load(from + i));
    }
    for (; i < n; ++i) {
      const A v = static_cast<A>(to_double(from[i]));
      for (int64_t j = 0; j < times; ++j) own.data[i * times + j] = v;
    }
  }

  bool set(const void* from, int dtype, int64_t n, int64_t times) {
    if (!from) return true;
    if (times == 1 && dtype == (sizeof(A) == 4 ? F32 : F64)) {
      at = static_cast<const A*>(from);
      return true;
    }
    if (!own.allocate(n * times)) return false;
    if (dtype == F32) copy(static_cast<const float*>(from), n, times);
    if (dtype == F64) copy(static_cast<const double*>(from), n, times);
    if (dtype == BF16) copy(static_cast<const bf16*>(from), n, times);
    if (dtype == F16) copy(static_cast<const f16*>(from), n, times);
    at = own.data;
    return true;
  }

  bool fill(A value, int64_t n) {  // a missing parameter, where the loop wants a vector
    if (at) return true;
    if (!own.allocate(n)) return false;
    for (int64_t i = 0; i < n; ++i) own.data[i] = value;
    at = own.data;
    return true;
  }
};

// ---- from moments to what the loops need ----------------------------------------------------------------------

// A norm of zero, where eps is zero too, divides by this.
template <class A>
inline double norm_of_zero() {
  return sizeof(A) == 4 ? std::sqrt(1.1754943508222875e-38) : std::sqrt(2.2250738585072014e-308);
}

// A norm at its floor is a constant: no gradient flows through it.
template <class A>
inline bool at_floor(const Problem& p, double r) {
  return r >= static_cast<A>(1 / (p.eps > 0 ? p.eps : norm_of_zero<A>()));
}

// Squares about zero rather than about the mean.
inline bool is_raw(const Problem& p) { return !p.center && p.scale != SCALE_STD; }

// (x - mean)/s = (x - m) * r + c;  y before the affine parameters adds shift: the mean that was not taken out.
struct Stat {
  double m, r, c, shift;
};

template <class A>
inline Stat stat_of(const Problem& p, int64_t k) {
  const A* s = static_cast<const A*>(p.stats);
  const int64_t K = p.K0 * p.K1;
  const double m = s[k], r = s[K + k], low = s[2 * K + k];
  return {m, r, -low * r, (!p.center && p.scale == SCALE_STD && !p.given) ? (m + low) * r : 0.0};
}

template <class A>
inline void finish(const Problem& p, int64_t k, const Moments& raw_moments, bool raw) {
  A* s = static_cast<A*>(p.stats);
  const int64_t K = p.K0 * p.K1;
  Moments mo = raw_moments;
  const double left = mo.n - p.correction;
  const double var = mo.n == 0 ? 0 : left > 0 ? mo.m2 / left : NAN;
  double r = 1;
  if (p.scale == SCALE_STD || p.scale == SCALE_RMS) r = 1 / std::sqrt(var + p.eps);
  if (p.scale == SCALE_L2) {
    const double norm = std::sqrt(mo.m2);
    r = 1 / (norm < p.eps ? p.eps : norm == 0 ? norm_of_zero<A>() : norm);
  }
  const bool uses_mean = p.center || (p.scale == SCALE_STD && !raw);
  const A high = static_cast<A>(uses_mean ? mo.mean : 0);
  s[k] = high;
  s[K + k] = static_cast<A>(r);
  const double low = uses_mean ? mo.mean - static_cast<double>(high) : 0;
  s[2 * K + k] = std::isfinite(low) ? static_cast<A>(low) : A(0);
  if (p.mean_out) static_cast<A*>(p.mean_out)[k] = static_cast<A>(mo.mean);
  if (p.var_out) static_cast<A*>(p.var_out)[k] = static_cast<A>(var);
  if (p.running_mean) {
    A* rm = static_cast<A*>(p.running_mean) + k;
    A* rv = static_cast<A*>(p.running_var) + k;
    *rm = static_cast<A>((1 - p.momentum) * *rm + p.momentum * mo.mean);
    *rv = static_cast<A>((1 - p.momentum) * *rv + p.momentum * (mo.m2 / (mo.n - 1)));
  }
}

template <class A>
inline void use_given(const Problem& p) {
  A* s = static_cast<A*>(p.stats);
  const int64_t K = p.K0 * p.K1;
  const A* mean = static_cast<const A*>(p.mean_in);
  const A* var = static_cast<const A*>(p.var_in);
  for (int64_t k = 0; k < K; ++k) {
    s[k] = p.center && mean ? mean[k] : A(0);
    s[K + k] = p.scale == SCALE_NONE ? A(1) : static_cast<A>(1 / std::sqrt(static_cast<double>(var[k]) + p.eps));
    s[2 * K + k] = 0;
  }
}

// dx = r*g*w + u*b + c with u = (x - m)*r, from the sums of g*w and g*w*(x - m).
struct Back {
  double b, c;
};

template <class A>
inline Back back_of(const Problem& p, int64_t k, double n, double sum, double sum_d) {
  const Stat s = stat_of<A>(p, k);
  double b = 0, c = 0;
  if (!p.given) {
    const double left = n - p.correction;
    double slope = 0;
    if (p.scale == SCALE_STD || p.scale == SCALE_RMS) slope = 1 / left;
    if (p.scale == SCALE_L2) slope = at_floor<A>(p, s.r) ? 0 : 1;
    const double sum_v = s.r * sum_d + (s.c + s.shift) * sum;
    b = slope == 0 ? 0 : -s.r * sum_v * slope;
    if (p.center) c = -s.r * sum / n;
    if (p.dvar) b += static_cast<const A*>(p.dvar)[k] * 2 / (left * s.r);
    if (p.dmean) c += static_cast<const A*>(p.dmean)[k] / n;
  }
  return {b, c + s.c * b};
}

// ---- forward along a run --------------------------------------------------------------------------------------

template <class T>
struct Run {  // pointers at the start of a piece of a run, or of a row
  const T* x;
  const T* residual;
  T* y;
  uint8_t* bits;
  const T* dy;
  T* dx;
  T* dresidual;
};

template <class T>
struct Coefficients {  // of the value before the activation: SCALAR (x-m)*a+b; VECTOR ((x-m)*a+b)*wv+bv; COLUMN
  using A = typename Tr<T>::A;
  A m, a, b;
  const A* mv;
  const A* wv;
  const A* bv;
};

template <int MODE, class T>
EVENLY_INLINE typename Tr<T>::V before(typename Tr<T>::V x, const Coefficients<T>& k, int64_t i, int left) {
  if constexpr (MODE == SCALAR) return (x - k.m) * k.a + k.b;
  if constexpr (MODE == VECTOR) return ((x - k.m) * k.a + k.b) * take(k.wv + i, left) + take(k.bv + i, left);
  if constexpr (MODE == COLUMN) return (x - take(k.mv + i, left)) * take(k.wv + i, left) + take(k.bv + i, left);
}

template <class T, int ACT, bool RES, bool BITS, int MODE>
void apply_run(const Run<T>& run, int64_t n, const Coefficients<T>& k) {
  using X = Tr<T>;
  using V = typename X::V;
  constexpr int W = X::W;
  constexpr int G = BITS && W < 8 ? 8 / W : 1;  // vectors to a whole number of bytes of bits
  constexpr int S = G * W;
  const T* x = run.x;
  const T* res = run.residual;
  T* y = run.y;
  int64_t i = 0;
  for (; i + S <= n; i += S) {
    unsigned bits = 0;
    for (int g = 0; g < G; ++g) {
      V v = before<MODE, T>(X::load(x + i + g * W), k, i + g * W, W);
      if constexpr (RES) v += X::load(res + i + g * W);
      if constexpr (BITS) bits |= pack_lanes(~(v <= V{})) << (g * W);
      X::store(y + i + g * W, activate<ACT>(v));
    }
    if constexpr (BITS) std::memcpy(run.bits + i / 8, &bits, S / 8);
  }
  unsigned bits = 0;
  const int64_t start = i;
  for (; i < n; i += W) {
    const int left = static_cast<int>(min_of(W, n - i));
    V v = before<MODE, T>(load_part(x + i, left), k, i, left);
    if constexpr (RES) v += load_part(res + i, left);
    if constexpr (BITS) bits |= pack_lanes(~(v <= V{})) << (i - start);
    store_part(y + i, activate<ACT>(v), left);
  }
  if constexpr (BITS)
    if (start < n) std::memcpy(run.bits + start / 8, &bits, static_cast<size_t>(ceil_div(n - start, 8)));
}

template <class T>
using ApplyFn = void (*)(const Run<T>&, int64_t, const Coefficients<T>&);

template <class T, int MODE>
ApplyFn<T> pick_apply(int act, bool res, bool bits) {
  switch (act) {
    case ACT_RELU:
      if (bits) return res ? apply_run<T, ACT_RELU, true, true, MODE> : apply_run<T, ACT_RELU, false, true, MODE>;
      return res ? apply_run<T, ACT_RELU, true, false, MODE> : apply_run<T, ACT_RELU, false, false, MODE>;
    case ACT_SILU:
      return res ? apply_run<T, ACT_SILU, true, false, MODE> : apply_run<T, ACT_SILU, false, false, MODE>;
    case ACT_GELU:
      return res ? apply_run<T, ACT_GELU, true, false, MODE> : apply_run<T, ACT_GELU, false, false, MODE>;
    default:
      return res ? apply_run<T, ACT_NONE, true, false, MODE> : apply_run<T, ACT_NONE, false, false, MODE>;
  }
}

// ---- backward along a run -------------------------------------------------------------------------------------
// How the gradient before the activation is found. PARKED: the first pass left it where the second finds it.

enum { PLAIN = 0, SIGN_BITS = 1, RELU = 2, RELU_RES = 3, SILU = 4, GELU = 5, SILU_RES = 6, GELU_RES = 7, PARKED = 8 };

template <class T, int KIND, int MODE>
EVENLY_INLINE typename Tr<T>::V gradient(const Run<T>& run, const typename Tr<T>::A* park, typename Tr<T>::V x,
                                         const Coefficients<T>& k, int64_t i, int left) {
  using X = Tr<T>;
  using A = typename X::A;
  using V = typename X::V;
  constexpr int W = X::W;
  if constexpr (KIND == PARKED) return take(park + i, left);
  const V g = take(run.dy + i, left);
  if constexpr (KIND == SIGN_BITS) {
    unsigned bits = run.bits[i / 8] >> (i % 8);
    if constexpr (W == 16)
      if (left > 8) bits |= static_cast<unsigned>(run.bits[i / 8 + 1]) << 8;
    return keep(unpack_lanes<A>(bits), g);
  }
  if constexpr (KIND >= RELU && KIND < PARKED) {
    V v = before<MODE, T>(x, k, i, left);
    if constexpr (KIND == RELU_RES || KIND == SILU_RES || KIND == GELU_RES)
      v += take(run.residual + i, left);
    constexpr int ACT = KIND == RELU || KIND == RELU_RES ? ACT_RELU : (KIND == SILU || KIND == SILU_RES) ? ACT_SILU : ACT_GELU;
    return activate_backward<ACT>(g, v);
  }
  return g;
}

template <class T>
struct Sums {
  using A = typename Tr<T>::A;
  double g = 0, gd = 0;  // of the gradient of the normalized value, and of it times (x - m)
  A* park = nullptr;     // where to leave the gradient before the activation
  A* dw = nullptr;       // VECTOR: add the gradients of weight and bias here
  A* db = nullptr;
};

template <class T, int KIND, int MODE>
void reduce_run(const Run<T>& run, int64_t n, const Coefficients<T>& k, Sums<T>& sums) {
  using X = Tr<T>;
  using A = typename X::A;
  using V = typename X::V;
  constexpr int W = X::W;
  V s0{}, s1{}, q0{}, q1{};
  A* park = sums.park;
  auto step = [&](int64_t i, int left, V& s, V& q) __attribute__((always_inline)) {
    const V x = take(run.x + i, left);
    V g = gradient<T, KIND, MODE>(run, nullptr, x, k, i, left);
    if (left != W) g = keep(first_lanes<A>(left), g);
    if (park) put(park + i, g, left);
    const V d = x - k.m;
    if constexpr (MODE == VECTOR) {
      const V v = d * k.a + k.b;
      put(sums.dw + i, take(sums.dw + i, left) + g * v, left);
      put(sums.db + i, take(sums.db + i, left) + g, left);
      g *= take(k.wv + i, left);
    }
    s += g;
    // a lane beyond the end has g = 0, but x - m there may be infinite
    q += left == W ? g * d : keep(first_lanes<A>(left), g * d);
  };
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    step(i, W, s0, q0);
    step(i + W, W, s1, q1);
  }
  if (i + W <= n) {
    step(i, W, s0, q0);
    i += W;
  }
  if (i < n) step(i, static_cast<int>(n - i), s1, q1);
  sums.g += sum_lanes(s0 + s1);
  sums.gd += sum_lanes(q0 + q1);
}

template <class T>
struct BackCoefficients {  // dx = g*w*r + ((x-m)*r)*b + c
  using A = typename Tr<T>::A;
  A r, rw, b, c;
  const A* rv;
  const A* rwv;
  const A* bv;
  const A* cv;
};

template <class T, int KIND, int MODE>
void apply_back(const Run<T>& run, int64_t n, const Coefficients<T>& k, const BackCoefficients<T>& e,
                const typename Tr<T>::A* park) {
  using X = Tr<T>;
  using V = typename X::V;
  constexpr int W = X::W;
  auto step = [&](int64_t i, int left) __attribute__((always_inline)) {
    const V x = take(run.x + i, left);
    const V g = gradient<T, KIND, MODE>(run, park, x, k, i, left);
    V dx;
    if constexpr (MODE == SCALAR) dx = g * e.rw + (((x - k.m) * e.r) * e.b + e.c);
    if constexpr (MODE == VECTOR) dx = g * (e.r * take(k.wv + i, left)) + (((x - k.m) * e.r) * e.b + e.c);
    if constexpr (MODE == COLUMN) dx = g * take(e.rwv + i, left) + (((x - take(k.mv + i, left)) * take(e.rv + i, left)) * take(e.bv + i, left) + take(e.cv + i, left));
    if (run.dresidual) put(run.dresidual + i, g, left);
    if (run.dx) put(run.dx + i, dx, left);
  };
  int64_t i = 0;
  for (; i + W <= n; i += W) step(i, W);
  if (i < n) step(i, static_cast<int>(n - i));
}

template <class T>
using ReduceFn = void (*)(const Run<T>&, int64_t, const Coefficients<T>&, Sums<T>&);
template <class T>
using BackFn = void (*)(const Run<T>&, int64_t, const Coefficients<T>&, const BackCoefficients<T>&,
                        const typename Tr<T>::A*);

template <class T, int MODE>
ReduceFn<T> pick_reduce(int kind) {
  static constexpr ReduceFn<T> table[] = {
      reduce_run<T, PLAIN, MODE>, reduce_run<T, SIGN_BITS, MODE>, reduce_run<T, RELU, MODE>,
      reduce_run<T, RELU_RES, MODE>, reduce_run<T, SILU, MODE>,  reduce_run<T, GELU, MODE>,      reduce_run<T, SILU_RES, MODE>,
      reduce_run<T, GELU_RES, MODE>};
  return table[kind];
}
template <class T, int MODE>
BackFn<T> pick_back(int kind) {
  static constexpr BackFn<T> table[] = {
      apply_back<T, PLAIN, MODE>, apply_back<T, SIGN_BITS, MODE>, apply_back<T, RELU, MODE>,
      apply_back<T, RELU_RES, MODE>, apply_back<T, SILU, MODE>,  apply_back<T, GELU, MODE>,      apply_back<T, SILU_RES, MODE>,
      apply_back<T, GELU_RES, MODE>, apply_back<T, PARKED, MODE>};
  return table[kind];
}

inline int kind_of(const Problem& p) {
  switch (p.act) {
    case ACT_RELU:
      return p.relu_bits ? SIGN_BITS : p.residual ? RELU_RES : RELU;
    case ACT_SILU:
      return p.residual ? SILU_RES : SILU;
    case ACT_GELU:
      return p.residual ? GELU_RES : GELU;
    default:
      return PLAIN;
  }
}

// Gradients of parameters first ... first + many, in their own dtype, from sums in double.
template <class S>
void convert(S* to, int64_t many, const double* from) {
  int64_t i = 0;
  if constexpr (sizeof(S) == 2)
    for (; i + WF <= many; i += WF) {
      const vfh half[2] = {__builtin_convertvector(raw_load<vd>(from + i), vfh),
                           __builtin_convertvector(raw_load<vd>(from + i + WD), vfh)};
      Tr<S>::store(to + i, raw_load<vf>(half));
    }
  for (; i < many; ++i) to[i] = from_double<S>(from[i]);
}
inline void store_parameters(void* to, int dtype, int64_t first, int64_t many, const double* from) {
  if (!to) return;
  if (dtype == F32) convert(static_cast<float*>(to) + first, many, from);
  if (dtype == F64) convert(static_cast<double*>(to) + first, many, from);
  if (dtype == BF16) convert(static_cast<bf16*>(to) + first, many, from);
  if (dtype == F16) convert(static_cast<f16*>(to) + first, many, from);
}

#include "runs.inl"
#include "cols.inl"

// ---- entry ----------------------------------------------------------------------------------------------------

template <class T>
int forward_of(const Problem& p) {
  Geometry g;
  if (!plan(p, g)) return UNSUPPORTED;
  if (p.given) use_given<typename Tr<T>::A>(p);
  return g.cols ? Cols<T>(p, g).forward() : Runs<T>(p, g).forward();
}

template <class T>
int backward_of(const Problem& p) {
  Geometry g;
  if (!plan(p, g)) return UNSUPPORTED;
  return g.cols ? Cols<T>(p, g).backward() : Runs<T>(p, g).backward();
}

int forward(const Problem& p) {
  switch (p.dtype) {
    case F32:
      return forward_of<float>(p);
    case BF16:
      return forward_of<bf16>(p);
#ifndef EVENLY_FEW_TYPES  // the tests build two under sanitizers
    case F64:
      return forward_of<double>(p);
    case F16:
      return forward_of<f16>(p);
#endif
    default:
      return UNSUPPORTED;
  }
}

int backward(const Problem& p) {
  switch (p.dtype) {
    case F32:
      return backward_of<float>(p);
    case BF16:
      return backward_of<bf16>(p);
#ifndef EVENLY_FEW_TYPES
    case F64:
      return backward_of<double>(p);
    case F16:
      return backward_of<f16>(p);
#endif
    default:
      return UNSUPPORTED;
  }
}

}  // namespace
}  // namespace EVENLY_ISA

extern const Kernels EVENLY_TABLE;
const Kernels EVENLY_TABLE = {EVENLY_ISA::forward, EVENLY_ISA::backward, EVENLY_ISA::bits_bytes,
                              EVENLY_ISA::bits_row};

}  // namespace evenly
