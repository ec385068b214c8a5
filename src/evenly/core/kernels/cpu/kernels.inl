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
#include <type_traits>

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

#include "common.inl"

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

// Into the cache that is as near as NEAR says: 3 the first, 2 the second.
template <int NEAR = 2, class T>
EVENLY_INLINE void fetch(const T* p, int64_t values) {
  constexpr int64_t LINE = 64;
  const char* at = reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(p));
  for (int64_t i = 0; i < values * static_cast<int64_t>(sizeof(T)); i += LINE) __builtin_prefetch(at + i, 0, NEAR);
}

// A value near the mean of nr runs of len values: the mean of about an eighth of them, spread over all.
template <class T>
typename Tr<T>::A pivot_of(const T* p, int64_t nr, int64_t stride, int64_t len) {
  using X = Tr<T>;
  using A = typename X::A;
  using V = typename X::V;
  constexpr int W = X::W;
  V a0{}, a1{};
  const int64_t step = nr >= 8 ? 4 : 1;
  const int64_t each = len < 2 * W ? len : ((len - 2 * W) / (16 * W) + 1) * (2 * W);
  const A inverse = static_cast<A>(1 / static_cast<double>(ceil_div(nr, step) * each));
  for (int64_t r = 0; r < nr; r += step) {
    const T* q = p + r * stride;
    if (len < 2 * W) {
      int64_t i = 0;
      if (W <= len) a0 += X::load(q), i = W;
      if (i < len) a1 += load_part(q + i, static_cast<int>(len - i));
      continue;
    }
    for (int64_t i = 0; i + 2 * W <= len; i += 16 * W) {
      V u, v;
      load_two<true>(q + i, u, v);
      a0 += u, a1 += v;
    }
  }
  return rough_sum(a0 + a1) * inverse;
}

// Sums of the deviations from a pivot of nr runs of len values, and of their squares. A lane adds up 32 values in its
// own type, then goes on from zero: what it has is kept in double. True: a lane has most of the sum, an outlier beside
// which it lost the others. next: how many values further on the runs lie that come after these; they are fetched
// meanwhile, for values here and there of them are read first, which no prefetcher of a processor foresees.
template <class T>
bool deviations(const T* p, int64_t nr, int64_t stride, int64_t len, typename Tr<T>::A pivot, double& s, double& ss,
                int64_t next = 0) {
  using X = Tr<T>;
  using A = typename X::A;
  using V = typename X::V;
  constexpr int W = X::W;
  constexpr int64_t MANY = 32;
  const V m = splat(pivot);
  V s0{}, s1{}, s2{}, s3{}, q0{}, q1{}, q2{}, q3{};
  vd total{}, squares{};
  int64_t since = 0;
  auto settle = [&]() __attribute__((always_inline)) {
    total += widened((s0 + s1) + (s2 + s3));
    squares += widened((q0 + q1) + (q2 + q3));
    s0 = s1 = s2 = s3 = q0 = q1 = q2 = q3 = V{};
    since = 0;
  };
  for (int64_t r = 0; r < nr; ++r) {
    const T* q = p + r * stride;
    if (len < 4 * W && next) fetch<3>(q + next, len);
    int64_t i = 0;
    while (i + 4 * W <= len) {
      const int64_t end = i + min_of((len - i) / (4 * W), MANY - since) * (4 * W);
      since += (end - i) / (4 * W);
      for (; i < end; i += 4 * W) {
        V d0, d1, d2, d3;
        fetch<3>(q + i + next, 4 * W);
        load_two<true>(q + i, d0, d1);
        load_two<true>(q + i + 2 * W, d2, d3);
        d0 -= m, d1 -= m, d2 -= m, d3 -= m;
        s0 += d0, s1 += d1, s2 += d2, s3 += d3;
        q0 += d0 * d0, q1 += d1 * d1, q2 += d2 * d2, q3 += d3 * d3;
      }
      if (since >= MANY) settle();
    }
    for (; i + W <= len; i += W) {
      const V d = X::load(q + i) - m;
      s0 += d, q0 += d * d;
    }
    if (i < len) {
      const int left = static_cast<int>(len - i);
      const V d = len >= W ? keep(~first_lanes<A>(W - left), X::load(q + len - W) - m)
                           : keep(first_lanes<A>(left), load_part(q + i, left) - m);
      s1 += d, q1 += d * d;
    }
    if (len % (4 * W) != 0 && (since += 3) >= MANY) settle();
  }
  settle();
  sum_lanes(total, squares, s, ss);
  return sizeof(T) == 4 && nr * len >= 256 && pack_lanes(squares > splat(0.8 * ss)) != 0;
}

// Mean and sum of squared deviations of nr runs of len values, stride apart, from what deviations() found about the
// pivot; raw: sum of squares about zero.
template <class T>
EVENLY_INLINE void moments_from(const T* p, int64_t nr, int64_t stride, int64_t len, bool raw, typename Tr<T>::A pivot,
                                double s, double ss, bool lonely, double& mean, double& m2) {
  using A = typename Tr<T>::A;
  const double n = static_cast<double>(nr * len), inverse = 1 / n;
  auto slow = [&] {
    Moments mo;
    moments_slow(p, nr, stride, len, raw, nullptr, mo);
    mean = mo.mean, m2 = mo.m2;
  };
  if (!raw && s * s > 0.25 * n * ss) {  // the pivot was far from the mean
    const A moved = static_cast<A>(static_cast<double>(pivot) + s * inverse);
    if (std::isfinite(moved)) {
      pivot = moved;
      lonely = deviations(p, nr, stride, len, pivot, s, ss);
    }
  }
  if (lonely) return slow();
  if (sizeof(A) == 4 ? out_of_range(ss) : !std::isfinite(ss)) {
    const bool constant = ss == 0 && s == 0 && to_double(p[0]) == pivot && to_double(p[len - 1]) == pivot;
    if (!constant) return slow();
  }
  mean = raw ? 0 : pivot + s * inverse;
  m2 = raw ? ss : ss > s * (s * inverse) ? ss - s * (s * inverse) : 0;
}

// Merge the moments of nr runs of len values, stride apart.
template <class T>
void moments_block(const T* p, int64_t nr, int64_t stride, int64_t len, bool raw, int64_t next, Moments& out) {
  using A = typename Tr<T>::A;
  const A pivot = raw ? A(0) : pivot_of(p, nr, stride, len);
  double s, ss, mean, m2;
  const bool lonely = deviations(p, nr, stride, len, pivot, s, ss, next);
  moments_from(p, nr, stride, len, raw, pivot, s, ss, lonely, mean, m2);
  out.merge(static_cast<double>(nr * len), mean, m2);
}

constexpr int64_t MANY = 32;  // statistics that are worked on together at most

// Moments of many <= MANY such blocks, the next one `apart` values from the one before. In stages, so that the end of
// a chain of additions is not waited for: a processor works on the next block meanwhile.
template <class T>
void moments_many(const T* p, int64_t many, int64_t apart, int64_t nr, int64_t stride, int64_t len, bool raw,
                  int64_t next, double* mean, double* m2) {
  using A = typename Tr<T>::A;
  A pivot[MANY];
  bool lonely[MANY];
  for (int64_t j = 0; j < many; ++j) pivot[j] = raw ? A(0) : pivot_of(p + j * apart, nr, stride, len);
  for (int64_t j = 0; j < many; ++j)
    lonely[j] = deviations(p + j * apart, nr, stride, len, pivot[j], mean[j], m2[j], next);
  // What is usual is computed in vectors.
  const double n = static_cast<double>(nr * len), inverse = 1 / n;
  int odd = 0;
  for (int64_t j = 0; j < many; ++j) {
    const int far = !raw & (mean[j] * mean[j] > 0.25 * n * m2[j]);
    const int extreme = sizeof(A) == 4 ? !(m2[j] < 1e38) | (m2[j] < 1e-25) : !(m2[j] < HUGE_VAL);
    odd |= lonely[j] | far | extreme;
  }
  if (odd) {
    for (int64_t j = 0; j < many; ++j)
      moments_from(p + j * apart, nr, stride, len, raw, pivot[j], mean[j], m2[j], lonely[j], mean[j], m2[j]);
  } else if (raw) {
    for (int64_t j = 0; j < many; ++j) mean[j] = 0;
  } else {
    for (int64_t j = 0; j < many; ++j) {
      const double s = mean[j], about = m2[j] - s * (s * inverse);
      mean[j] = static_cast<double>(pivot[j]) + s * inverse;
      m2[j] = about > 0 ? about : 0;
    }
  }
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
  // rows too few to be worth numbers for every column
  const bool few = (p.R0 <= 4 && p.R1 >= 8) || (p.R0 <= 16 && p.R1 >= 16);
  if (p.R0 > 1 && p.R1 < SHORT_RUN && !few && (!affine || L % P == 0)) {
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

// f(a value of the type).
template <class F>
EVENLY_INLINE void with_dtype(int dtype, const F& f) {
  if (dtype == F32) f(float{});
  if (dtype == F64) f(double{});
  if (dtype == BF16) f(bf16{});
  if (dtype == F16) f(f16{});
}

template <class S, class A>
void convert(S* to, int64_t many, const A* from) {
  int64_t i = 0;
  if constexpr (sizeof(S) == 2 && sizeof(A) == 8)
    for (; i + WF <= many; i += WF) {
      const vfh half[2] = {__builtin_convertvector(raw_load<vd>(from + i), vfh),
                           __builtin_convertvector(raw_load<vd>(from + i + WD), vfh)};
      Tr<S>::store(to + i, raw_load<vf>(half));
    }
  if constexpr (sizeof(S) == 2 && sizeof(A) == 4)
    for (; i + WF <= many; i += WF) Tr<S>::store(to + i, raw_load<vf>(from + i));
  for (; i < many; ++i) to[i] = from_double<S>(from[i]);
}

// Gradients of parameters first ... first + many, in their own dtype, from sums.
template <class A>
void store_parameters(void* to, int dtype, int64_t first, int64_t many, const A* from) {
  if (!to) return;
  with_dtype(dtype, [&](auto kind) { convert(static_cast<decltype(kind)*>(to) + first, many, from); });
}

// Weight, bias or a given statistic in the accumulation type, each value repeated `times` times.
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
    with_dtype(dtype, [&](auto kind) { copy(static_cast<const decltype(kind)*>(from), n, times); });
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

// The statistics k, ..., k + many - 1 from the moments of n values each.
template <class A>
inline void finish_many(const Problem& p, int64_t k, int64_t many, double n, const double* mean, const double* m2,
                        bool raw) {
  const int64_t K = p.K0 * p.K1;
  A* s = static_cast<A*>(p.stats) + k;
  const double left = n - p.correction, share = n == 0 ? 0 : left > 0 ? 1 / left : NAN;
  double var[MANY], r[MANY];
  for (int64_t j = 0; j < many; ++j) var[j] = share * m2[j];
  switch (p.scale) {
    case SCALE_STD:
    case SCALE_RMS:
      inverse_roots<A>(var, p.eps, r, many);
      break;
    case SCALE_L2:
      for (int64_t j = 0; j < many; ++j) {
        const double norm = std::sqrt(m2[j]);
        r[j] = 1 / (norm < p.eps ? p.eps : norm == 0 ? norm_of_zero<A>() : norm);
      }
      break;
    default:
      for (int64_t j = 0; j < many; ++j) r[j] = 1;
  }
  const bool uses_mean = p.center || (p.scale == SCALE_STD && !raw);
  for (int64_t j = 0; j < many; ++j) {
    const double middle = uses_mean ? mean[j] : 0;
    const A high = static_cast<A>(middle);
    const double low = middle - static_cast<double>(high);
    s[j] = high;
    s[K + j] = static_cast<A>(r[j]);
    s[2 * K + j] = std::fabs(low) < HUGE_VAL ? static_cast<A>(low) : A(0);
  }
  if (p.mean_out)
    for (int64_t j = 0; j < many; ++j) static_cast<A*>(p.mean_out)[k + j] = static_cast<A>(mean[j]);
  if (p.var_out)
    for (int64_t j = 0; j < many; ++j) static_cast<A*>(p.var_out)[k + j] = static_cast<A>(var[j]);
  if (p.running_mean) {
    double moved[2][MANY];
    const double unbiased = 1 / (n - 1);
    with_dtype(p.sdtype, [&](auto kind) __attribute__((always_inline)) {
      using S = decltype(kind);
      S* rm = static_cast<S*>(p.running_mean) + k;
      S* rv = static_cast<S*>(p.running_var) + k;
      for (int64_t j = 0; j < many; ++j) {
        moved[0][j] = (1 - p.momentum) * to_double(rm[j]) + p.momentum * mean[j];
        moved[1][j] = (1 - p.momentum) * to_double(rv[j]) + p.momentum * (m2[j] * unbiased);
      }
      convert(rm, many, moved[0]);
      convert(rv, many, moved[1]);
    });
  }
}

template <class A>
inline void finish(const Problem& p, int64_t k, const Moments& mo, bool raw) {
  finish_many<A>(p, k, 1, mo.n, &mo.mean, &mo.m2, raw);
}

template <class A>
inline bool use_given(const Problem& p) {
  A* __restrict s = static_cast<A*>(p.stats);
  const int64_t K = p.K0 * p.K1;
  Parameters<A> means, vars;
  if (!means.set(p.mean_in, p.sdtype, K, 1) || !vars.set(p.var_in, p.sdtype, K, 1)) return false;
  const A* __restrict mean = means.at;
  const A* __restrict var = vars.at;
  const bool centered = p.center && mean;
  for (int64_t k = 0; k < K; ++k) s[k] = centered ? mean[k] : A(0);
  if (p.scale == SCALE_NONE)
    for (int64_t k = 0; k < K; ++k) s[K + k] = 1;
  else
    for (int64_t k = 0; k < K; k += MANY) {
      const int64_t many = min_of(MANY, K - k);
      double wide[MANY], r[MANY];
      for (int64_t j = 0; j < many; ++j) wide[j] = var[k + j];
      inverse_roots<A>(wide, p.eps, r, many);
      for (int64_t j = 0; j < many; ++j) s[K + k + j] = static_cast<A>(r[j]);
    }
  for (int64_t k = 0; k < K; ++k) s[2 * K + k] = 0;
  return true;
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

// The same for the statistics k, ..., k + many - 1, each from its sums.
template <class A>
void backs_of(const Problem& p, int64_t k, int64_t many, double n, const double* __restrict sum,
              const double* __restrict sum_d, double* __restrict b, double* __restrict c) {
  if (p.given || p.scale == SCALE_L2 || p.dvar || p.dmean) {
    for (int64_t j = 0; j < many; ++j) {
      const Back one = back_of<A>(p, k + j, n, sum[j], sum_d[j]);
      b[j] = one.b, c[j] = one.c;
    }
    return;
  }
  const int64_t K = p.K0 * p.K1;
  const A* __restrict s = static_cast<const A*>(p.stats) + k;
  const bool lift = !p.center && p.scale == SCALE_STD, scaled = p.scale != SCALE_NONE;
  const double slope = 1 / (n - p.correction), share = p.center ? 1 / n : 0;
  for (int64_t j = 0; j < many; ++j) {
    const double m = s[j], r = s[K + j], low = s[2 * K + j], shift = lift ? (m + low) * r : 0;
    const double sum_v = r * sum_d[j] + (shift - low * r) * sum[j];
    b[j] = scaled ? -r * sum_v * slope : 0;
    c[j] = (share != 0 ? -r * sum[j] * share : 0) - low * r * b[j];
  }
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
  int64_t ahead;  // fetch x and dy this many values further on into the second cache; 0: do not
  int64_t soon;   // where several rows are read at once, fetch what lies so many values further on; 0: do not
  bool past;      // write past the caches
};

// Whether outputs are written past the caches, which would not hold all that a pass touches until it is read again.
// A line that is written past them is not read before; who reads the output next finds it in memory.
inline bool is_far(const Problem& p, int64_t bytes) {
  const int tensors = 1 + (p.residual != nullptr) + (p.y != nullptr) + (p.dy != nullptr) + (p.dx != nullptr) +
                      (p.dresidual != nullptr);
  return tensors * bytes >= p.far;
}
// At the end of a task: what it wrote past the caches is there before the others are told.
struct Fence {
  bool on;
  ~Fence() {
    if (on) fence();
  }
};

// Values up to where a line of the cache begins, if a run has as many. STEP: in whole steps of so many, else 0.
template <int STEP, class T>
EVENLY_INLINE int64_t to_line(const T* p, int64_t n) {
  const int64_t lead = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(p) % 64 / sizeof(T));
  return lead <= n && lead % STEP == 0 ? lead : 0;
}

// A processor foresees that what is read in order goes on; not so values here and there, or several rows at once. Those
// are fetched, in order, so many values ahead of their use, where an input does not lie in a cache near a core.
constexpr int64_t FETCHED = 1 << 20;  // bytes of such an input, at least
constexpr int64_t SOON = 8192;        // bytes ahead
template <class T>
constexpr int64_t soon_of(int64_t values) {
  return values * static_cast<int64_t>(sizeof(T)) >= FETCHED ? SOON / static_cast<int64_t>(sizeof(T)) : 0;
}
template <class T>
struct Coefficients {  // of the value before the activation: SCALAR (x-m)*a+b; VECTOR ((x-m)*a+b)*wv+bv; COLUMN
  using A = typename Tr<T>::A;
  A m, a, b;
  const A* mv;
  const A* wv;
  const A* bv;
};

template <int MODE, class T, class K>
EVENLY_INLINE typename Tr<T>::V before(typename Tr<T>::V x, const K& k, int64_t i, int left) {
  if constexpr (MODE == SCALAR) return (x - k.m) * k.a + k.b;
  if constexpr (MODE == VECTOR) return ((x - k.m) * k.a + k.b) * take(k.wv + i, left) + take(k.bv + i, left);
  if constexpr (MODE == COLUMN) return (x - take(k.mv + i, left)) * take(k.wv + i, left) + take(k.bv + i, left);
}

// Pieces of one length that are computed in one call: how far apart they lie, and what each has of its own.
template <class T>
struct Series {
  using A = typename Tr<T>::A;
  int64_t many = 1;
  int64_t stride = 0;       // values from the start of a piece to that of the next
  int64_t bits_stride = 0;  // bytes of sign bits
  const A* m = nullptr;     // a number of its own for each piece; null: all have those of the coefficients
  const A* a = nullptr;
  const A* b = nullptr;

  EVENLY_INLINE void set(Coefficients<T>& k, int64_t i) const {
    if (m) k.m = m[i], k.a = a[i], k.b = b[i];
  }
  // Pieces without a gap between them, too short for what happens at their ends not to matter.
  EVENLY_INLINE bool flows(int64_t n) const { return m && many > 1 && stride == n && n % (2 * Tr<T>::W) != 0 && n >= Tr<T>::W && n <= 1024; }
};

// The coefficients of each lane of a vector, where pieces follow each other without a gap.
template <class T>
struct Lanes {
  using A = typename Tr<T>::A;
  using V = typename Tr<T>::V;
  V m, a, b;

  static EVENLY_INLINE Lanes at(const Series<T>& s, int64_t j) { return {splat(s.m[j]), splat(s.a[j]), splat(s.b[j])}; }
  template <class M>
  static EVENLY_INLINE Lanes joined(M first, const Lanes& k, const Lanes& next) {
    return {choose(first, k.m, next.m), choose(first, k.a, next.a), choose(first, k.b, next.b)};
  }
};

// One pass over such pieces as one stream: two(i, k) takes two vectors that lie in one piece, one(i, left, k) what may
// lie in two. Vectors begin where those of the output do, so that none is spread over two lines of the cache.
template <class T, class K, class At, class Two, class One>
EVENLY_INLINE void over_stream(const T* out, int64_t n, int64_t many, const At& at, const Two& two, const One& one) {
  using A = typename Tr<T>::A;
  constexpr int64_t W = Tr<T>::W, BYTES = W * sizeof(T);
  const int64_t total = n * many;
  int64_t i = 0, j = 0, end = n;
  K k = at(0);
  const int64_t lead = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(out) % BYTES / sizeof(T));
  if (sizeof(typename Tr<T>::V) == 64 && lead) one(0, static_cast<int>(lead), k), i = lead;
  for (;;) {
    for (; i + 2 * W <= end; i += 2 * W) two(i, k);
    for (; i + W <= end; i += W) one(i, static_cast<int>(W), k);
    const int left = static_cast<int>(min_of(W, total - i));
    if (left == 0) return;
    if (i == end || ++j == many) {  // a piece ends with the vector before, or all end here
      if (i != end) return one(i, left, k);
      k = at(++j), end += n;
      continue;
    }
    const K next = at(j);
    one(i, left, K::joined(first_lanes<A>(static_cast<int>(end - i)), k, next));
    i += left, k = next, end += n;
  }
}

template <class T, int ACT, bool RES, bool BITS, int MODE>
EVENLY_INLINE void apply_run(const Run<T>& run, int64_t n, const Coefficients<T>& k) {
  using X = Tr<T>;
  using V = typename X::V;
  constexpr int W = X::W;
  constexpr bool MIX = MODE == SCALAR && !BITS;  // nothing depends on the order of lanes
  constexpr int S = BITS && W < 4 ? 8 : 2 * W;   // values to a whole number of bytes of bits
  const T* x = run.x;
  const T* res = run.residual;
  T* y = run.y;
  int64_t i = 0;
  auto one = [&](int64_t i, int left) __attribute__((always_inline)) {
    V v = before<MODE, T>(take(x + i, left), k, i, left);
    if constexpr (RES) v += take(res + i, left);
    put(y + i, activate<ACT>(v), left);
    return BITS ? pack_lanes(~(v <= V{})) : 0u;
  };
  if (run.past)
    for (const int64_t lead = to_line<BITS ? (W % 8 ? 64 : W) : 1>(y, n); i < lead; i = min_of(i + W, lead)) {
      const unsigned bits = one(i, static_cast<int>(min_of(W, lead - i)));
      if constexpr (BITS) std::memcpy(run.bits + i / 8, &bits, W / 8);
    }
  for (; i + S <= n; i += S) {
    if (run.ahead) fetch(x + i + run.ahead, S);
    unsigned bits = 0;
    for (int g = 0; g < S; g += 2 * W) {
      V a, b;
      load_two<MIX>(x + i + g, a, b);
      a = before<MODE, T>(a, k, i + g, W);
      b = before<MODE, T>(b, k, i + g + W, W);
      if constexpr (RES) {
        V u, v;
        load_two<MIX>(res + i + g, u, v);
        a += u, b += v;
      }
      if constexpr (BITS) bits |= (pack_lanes(~(a <= V{})) | pack_lanes(~(b <= V{})) << W) << g;
      store_two<MIX>(y + i + g, activate<ACT>(a), activate<ACT>(b), run.past);
    }
    if constexpr (BITS) std::memcpy(run.bits + i / 8, &bits, S / 8);
  }
  unsigned bits = 0;
  const int64_t start = i;
  while (i < n) {
    // Whole vectors as long as there are W values: the last one does some of them again.
    if (!BITS && i + W > n && n >= W) i = n - W;
    const unsigned more = one(i, static_cast<int>(min_of(W, n - i)));
    if constexpr (BITS) bits |= more << (i - start);
    i += W;
  }
  if constexpr (BITS)
    if (start < n) std::memcpy(run.bits + start / 8, &bits, static_cast<size_t>(ceil_div(n - start, 8)));
}

template <class T, int ACT, bool RES>
EVENLY_INLINE void apply_stream(const Run<T>& run, int64_t n, const Series<T>& series) {
  using X = Tr<T>;
  using V = typename X::V;
  constexpr int W = X::W;
  over_stream<T, Lanes<T>>(
      run.y, n, series.many, [&](int64_t j) __attribute__((always_inline)) { return Lanes<T>::at(series, j); },
      [&](int64_t i, const Lanes<T>& k) __attribute__((always_inline)) {
        if (run.ahead) fetch(run.x + i + run.ahead, 2 * W);
        V a, b;
        load_two<true>(run.x + i, a, b);
        a = before<SCALAR, T>(a, k, i, W);
        b = before<SCALAR, T>(b, k, i, W);
        if constexpr (RES) {
          V u, v;
          load_two<true>(run.residual + i, u, v);
          a += u, b += v;
        }
        store_two<true>(run.y + i, activate<ACT>(a), activate<ACT>(b), run.past);
      },
      [&](int64_t i, int left, const Lanes<T>& k) __attribute__((always_inline)) {
        V v = before<SCALAR, T>(take(run.x + i, left), k, i, left);
        if constexpr (RES) v += take(run.residual + i, left);
        put(run.y + i, activate<ACT>(v), left);
      });
}

template <class T, int ACT, bool RES, bool BITS, int MODE>
void apply_series(Run<T> run, int64_t n, Coefficients<T> k, const Series<T>& series) {
  if constexpr (MODE == SCALAR && !BITS)
    if (series.flows(n)) return apply_stream<T, ACT, RES>(run, n, series);
  for (int64_t j = 0;;) {
    series.set(k, j);
    apply_run<T, ACT, RES, BITS, MODE>(run, n, k);
    if (++j == series.many) return;
    run.x += series.stride, run.y += series.stride;
    if constexpr (RES) run.residual += series.stride;
    if constexpr (BITS) run.bits += series.bits_stride;
  }
}

template <class T>
using ApplyFn = void (*)(Run<T>, int64_t, Coefficients<T>, const Series<T>&);

template <class T, int MODE>
ApplyFn<T> pick_apply(int act, bool res, bool bits) {
  switch (act) {
    case ACT_RELU:
      if (bits) return res ? apply_series<T, ACT_RELU, true, true, MODE> : apply_series<T, ACT_RELU, false, true, MODE>;
      return res ? apply_series<T, ACT_RELU, true, false, MODE> : apply_series<T, ACT_RELU, false, false, MODE>;
    case ACT_SILU:
      return res ? apply_series<T, ACT_SILU, true, false, MODE> : apply_series<T, ACT_SILU, false, false, MODE>;
    case ACT_GELU:
      return res ? apply_series<T, ACT_GELU, true, false, MODE> : apply_series<T, ACT_GELU, false, false, MODE>;
    default:
      return res ? apply_series<T, ACT_NONE, true, false, MODE> : apply_series<T, ACT_NONE, false, false, MODE>;
  }
}

// ---- backward along a run -------------------------------------------------------------------------------------
// How the gradient before the activation is found. PARKED: the first pass left it where the second finds it.

enum { PLAIN = 0, SIGN_BITS = 1, RELU = 2, RELU_RES = 3, SILU = 4, GELU = 5, SILU_RES = 6, GELU_RES = 7, PARKED = 8 };
constexpr bool has_residual(int kind) { return kind == RELU_RES || kind == SILU_RES || kind == GELU_RES; }

template <int KIND, class T>
EVENLY_INLINE void fetch_inputs(const Run<T>& run, int64_t from, int64_t values) {
  fetch<3>(run.x + from, values), fetch<3>(run.dy + from, values);
  if constexpr (has_residual(KIND)) fetch<3>(run.residual + from, values);
}

// From the gradient g after the activation. residual: what was added before it, where the kind has one.
template <class T, int KIND, int MODE, class K>
EVENLY_INLINE typename Tr<T>::V through(const Run<T>& run, typename Tr<T>::V g, typename Tr<T>::V x,
                                        typename Tr<T>::V residual, const K& k, int64_t i, int left) {
  using X = Tr<T>;
  using A = typename X::A;
  using V = typename X::V;
  if constexpr (KIND == SIGN_BITS) {
    unsigned bits = run.bits[i / 8] >> (i % 8);
    if constexpr (X::W == 16)
      if (left > 8) bits |= static_cast<unsigned>(run.bits[i / 8 + 1]) << 8;
    return keep(unpack_lanes<A>(bits), g);
  }
  if constexpr (KIND >= RELU && KIND < PARKED) {
    V v = before<MODE, T>(x, k, i, left);
    if constexpr (has_residual(KIND)) v += residual;
    constexpr int ACT = KIND == RELU || KIND == RELU_RES ? ACT_RELU : (KIND == SILU || KIND == SILU_RES) ? ACT_SILU : ACT_GELU;
    return activate_backward<ACT>(g, v);
  }
  return g;
}

template <class T, int KIND, int MODE, class K>
EVENLY_INLINE typename Tr<T>::V gradient(const Run<T>& run, const typename Tr<T>::A* park, typename Tr<T>::V x,
                                         const K& k, int64_t i, int left) {
  using V = typename Tr<T>::V;
  if constexpr (KIND == PARKED) return take(park + i, left);
  V residual{};
  if constexpr (has_residual(KIND)) residual = take(run.residual + i, left);
  return through<T, KIND, MODE>(run, take(run.dy + i, left), x, residual, k, i, left);
}

// The same for two vectors, with their inputs.
template <class T, int KIND, int MODE, bool MIX, class K>
EVENLY_INLINE void gradient_two(const Run<T>& run, const typename Tr<T>::A* park, const K& k, int64_t i,
                                typename Tr<T>::V (&x)[2], typename Tr<T>::V (&g)[2]) {
  using X = Tr<T>;
  using V = typename X::V;
  constexpr int W = X::W;
  load_two<MIX>(run.x + i, x[0], x[1]);
  if constexpr (KIND == PARKED) {
    g[0] = take(park + i, W), g[1] = take(park + i + W, W);
  } else {
    V residual[2] = {};
    if constexpr (has_residual(KIND)) load_two<MIX>(run.residual + i, residual[0], residual[1]);
    load_two<MIX>(run.dy + i, g[0], g[1]);
    g[0] = through<T, KIND, MODE>(run, g[0], x[0], residual[0], k, i, W);
    g[1] = through<T, KIND, MODE>(run, g[1], x[1], residual[1], k, i + W, W);
  }
}

// Sums of the gradient g of the normalized value, and of g*(x - m); a lane adds up in its own type.
template <class T>
struct Sums {
  using A = typename Tr<T>::A;
  using V = typename Tr<T>::V;
  V g0{}, g1{}, d0{}, d1{};
  A* park = nullptr;  // where to leave the gradient before the activation

  // On to sums in double, and from zero again.
  EVENLY_INLINE void move_to(vd& g, vd& gd) {
    g += widened(g0 + g1), gd += widened(d0 + d1);
    g0 = g1 = d0 = d1 = V{};
  }
};

// SCALAR: parameters that are constant along the run.
template <class T, int KIND>
EVENLY_INLINE void reduce_run(const Run<T>& run, int64_t n, const Coefficients<T>& k, Sums<T>& sums) {
  using X = Tr<T>;
  using A = typename X::A;
  using V = typename X::V;
  constexpr int W = X::W;
  constexpr bool MIX = KIND != SIGN_BITS;
  A* park = sums.park;
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    V x[2], g[2];
    gradient_two<T, KIND, SCALAR, MIX>(run, nullptr, k, i, x, g);
    if (park) put(park + i, g[0], W), put(park + i + W, g[1], W);
    sums.g0 += g[0], sums.d0 += g[0] * (x[0] - k.m);
    sums.g1 += g[1], sums.d1 += g[1] * (x[1] - k.m);
  }
  if (i + W <= n) {
    const V x = X::load(run.x + i);
    const V g = gradient<T, KIND, SCALAR>(run, nullptr, x, k, i, W);
    if (park) put(park + i, g, W);
    sums.g0 += g, sums.d0 += g * (x - k.m);
    i += W;
  }
  if (i == n) return;
  const int left = static_cast<int>(n - i);
  if (MIX && n >= W) {  // the last W values, without those that have been added
    const V x = X::load(run.x + n - W);
    const V g = gradient<T, KIND, SCALAR>(run, nullptr, x, k, n - W, W);
    if (park && sizeof(T) == sizeof(A)) put(park + n - W, g, W);
    if (park && sizeof(T) != sizeof(A))  // before it, parked values may lie in another order
      put(park + i, gradient<T, KIND, SCALAR>(run, nullptr, take(run.x + i, left), k, i, left), left);
    const auto fresh = ~first_lanes<A>(W - left);
    sums.g1 += keep(fresh, g);
    sums.d1 += keep(fresh, g * (x - k.m));
  } else {
    const V x = take(run.x + i, left);
    const V g = gradient<T, KIND, SCALAR>(run, nullptr, x, k, i, left);
    if (park) put(park + i, g, left);
    // a lane beyond the end has g = 0, but x - m there may be infinite
    sums.g1 += keep(first_lanes<A>(left), g);
    sums.d1 += keep(first_lanes<A>(left), g * (x - k.m));
  }
}

template <class T>
EVENLY_INLINE void advance(Run<T>& run, const Series<T>& series, bool residual) {
  run.x += series.stride, run.dy += series.stride;
  if (residual) run.residual += series.stride;
  if (run.bits) run.bits += series.bits_stride;
  if (run.dx) run.dx += series.stride;
  if (run.dresidual) run.dresidual += series.stride;
}

// The two sums of each piece, or joined: those of all pieces together.
template <class T, int KIND>
void reduce_series(Run<T> run, int64_t n, Coefficients<T> k, const Series<T>& series, bool joined,
                   typename Tr<T>::A* park, int64_t park_stride, double* g, double* gd) {
  constexpr int64_t ENOUGH = 64 * Tr<T>::W;  // values that lanes add up in their own type
  Sums<T> sums;
  vd all_g{}, all_gd{};
  vd held_g[WD], held_gd[WD];  // of the last pieces, to be added up together
  int held = 0;
  int64_t since = 0;
  for (int64_t j = 0;;) {
    series.set(k, j);
    sums.park = park ? park + j * park_stride : nullptr;
    reduce_run<T, KIND>(run, n, k, sums);
    if (!joined) {
      held_g[held] = widened(sums.g0 + sums.g1), held_gd[held] = widened(sums.d0 + sums.d1);
      sums = Sums<T>();
      if (++held == WD) {
        raw_store(g, sums_of(held_g)), raw_store(gd, sums_of(held_gd));
        g += WD, gd += WD, held = 0;
      }
    } else if ((since += n) >= ENOUGH) {
      sums.move_to(all_g, all_gd);
      since = 0;
    }
    if (++j == series.many) break;
    advance(run, series, has_residual(KIND));
  }
  if (!joined) {
    for (int i = 0; i < held; ++i) sum_lanes(held_g[i], held_gd[i], g[i], gd[i]);
    return;
  }
  sums.move_to(all_g, all_gd);
  sum_lanes(all_g, all_gd, *g, *gd);
}

// VECTOR: R pieces at once, with the gradients of weight and bias, which are added to dw and db.
template <class T, int KIND, int R>
EVENLY_INLINE void reduce_together(const Run<T>& first, int64_t n, const Coefficients<T>& base, const Series<T>& series,
                                   int64_t from, typename Tr<T>::A* park, int64_t park_stride, double* g, double* gd,
                                   typename Tr<T>::A* dw, typename Tr<T>::A* db) {
  using X = Tr<T>;
  using A = typename X::A;
  using V = typename X::V;
  constexpr int W = X::W;
  Run<T> runs[R];
  Coefficients<T> ks[R];
  V s[R] = {}, q[R] = {};
  runs[0] = first;
  for (int r = 0; r < R; ++r) {
    if (r) {
      runs[r] = runs[r - 1];
      advance(runs[r], series, has_residual(KIND));
    }
    ks[r] = base;
    series.set(ks[r], from + r);
  }
  auto step = [&](int64_t i, int left) __attribute__((always_inline)) {
    V w{}, b{};
    const V gain = take(base.wv + i, left);
    if (R > 1 && first.soon) fetch_inputs<KIND>(first, first.soon + R * i, R * W);
    for (int r = 0; r < R; ++r) {
      const V x = take(runs[r].x + i, left);
      V one = gradient<T, KIND, VECTOR>(runs[r], nullptr, x, ks[r], i, left);
      if (left != W) one = keep(first_lanes<A>(left), one);
      if (park) put(park + r * park_stride + i, one, left);
      const V d = x - ks[r].m;
      w += one * (d * ks[r].a + ks[r].b);
      b += one;
      one *= gain;
      s[r] += one;
      q[r] += left == W ? one * d : keep(first_lanes<A>(left), one * d);
    }
    put(dw + i, take(dw + i, left) + w, left);
    put(db + i, take(db + i, left) + b, left);
  };
  int64_t i = 0;
  for (; i + W <= n; i += W) step(i, W);
  if (i < n) step(i, static_cast<int>(n - i));
  for (int r = 0; r < R; ++r) sum_lanes(s[r], q[r], g[r], gd[r]);
}

template <class T, int KIND>
void reduce_vector(Run<T> run, int64_t n, Coefficients<T> k, const Series<T>& series, typename Tr<T>::A* park,
                   int64_t park_stride, double* g, double* gd, typename Tr<T>::A* dw, typename Tr<T>::A* db) {
  constexpr int R = 4;
  int64_t j = 0;
  auto at = [&](int64_t j) __attribute__((always_inline)) { return park ? park + j * park_stride : nullptr; };
  for (; j + R <= series.many; j += R) {
    reduce_together<T, KIND, R>(run, n, k, series, j, at(j), park_stride, g + j, gd + j, dw, db);
    if (j + R == series.many) return;
    for (int r = 0; r < R; ++r) advance(run, series, has_residual(KIND));
  }
  for (; j < series.many; ++j) {
    reduce_together<T, KIND, 1>(run, n, k, series, j, at(j), park_stride, g + j, gd + j, dw, db);
    if (j + 1 < series.many) advance(run, series, has_residual(KIND));
  }
}

template <class T>
struct BackCoefficients {  // dx = g*w*r + ((x-m)*r)*b + c
  using A = typename Tr<T>::A;
  A r, rw, b, c;
  const A* rv;
  const A* rwv;
  const A* bv;
  const A* cv;
  bool given;  // b and c are 0
};

template <class T, int KIND, int MODE, bool GIVEN>
EVENLY_INLINE void apply_back_of(const Run<T>& run, int64_t n, const Coefficients<T>& k, const BackCoefficients<T>& e,
                                 const typename Tr<T>::A* park) {
  using X = Tr<T>;
  using V = typename X::V;
  constexpr int W = X::W;
  constexpr bool MIX = MODE == SCALAR && KIND != SIGN_BITS;
  auto back = [&](int64_t i, int left, V x, V g) __attribute__((always_inline)) {
    if constexpr (MODE == SCALAR) return GIVEN ? g * e.rw : g * e.rw + (((x - k.m) * e.r) * e.b + e.c);
    if constexpr (MODE == VECTOR) {
      const V gain = e.r * take(k.wv + i, left);
      return GIVEN ? g * gain : g * gain + (((x - k.m) * e.r) * e.b + e.c);
    }
    if constexpr (MODE == COLUMN) {
      const V gain = take(e.rwv + i, left);
      if constexpr (GIVEN) return g * gain;
      const V u = (x - take(k.mv + i, left)) * take(e.rv + i, left);
      return g * gain + (u * take(e.bv + i, left) + take(e.cv + i, left));
    }
  };
  int64_t i = 0;
  auto one = [&](int64_t i, int left) __attribute__((always_inline)) {
    const V x = take(run.x + i, left);
    const V g = gradient<T, KIND, MODE>(run, park, x, k, i, left);
    if (run.dx) put(run.dx + i, back(i, left, x, g), left);
    if (run.dresidual) put(run.dresidual + i, g, left);
  };
  // parked values of half precision lie in the order of the first pass
  if (run.past && (KIND != PARKED || sizeof(T) == sizeof(typename X::A)))
    for (const int64_t lead = to_line<KIND == SIGN_BITS ? W : 1>(run.dx ? run.dx : run.dresidual, n);
         i < lead; i = min_of(i + W, lead))
      one(i, static_cast<int>(min_of(W, lead - i)));
  for (; i + 2 * W <= n; i += 2 * W) {
    if (run.ahead) fetch(run.x + i + run.ahead, 2 * W), fetch(run.dy + i + run.ahead, 2 * W);
    V x[2], g[2];
    gradient_two<T, KIND, MODE, MIX>(run, park, k, i, x, g);
    if (run.dx) store_two<MIX>(run.dx + i, back(i, W, x[0], g[0]), back(i + W, W, x[1], g[1]), run.past);
    if (run.dresidual) store_two<MIX>(run.dresidual + i, g[0], g[1], run.past);
  }
  while (i < n) {
    // Whole vectors as long as there are W values, but not over what has been parked in the output.
    if (KIND != PARKED && KIND != SIGN_BITS && i + W > n && n >= W) i = n - W;
    one(i, static_cast<int>(min_of(W, n - i)));
    i += W;
  }
}
// What each piece of a series has of its own.
template <class A>
struct BackTable {
  const A* r = nullptr;
  const A* rw = nullptr;
  const A* b = nullptr;
  const A* c = nullptr;
};
template <class T>
struct BackLanes : Lanes<T> {
  using V = typename Tr<T>::V;
  V r, rw, slope, shift;

  static EVENLY_INLINE BackLanes at(const Series<T>& s, const BackTable<typename Tr<T>::A>& t, int64_t j) {
    return {Lanes<T>::at(s, j), splat(t.r[j]), splat(t.rw[j]), splat(t.b[j]), splat(t.c[j])};
  }
  template <class M>
  static EVENLY_INLINE BackLanes joined(M first, const BackLanes& k, const BackLanes& next) {
    return {Lanes<T>::joined(first, k, next), choose(first, k.r, next.r), choose(first, k.rw, next.rw),
            choose(first, k.slope, next.slope), choose(first, k.shift, next.shift)};
  }
};

template <class T, int KIND, bool GIVEN>
EVENLY_INLINE void back_stream(const Run<T>& run, int64_t n, const Series<T>& series,
                               const BackTable<typename Tr<T>::A>& table, const typename Tr<T>::A* park) {
  using V = typename Tr<T>::V;
  using K = BackLanes<T>;
  constexpr int W = Tr<T>::W;
  auto back = [](V x, V g, const K& k) __attribute__((always_inline)) {
    return GIVEN ? g * k.rw : g * k.rw + (((x - k.m) * k.r) * k.slope + k.shift);
  };
  over_stream<T, K>(
      run.dx ? run.dx : run.dresidual, n, series.many,
      [&](int64_t j) __attribute__((always_inline)) { return K::at(series, table, j); },
      [&](int64_t i, const K& k) __attribute__((always_inline)) {
        if (run.ahead) fetch(run.x + i + run.ahead, 2 * W), fetch(run.dy + i + run.ahead, 2 * W);
        V x[2], g[2];
        gradient_two<T, KIND, SCALAR, true>(run, park, k, i, x, g);
        if (run.dx) store_two<true>(run.dx + i, back(x[0], g[0], k), back(x[1], g[1], k), run.past);
        if (run.dresidual) store_two<true>(run.dresidual + i, g[0], g[1], run.past);
      },
      [&](int64_t i, int left, const K& k) __attribute__((always_inline)) {
        const V x = take(run.x + i, left);
        const V g = gradient<T, KIND, SCALAR>(run, park, x, k, i, left);
        if (run.dx) put(run.dx + i, back(x, g, k), left);
        if (run.dresidual) put(run.dresidual + i, g, left);
      });
}

template <class T, int KIND, int MODE>
void back_series(Run<T> run, int64_t n, Coefficients<T> k, BackCoefficients<T> e, const Series<T>& series,
                 const BackTable<typename Tr<T>::A>& table, const typename Tr<T>::A* park, int64_t park_stride) {
  // parked values of half precision lie in the order of the first pass
  if constexpr (MODE == SCALAR && KIND != SIGN_BITS && (KIND != PARKED || sizeof(T) == sizeof(typename Tr<T>::A)))
    if (table.r && series.flows(n) && (!park || park_stride == n)) {
      if (e.given) return back_stream<T, KIND, true>(run, n, series, table, park);
      return back_stream<T, KIND, false>(run, n, series, table, park);
    }
  for (int64_t j = 0;;) {
    series.set(k, j);
    if (table.r) e.r = table.r[j], e.rw = table.rw[j], e.b = table.b[j], e.c = table.c[j];
    const auto* parked = park ? park + j * park_stride : nullptr;
    if (e.given)
      apply_back_of<T, KIND, MODE, true>(run, n, k, e, parked);
    else
      apply_back_of<T, KIND, MODE, false>(run, n, k, e, parked);
    if (++j == series.many) return;
    advance(run, series, has_residual(KIND));
  }
}

template <class T>
using ReduceFn = void (*)(Run<T>, int64_t, Coefficients<T>, const Series<T>&, bool, typename Tr<T>::A*, int64_t,
                          double*, double*);
template <class T>
using ReduceVectorFn = void (*)(Run<T>, int64_t, Coefficients<T>, const Series<T>&, typename Tr<T>::A*, int64_t,
                                double*, double*, typename Tr<T>::A*, typename Tr<T>::A*);
template <class T>
using BackFn = void (*)(Run<T>, int64_t, Coefficients<T>, BackCoefficients<T>, const Series<T>&,
                        const BackTable<typename Tr<T>::A>&, const typename Tr<T>::A*, int64_t);

template <class T>
ReduceFn<T> pick_reduce(int kind) {
  static constexpr ReduceFn<T> table[] = {
      reduce_series<T, PLAIN>, reduce_series<T, SIGN_BITS>, reduce_series<T, RELU>,     reduce_series<T, RELU_RES>,
      reduce_series<T, SILU>,  reduce_series<T, GELU>,      reduce_series<T, SILU_RES>, reduce_series<T, GELU_RES>};
  return table[kind];
}
template <class T>
ReduceVectorFn<T> pick_reduce_vector(int kind) {
  static constexpr ReduceVectorFn<T> table[] = {
      reduce_vector<T, PLAIN>, reduce_vector<T, SIGN_BITS>, reduce_vector<T, RELU>,     reduce_vector<T, RELU_RES>,
      reduce_vector<T, SILU>,  reduce_vector<T, GELU>,      reduce_vector<T, SILU_RES>, reduce_vector<T, GELU_RES>};
  return table[kind];
}
template <class T, int MODE>
BackFn<T> pick_back(int kind) {
  static constexpr BackFn<T> table[] = {
      back_series<T, PLAIN, MODE>, back_series<T, SIGN_BITS, MODE>, back_series<T, RELU, MODE>,
      back_series<T, RELU_RES, MODE>, back_series<T, SILU, MODE>,  back_series<T, GELU, MODE>,
      back_series<T, SILU_RES, MODE>, back_series<T, GELU_RES, MODE>, back_series<T, PARKED, MODE>};
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

#include "runs.inl"
#include "cols.inl"
#include "masked.inl"

// ---- entry ----------------------------------------------------------------------------------------------------

template <class T>
int forward_of(const Problem& p) {
  Geometry g;
  if (!plan(p, g)) return UNSUPPORTED;
  if (p.given && !p.ready && !use_given<typename Tr<T>::A>(p)) return NO_MEMORY;
  if (is_masked(p)) return g.cols ? MaskedCols<T>(p, g).forward() : MaskedRuns<T>(p, g).forward();
  return g.cols ? Cols<T>(p, g).forward() : Runs<T>(p, g).forward();
}

template <class T>
int backward_of(const Problem& p) {
  Geometry g;
  if (!plan(p, g)) return UNSUPPORTED;
  if (is_masked(p)) return g.cols ? MaskedCols<T>(p, g).backward() : MaskedRuns<T>(p, g).backward();
  return g.cols ? Cols<T>(p, g).backward() : Runs<T>(p, g).backward();
}

int forward(const Problem& p) {
  switch (p.dtype) {
    case BF16:
      return forward_of<bf16>(p);
#ifdef EVENLY_OTHERS  // an instruction set that has something for bfloat16 alone
    default:
      return EVENLY_OTHERS.forward(p);
#else
    case F32:
      return forward_of<float>(p);
#ifndef EVENLY_FEW_TYPES  // the tests build two under sanitizers
    case F64:
      return forward_of<double>(p);
    case F16:
      return forward_of<f16>(p);
#endif
    default:
      return UNSUPPORTED;
#endif
  }
}

int backward(const Problem& p) {
  switch (p.dtype) {
    case BF16:
      return backward_of<bf16>(p);
#ifdef EVENLY_OTHERS
    default:
      return EVENLY_OTHERS.backward(p);
#else
    case F32:
      return backward_of<float>(p);
#ifndef EVENLY_FEW_TYPES
    case F64:
      return backward_of<double>(p);
    case F16:
      return backward_of<f16>(p);
#endif
    default:
      return UNSUPPORTED;
#endif
  }
}

}  // namespace
}  // namespace EVENLY_ISA

extern const Kernels EVENLY_TABLE;
const Kernels EVENLY_TABLE = {EVENLY_ISA::forward, EVENLY_ISA::backward, EVENLY_ISA::bits_bytes,
                              EVENLY_ISA::bits_row};

}  // namespace evenly
