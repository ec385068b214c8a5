// The pieces of layers whose gradient is not autograd's (pieces.h). Compiled once for each instruction set.
//
// Sums are taken in float (double for double) over a few thousand values, and in double beyond; where float cannot
// hold a sum it is taken again in double. The partition depends on the shape alone, so that results do not depend on
// the number of threads. A recursion over samples in float keeps what rounding took from its state, and adds it at
// the next step (Kahan's summation), so that a long stream drifts no further than a short one.

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "pieces.h"
#include "problem.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace evenly {
namespace EVENLY_ISA {
namespace {

#include "vectors.inl"

constexpr int64_t PIECE = 4096;       // values whose sums are taken in float
constexpr int64_t TASK = 16384;       // values a task should have
constexpr int64_t PARALLEL = 32768;   // fewer values than this: one thread
constexpr int64_t SHORT_RUN = 32;     // shorter runs are treated as columns
constexpr int64_t STRIP = 128;        // channels of a recursion that a task advances
constexpr int64_t TILE = 65536;       // values of a tile of samples, which stays in cache between the phases
constexpr int64_t NEAR = 32;          // samples of a strip that stay in the first cache

#include "common.inl"

// Tasks, on the calling thread where there is little to do.
template <class F>
void spread(int64_t values, int64_t n, const F& f) {
  if (values < PARALLEL)
    for (int64_t i = 0; i < n; ++i) f(i);
  else
    parallel(n, f);
}

// f(j, lanes) for vectors of n values; lanes is W everywhere but at the end.
template <class T, class F>
EVENLY_INLINE void vectors(int64_t n, const F& f) {
  constexpr int W = Tr<T>::W;
  int64_t j = 0;
  for (; j + W <= n; j += W) f(j, W);
  if (j < n) f(j, static_cast<int>(n - j));
}
#define EVENLY_EACH __attribute__((always_inline))

// f(number of vectors, j, lanes): two full vectors at once, then one.
template <class T, class F>
EVENLY_INLINE void by_two(int64_t n, const F& f) {
  constexpr int W = Tr<T>::W;
  int64_t j = 0;
  for (; j + 2 * W <= n; j += 2 * W) f(std::integral_constant<int, 2>{}, j, W);
  for (; j < n; j += W) f(std::integral_constant<int, 1>{}, j, static_cast<int>(min_of(W, n - j)));
}

EVENLY_INLINE vf root_of(vf v) {
#if defined(__AVX512F__)
  return as<vf>(_mm512_sqrt_ps(as<__m512>(v)));
#elif defined(__AVX__)
  return as<vf>(_mm256_sqrt_ps(as<__m256>(v)));
#else
  for (int i = 0; i < WF; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}
EVENLY_INLINE vd root_of(vd v) {
#if defined(__AVX512F__)
  return as<vd>(_mm512_sqrt_pd(as<__m512d>(v)));
#elif defined(__AVX__)
  return as<vd>(_mm256_sqrt_pd(as<__m256d>(v)));
#else
  for (int i = 0; i < WD; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// 1 / sqrt(v). Float: the processor's estimate and a third-order correction, within 1 or 2 units in the last place.
EVENLY_INLINE vd inverse_root(vd v) { return 1 / root_of(v); }
EVENLY_INLINE vf inverse_root(vf v) {
#if defined(__AVX512F__)
  const vf r = as<vf>(_mm512_rsqrt14_ps(as<__m512>(v)));
#elif defined(__AVX__)
  const vf r = as<vf>(_mm256_rsqrt_ps(as<__m256>(v)));
#else
  return 1 / root_of(v);
#endif
#if defined(__AVX__)
  if (pack_lanes(~((v > 1e-30f) & (v < 1e30f)))) return 1 / root_of(v);
  const vf h = 1 - (v * r) * r;
  return r + (r * h) * (0.5f + 0.375f * h);
#endif
}

// Float cannot hold this sum of squares: too large, or so small that squares have underflowed.
template <class A>
EVENLY_INLINE bool lost(double squares) {
  return sizeof(A) == 4 && (!(squares < 1e38) || squares < 1e-25);
}

// f(S*) for the storage type S of a dtype.
template <class F>
void with_storage(int dtype, const F& f) {
  switch (dtype) {
    case F64:
      return f(static_cast<double*>(nullptr));
    case BF16:
      return f(static_cast<bf16*>(nullptr));
    case F16:
      return f(static_cast<f16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}
// Numbers of a dtype that is known when they are read; null: all are `other`.
inline void read_numbers(const void* from, int dtype, int64_t n, double* to, double other = 0) {
  if (!from) {
    for (int64_t j = 0; j < n; ++j) to[j] = other;
    return;
  }
  with_storage(dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    for (int64_t j = 0; j < n; ++j) to[j] = to_double(static_cast<const S*>(from)[j]);
  });
}
inline void write_numbers(void* to, int dtype, int64_t n, const double* from) {
  if (!to) return;
  with_storage(dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    for (int64_t j = 0; j < n; ++j) static_cast<S*>(to)[j] = from_double<S>(from[j]);
  });
}

// ---- sums -----------------------------------------------------------------------------------------------------

// Over n contiguous values: squares of x, or g and g*(x - m).
template <class T, bool PAIRS>
void sum_run(const T* x, const T* g, double m, int64_t n, double& first, double& second) {
  using X = Tr<T>;
  using A = typename X::A;
  using V = typename X::V;
  constexpr int W = X::W;
  const V mean = splat(static_cast<A>(m));
  V s[4] = {}, q[4] = {};
  auto step = [&](int64_t i, int left, int to) EVENLY_EACH {
    if constexpr (PAIRS) {
      const V u = take(g + i, left), d = take(x + i, left) - mean;
      s[to] += u;
      q[to] += left == W ? u * d : keep(first_lanes<A>(left), u * d);
    } else {
      const V v = take(x + i, left);
      s[to] += v * v;
    }
  };
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int to = 0; to < 4; ++to) step(i + to * W, W, to);
  for (; i + W <= n; i += W) step(i, W, 0);
  if (i < n) step(i, static_cast<int>(n - i), 1);
  double sum = sum_lanes((s[0] + s[1]) + (s[2] + s[3]));
  double sum_d = PAIRS ? sum_lanes((q[0] + q[1]) + (q[2] + q[3])) : 0;
  if (PAIRS ? sizeof(A) == 4 && !(std::isfinite(sum) && std::isfinite(sum_d)) : lost<A>(sum)) {
    sum = 0, sum_d = 0;
    for (int64_t j = 0; j < n; ++j) {
      const double v = to_double(x[j]), u = PAIRS ? to_double(g[j]) : v;
      sum += PAIRS ? u : v * v;
      if (PAIRS) sum_d += u * (v - m);
    }
  } else if (PAIRS) {
    sum_d -= sum * (m - static_cast<double>(static_cast<A>(m)));
  }
  first += sum;
  if (PAIRS) second += sum_d;
}

template <class T, bool PAIRS>
int sums_of_runs(const Block& b, const T* x, const T* g, const double* m, double* first, double* second) {
  const int64_t runs = b.K0 * b.R0 * b.K1, pieces = ceil_div(b.R1, PIECE), items = runs * pieces;
  const int64_t group = max_of(1, TASK / min_of(b.R1, PIECE));
  Buffer<double> parts;
  const bool direct = b.R0 == 1 && pieces == 1;
  if (!direct && !parts.allocate(2 * items)) return NO_MEMORY;
  spread(runs * b.R1, ceil_div(items, group), [&](int64_t task) {
    for (int64_t i = task * group; i < min_of(items, (task + 1) * group); ++i) {
      const int64_t run = i / pieces, from = (i % pieces) * PIECE, at = run * b.R1 + from;
      const int64_t k = run / (b.R0 * b.K1) * b.K1 + run % b.K1;
      double s = 0, q = 0;
      sum_run<T, PAIRS>(x + at, PAIRS ? g + at : nullptr, m ? m[k] : 0.0, min_of(PIECE, b.R1 - from), s, q);
      double* to = direct ? first + k : parts.data + 2 * i;
      *to = s;
      if (PAIRS) *(direct ? second + k : parts.data + 2 * i + 1) = q;
    }
  });
  if (direct) return OK;
  for (int64_t k = 0; k < b.K0 * b.K1; ++k) {
    double s = 0, q = 0;
    for (int64_t r = 0; r < b.R0; ++r) {
      const double* from = parts.data + 2 * pieces * ((k / b.K1 * b.R0 + r) * b.K1 + k % b.K1);
      for (int64_t i = 0; i < pieces; ++i) {
        s += from[2 * i];
        if (PAIRS) q += from[2 * i + 1];
      }
    }
    first[k] = s;
    if (PAIRS) second[k] = q;
  }
  return OK;
}

// Rows of K1*R1 values, several in one where they are short.
struct Rows {
  int64_t length, size, width, rows, rest, block, parts;
  explicit Rows(const Block& b) {
    length = b.K1 * b.R1;
    size = b.R0 * length;
    int64_t q = 1;
    while (q * length < 64) q *= 2;
    if (q > b.R0) q = 1;
    width = q * length;
    rows = size / width;
    rest = size % width;
    block = max_of(4, min_of(256, 8192 / width));
    parts = min_of(ceil_div(rows, block), max_of(1, min_of(64, size / PARALLEL)));
  }
  int64_t first_row(int64_t part) const { return min_of(rows, part * ceil_div(rows, block) / parts * block); }
};

template <class T, bool PAIRS>
void sum_rows(const T* x, const T* g, const typename Tr<T>::A* m, int64_t many, int64_t pitch, int64_t width,
              typename Tr<T>::A* s, typename Tr<T>::A* q) {
  using V = typename Tr<T>::V;
  int64_t r = 0;
  for (; r + 4 <= many; r += 4)
    vectors<T>(width, [&](int64_t j, int left) EVENLY_EACH {
      const T* xs = x + r * pitch + j;
      V v[4];
      for (int i = 0; i < 4; ++i) v[i] = take(xs + i * pitch, left);
      if constexpr (PAIRS) {
        const T* gs = g + r * pitch + j;
        const V mean = take(m + j, left);
        V u[4];
        for (int i = 0; i < 4; ++i) u[i] = take(gs + i * pitch, left);
        put(s + j, take(s + j, left) + ((u[0] + u[1]) + (u[2] + u[3])), left);
        put(q + j, take(q + j, left) + ((u[0] * (v[0] - mean) + u[1] * (v[1] - mean)) +
                                        (u[2] * (v[2] - mean) + u[3] * (v[3] - mean))), left);
      } else {
        put(s + j, take(s + j, left) + ((v[0] * v[0] + v[1] * v[1]) + (v[2] * v[2] + v[3] * v[3])), left);
      }
    });
  for (; r < many; ++r)
    vectors<T>(width, [&](int64_t j, int left) EVENLY_EACH {
      const V v = take(x + r * pitch + j, left);
      if constexpr (PAIRS) {
        const V u = take(g + r * pitch + j, left);
        put(s + j, take(s + j, left) + u, left);
        put(q + j, take(q + j, left) + u * (v - take(m + j, left)), left);
      } else {
        put(s + j, take(s + j, left) + v * v, left);
      }
    });
}

template <class T, bool PAIRS>
int sums_of_rows(const Block& b, const T* x, const T* g, const double* m, double* first, double* second) {
  using A = typename Tr<T>::A;
  const Rows l(b);
  const int64_t P = l.width, columns = 2 * l.length;
  Buffer<double> all;  // [K0][parts][2][length]
  if (l.parts > 1 && !all.allocate(b.K0 * l.parts * columns)) return NO_MEMORY;
  std::atomic<int> status{OK};
  auto fold = [&](int64_t k0, const double* from) {  // columns that share a statistic
    for (int64_t k1 = 0; k1 < b.K1; ++k1) {
      double s = 0, q = 0;
      for (int64_t r = 0; r < b.R1; ++r) s += from[k1 * b.R1 + r], q += from[l.length + k1 * b.R1 + r];
      first[k0 * b.K1 + k1] = s;
      if (PAIRS) second[k0 * b.K1 + k1] = q;
    }
  };
  const int64_t tasks = b.K0 * l.parts, group = max_of(1, TASK * l.parts / l.size);
  spread(b.K0 * l.size, ceil_div(tasks, group), [&](int64_t some) {
    Buffer<A> work;  // m, and the two sums
    Buffer<double> own;
    if (!work.allocate(3 * P) || !own.allocate(columns)) {
      status.store(NO_MEMORY);
      return;
    }
    for (int64_t task = some * group; task < min_of(tasks, (some + 1) * group); ++task) {
      const int64_t k0 = task / l.parts, part = task % l.parts;
      double* out = l.parts > 1 ? all.data + task * columns : own.data;
      for (int64_t j = 0; j < columns; ++j) out[j] = 0;
      if (PAIRS)
        for (int64_t j = 0; j < P; ++j)
          work.data[j] = static_cast<A>(m ? m[k0 * b.K1 + (j % l.length) / b.R1] : 0.0);
      auto add = [&](int64_t row, int64_t many, int64_t width) {
        const int64_t at = k0 * l.size + row * P;
        A* s = work.data + P;
        A* q = s + P;
        for (int64_t j = 0; j < 2 * P; ++j) s[j] = 0;
        sum_rows<T, PAIRS>(x + at, PAIRS ? g + at : nullptr, work.data, many, P, width, s, q);
        for (int64_t j = 0; j < width; ++j) {
          const int64_t c = j % l.length;
          double sum = static_cast<double>(s[j]), sum_d = PAIRS ? static_cast<double>(q[j]) : 0;
          const double mean = PAIRS && m ? m[k0 * b.K1 + c / b.R1] : 0.0;
          if (PAIRS ? sizeof(A) == 4 && !(std::isfinite(sum) && std::isfinite(sum_d)) : lost<A>(sum)) {
            sum = 0, sum_d = 0;
            for (int64_t r = 0; r < many; ++r) {
              const double v = to_double(x[at + r * P + j]), u = PAIRS ? to_double(g[at + r * P + j]) : v;
              sum += PAIRS ? u : v * v;
              if (PAIRS) sum_d += u * (v - mean);
            }
          } else if (PAIRS) {
            sum_d -= sum * (mean - static_cast<double>(static_cast<A>(mean)));
          }
          out[c] += sum;
          out[l.length + c] += sum_d;
        }
      };
      for (int64_t row = l.first_row(part), end = l.first_row(part + 1); row < end; row += l.block)
        add(row, min_of(l.block, end - row), P);
      if (part == l.parts - 1 && l.rest) add(l.rows, 1, l.rest);
      if (l.parts == 1) fold(k0, out);
    }
  });
  if (status.load() != OK || l.parts == 1) return status.load();
  for (int64_t k0 = 0; k0 < b.K0; ++k0) {
    double* into = all.data + k0 * l.parts * columns;
    for (int64_t i = 1; i < l.parts; ++i)
      for (int64_t j = 0; j < columns; ++j) into[j] += into[i * columns + j];
    fold(k0, into);
  }
  return OK;
}

inline bool by_rows(const Block& b) { return b.R0 > 1 && b.R1 < SHORT_RUN; }

template <class T>
int sums_of(const Block& b, const void* x, const void* g, const double* m, double* first, double* second) {
  const T* xs = static_cast<const T*>(x);
  const T* gs = static_cast<const T*>(g);
  if (by_rows(b))
    return g ? sums_of_rows<T, true>(b, xs, gs, m, first, second) : sums_of_rows<T, false>(b, xs, gs, m, first, second);
  return g ? sums_of_runs<T, true>(b, xs, gs, m, first, second) : sums_of_runs<T, false>(b, xs, gs, m, first, second);
}

// Sums of products of n contiguous values: of g*x, g² and x². Squares that underflow count as 0.
template <class T>
void products_of_run(const T* g, const T* x, int64_t n, double* out, int64_t apart) {
  using V = typename Tr<T>::V;
  constexpr int W = Tr<T>::W;
  double total[3] = {};
  for (int64_t from = 0; from < n; from += PIECE) {
    const int64_t many = min_of(PIECE, n - from);
    V gx[2] = {}, gg[2] = {}, xx[2] = {};
    auto step = [&](int64_t i, int left, int to) EVENLY_EACH {
      const V u = take(g + from + i, left), v = take(x + from + i, left);
      gx[to] += u * v;
      gg[to] += u * u;
      xx[to] += v * v;
    };
    int64_t i = 0;
    for (; i + 2 * W <= many; i += 2 * W) step(i, W, 0), step(i + W, W, 1);
    for (; i < many; i += W) step(i, static_cast<int>(min_of(W, many - i)), 0);
    double sums[3] = {sum_lanes(gx[0] + gx[1]), sum_lanes(gg[0] + gg[1]), sum_lanes(xx[0] + xx[1])};
    if (sizeof(typename Tr<T>::A) == 4 && !(std::isfinite(sums[0]) && sums[1] < 1e38 && sums[2] < 1e38)) {
      sums[0] = sums[1] = sums[2] = 0;
      for (int64_t j = from; j < from + many; ++j) {
        const double u = to_double(g[j]), v = to_double(x[j]);
        sums[0] += u * v, sums[1] += u * u, sums[2] += v * v;
      }
    }
    for (int k = 0; k < 3; ++k) total[k] += sums[k];
  }
  for (int k = 0; k < 3; ++k) out[k * apart] = total[k];
}

// ---- maps -----------------------------------------------------------------------------------------------------

// What the loops need of a statistic: the mean in the type of the arithmetic, what rounding took from it in shift.
template <class A>
struct Factors {
  A gain, m, slope, shift;
  Factors(int64_t k, const double* g, const double* mean, const double* s, const double* b) {
    const double exact = mean ? mean[k] : 0;
    m = static_cast<A>(exact);
    gain = static_cast<A>(g ? g[k] : 0);
    slope = static_cast<A>(s[k]);
    const double low = exact - static_cast<double>(m);
    shift = static_cast<A>((b ? b[k] : 0) - (std::isfinite(low) ? low * s[k] : 0));
  }
};

enum { SCALED = 0, COMBINED = 1, CLAMPED = 2, INSIDE = 3 };

template <class T, int MODE>
EVENLY_INLINE typename Tr<T>::V mapped(typename Tr<T>::V z, const T* g, typename Tr<T>::V gain, typename Tr<T>::V limit,
                                       int left) {
  using V = typename Tr<T>::V;
  if constexpr (MODE == COMBINED) return z + take(g, left) * gain;
  if constexpr (MODE == CLAMPED) return choose(z > limit, limit, choose(z < -limit, -limit, z));  // NaN stays
  if constexpr (MODE == INSIDE) return choose((z <= limit) & (z >= -limit), take(g, left), V{});
  return z;
}

template <class T, int MODE>
int map_of(const Block& b, const T* x, const T* g, const double* gain, const double* m, const double* slope,
           const double* shift, double most, T* y) {
  using A = typename Tr<T>::A;
  using V = typename Tr<T>::V;
  constexpr bool PAIRS = MODE == COMBINED || MODE == INSIDE;
  const V limit = splat(static_cast<A>(most));
  const int64_t values = b.K0 * b.R0 * b.K1 * b.R1;
  if (!by_rows(b)) {
    const int64_t runs = b.K0 * b.R0 * b.K1, pieces = ceil_div(b.R1, TASK), items = runs * pieces;
    const int64_t group = max_of(1, TASK / b.R1);
    spread(values, ceil_div(items, group), [&](int64_t task) {
      for (int64_t i = task * group; i < min_of(items, (task + 1) * group); ++i) {
        const int64_t run = i / pieces, from = (i % pieces) * TASK, at = run * b.R1 + from;
        const Factors<A> f(run / (b.R0 * b.K1) * b.K1 + run % b.K1, gain, m, slope, shift);
        vectors<T>(min_of(TASK, b.R1 - from), [&](int64_t j, int left) EVENLY_EACH {
          const V z = (take(x + at + j, left) - f.m) * f.slope + f.shift;
          put(y + at + j, mapped<T, MODE>(z, PAIRS ? g + at + j : nullptr, splat(f.gain), limit, left), left);
        });
      }
    });
    return OK;
  }
  const Rows l(b);
  const int64_t P = l.width, all = l.rows + (l.rest ? 1 : 0);
  Buffer<A> work;  // [K0][4][P]: gain, m, slope, shift
  if (!work.allocate(b.K0 * 4 * P)) return NO_MEMORY;
  for (int64_t k0 = 0; k0 < b.K0; ++k0) {
    A* w = work.data + k0 * 4 * P;
    for (int64_t j = 0; j < P; ++j) {
      const Factors<A> f(k0 * b.K1 + (j % l.length) / b.R1, gain, m, slope, shift);
      w[j] = f.gain, w[P + j] = f.m, w[2 * P + j] = f.slope, w[3 * P + j] = f.shift;
    }
  }
  const int64_t group = max_of(1, TASK / P), tasks = ceil_div(all, group);
  spread(values, b.K0 * tasks, [&](int64_t task) {
    const int64_t k0 = task / tasks, from = task % tasks * group;
    const A* w = work.data + k0 * 4 * P;
    for (int64_t r = from; r < min_of(all, from + group); ++r) {
      const int64_t at = k0 * l.size + r * P;
      vectors<T>(r < l.rows ? P : l.rest, [&](int64_t j, int left) EVENLY_EACH {
        const V z = (take(x + at + j, left) - take(w + P + j, left)) * take(w + 2 * P + j, left) + take(w + 3 * P + j, left);
        const V factor = MODE == COMBINED ? take(w + j, left) : V{};
        put(y + at + j, mapped<T, MODE>(z, PAIRS ? g + at + j : nullptr, factor, limit, left), left);
      });
    }
  });
  return OK;
}

// ---- a linear recursion ---------------------------------------------------------------------------------------

template <class S>
int scan_of(int64_t steps, int64_t width, const S* a, double constant, const S* v, const S* start, S* before, S* last) {
  spread(steps * width, ceil_div(width, STRIP), [&](int64_t task) {
    double state[STRIP];
    const int64_t from = task * STRIP, n = min_of(STRIP, width - from);
    for (int64_t j = 0; j < n; ++j) state[j] = static_cast<double>(start[from + j]);
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t at = t * width + from;
      for (int64_t j = 0; j < n; ++j) before[at + j] = static_cast<S>(state[j]);
      if (a)
        for (int64_t j = 0; j < n; ++j) state[j] = static_cast<double>(a[at + j]) * state[j] + static_cast<double>(v[at + j]);
      else
        for (int64_t j = 0; j < n; ++j) state[j] = constant * state[j] + static_cast<double>(v[at + j]);
    }
    for (int64_t j = 0; j < n; ++j) last[from + j] = static_cast<S>(state[j]);
  });
  return OK;
}

// ---- groups of channels ---------------------------------------------------------------------------------------

// The sum of squares of a group.
template <class T>
EVENLY_INLINE double group_squares(const T* x, int64_t n, double eps) {
  using A = typename Tr<T>::A;
  using V = typename Tr<T>::V;
  constexpr int W = Tr<T>::W;
  V s[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int to = 0; to < 4; ++to) {
      const V v = Tr<T>::load(x + i + to * W);
      s[to] += v * v;
    }
  vectors<T>(n - i, [&](int64_t j, int left) EVENLY_EACH {
    const V v = take(x + i + j, left);
    s[0] += v * v;
  });
  double squares = sum_lanes((s[0] + s[1]) + (s[2] + s[3]));
  // small squares that underflow are nothing beside an ordinary eps
  if (sizeof(A) == 4 && (!(squares < 1e38) || (squares < 1e-25 && eps < 1e-28))) {
    squares = 0;
    for (int64_t j = 0; j < n; ++j) squares += to_double(x[j]) * to_double(x[j]);
  }
  return squares;
}

// 1 / sqrt(mean square + eps) of a group.
template <class T>
EVENLY_INLINE double group_scale(const T* x, int64_t n, double eps) {
  return 1 / std::sqrt(group_squares(x, n, eps) / static_cast<double>(n) + eps);
}

// ---- power normalization --------------------------------------------------------------------------------------

template <class T>
class PowerPass {
  using A = typename Tr<T>::A;
  using V = typename Tr<T>::V;
  static constexpr int MANY = 4;  // rows at a time

 public:
  explicit PowerPass(const Power& problem) : p(problem), C(p.channels), size(p.group ? p.group : C), G(C / size) {}

  int forward() {
    if (!prepare()) return NO_MEMORY;
    double* phi = p.kept;
    double* total = p.kept + C;
    double* state = numbers.data + C;
    double* bias = numbers.data + 2 * C;
    read_numbers(p.running ? p.running : p.before, p.wdtype, C, state, 1.0);
    read_numbers(p.bias, p.wdtype, C, bias);
    if (p.running) *p.steps += 1;
    if (!p.exact) {
      std::memcpy(phi, state, static_cast<size_t>(C) * sizeof(double));
      if (p.running) write_numbers(p.before, p.wdtype, C, state);
    }
    if (p.exact || *p.steps <= p.warmup) {
      if (const int status = pass<SQUARES>()) return status;
      for (int64_t j = 0; j < C; ++j) phi[j] = first.data[j] / static_cast<double>(p.rows);
    }
    for (int64_t j = 0; j < C; ++j) {
      factors.data[j] = static_cast<A>(numbers.data[j] / std::sqrt(phi[j] + p.eps));
      factors.data[C + j] = static_cast<A>(bias[j]);
    }
    if (const int status = pass<FORWARD>()) return status;
    std::memcpy(total, first.data, static_cast<size_t>(C) * sizeof(double));
    if (!p.running) return OK;
    for (int64_t j = 0; j < C; ++j) {
      const double square = total[j] / static_cast<double>(p.rows);
      double moved = state[j];
      if (!p.exact && *p.steps < p.warmup) moved += (square - moved) / static_cast<double>(*p.steps);
      state[j] = moved + (1 - p.alpha_fwd) * (square - moved);
    }
    write_numbers(p.running, p.wdtype, C, state);
    return OK;
  }

  int backward() {
    if (!prepare()) return NO_MEMORY;
    const double* phi = p.kept;
    const double* total = p.kept + C;
    const double n = static_cast<double>(p.rows);
    double* state = numbers.data + C;
    double* dots = numbers.data + 2 * C;
    read_numbers(p.exact ? nullptr : p.state, p.wdtype, C, state);
    if (p.exact)
      if (const int status = pass<PAIRS>()) return status;
    for (int64_t j = 0; j < C; ++j) {
      const double weight = numbers.data[j], inverse = 1 / std::sqrt(phi[j] + p.eps);
      const double back = p.batch ? 1 / std::sqrt(total[j] / n + p.eps) : inverse;
      const double nu = p.exact ? weight * second.data[j] * inverse / n : p.rate * state[j];
      factors.data[j] = static_cast<A>(back * weight);
      factors.data[C + j] = static_cast<A>(nu * back);
      factors.data[2 * C + j] = static_cast<A>(inverse);
    }
    if (p.out || !p.exact)
      if (const int status = p.out ? pass<BACKWARD>() : pass<PAIRS>()) return status;
    for (int64_t j = 0; j < C; ++j) {
      const double inverse = 1 / std::sqrt(phi[j] + p.eps);
      dots[j] = second.data[j] * inverse;
      state[j] += (dots[j] * numbers.data[j] - p.rate * state[j] * total[j] * inverse * inverse) / n;
    }
    if (!p.exact) write_numbers(p.state, p.wdtype, C, state);
    write_numbers(p.dweight, p.wdtype, C, dots);
    write_numbers(p.dbias, p.wdtype, C, first.data);
    return OK;
  }

 private:
  enum { SQUARES, FORWARD, PAIRS, BACKWARD };

  const Power& p;
  int64_t C, size, G;
  Buffer<A> factors;             // FORWARD: y = z*a + b; BACKWARD: the gradient of z is dy*a - (z*c)*b
  Buffer<double> first, second;  // FORWARD, SQUARES: sum of z²; PAIRS, BACKWARD: sums of dy and of dy*z

  Buffer<double> numbers;        // weight, the running state, bias or the weight's gradient

  bool prepare() {
    if (!factors.allocate(3 * C) || !first.allocate(C) || !second.allocate(C) || !numbers.allocate(3 * C)) return false;
    read_numbers(p.weight, p.wdtype, C, numbers.data, 1.0);
    return true;
  }

  template <int MODE>
  int pass() const {
    const int64_t values = p.rows * C, parts = max_of(1, min_of(p.rows, min_of(64, values / PARALLEL)));
    constexpr int64_t SUMS = MODE >= PAIRS ? 2 : 1;
    Buffer<double> all;
    if (!all.zeros(parts * SUMS * C)) return NO_MEMORY;
    std::atomic<int> status{OK};
    spread(values, parts, [&](int64_t part) {
      Buffer<A> work;  // two sums, and a number a group and row
      Buffer<double> squares;
      if (!work.zeros(2 * C + MANY * G) || !squares.allocate(MANY * G)) return status.store(NO_MEMORY);
      double* out = all.data + part * SUMS * C;
      const int64_t end = (part + 1) * p.rows / parts;
      for (int64_t row = part * p.rows / parts; row < end;) {
        const int64_t from = row, until = min_of(end, row + 64);
        for (; row + MANY <= until; row += MANY) rows_of<MODE, MANY>(row, work.data, squares.data);
        for (; row < until; ++row) rows_of<MODE, 1>(row, work.data, squares.data);
        bool some = false;
        for (int64_t j = 0; j < SUMS * C; ++j) {
          const double sum = static_cast<double>(work.data[j]);
          const bool exact = MODE < PAIRS && !p.group && lost<A>(sum);
          some |= exact;
          out[j] += exact ? 0 : sum;
        }
        if (some) again(from, until, work.data, out);
        std::memset(work.data, 0, static_cast<size_t>(SUMS * C) * sizeof(A));
      }
    });
    if (status.load() != OK) return status.load();
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t j = 0; j < C; ++j) {
        first.data[j] = (part ? first.data[j] : 0) + all.data[part * SUMS * C + j];
        if (MODE >= PAIRS) second.data[j] = (part ? second.data[j] : 0) + all.data[part * SUMS * C + C + j];
      }
    return OK;
  }

  // Sums of squares that float could not hold, in double.
  void again(int64_t from, int64_t until, const A* sums, double* out) const {
    for (int64_t j = 0; j < C; ++j) {
      if (!lost<A>(static_cast<double>(sums[j]))) continue;
      double exact = 0;
      for (int64_t r = from; r < until; ++r) {
        const double v = to_double(static_cast<const T*>(p.x)[r * C + j]);
        exact += v * v;
      }
      out[j] += exact;
    }
  }

  template <int MODE, int R>
  void rows_of(int64_t row, A* work, double* squares) const {
    if (p.group)
      rows_of<MODE, R, true>(row, work, squares);
    else
      rows_of<MODE, R, false>(row, work, squares);
  }

  template <int MODE, int R, bool GROUPS>
  void rows_of(int64_t row, A* work, double* squares) const {
    const T* x = static_cast<const T*>(p.x) + row * C;
    const T* dy = static_cast<const T*>(p.dy) + (MODE >= PAIRS ? row * C : 0);
    T* out = static_cast<T*>(p.out) + (p.out ? row * C : 0);
    const A* a = factors.data;
    const A* b = a + C;
    const A* c = b + C;
    A* root = work + 2 * C;  // [R][G]
    if constexpr (GROUPS)
      for (int i = 0; i < R; ++i)
        for (int64_t k = 0; k < G; ++k)
          squares[i * G + k] = group_squares(x + i * C + k * size, size, p.eps);
    if constexpr (GROUPS) {
      const double part = 1 / static_cast<double>(size);
      for (int64_t i = 0; i < R * G; ++i) root[i] = static_cast<A>(1 / std::sqrt(squares[i] * part + p.eps));
    }
    for (int64_t k = 0; k < G; ++k) {
      A scale[R];
      V dots[R] = {};
      for (int i = 0; i < R; ++i) scale[i] = GROUPS ? root[i * G + k] : A(1);
      vectors<T>(size, [&](int64_t at, int left) EVENLY_EACH {
        const int64_t j = k * size + at;
        V sum{}, pairs{}, one{}, two{}, three{};
        if constexpr (MODE == FORWARD || MODE == BACKWARD) one = take(a + j, left), two = take(b + j, left);
        if constexpr (MODE == BACKWARD) three = take(c + j, left);
        for (int i = 0; i < R; ++i) {
          V z = take(x + i * C + j, left);
          if constexpr (GROUPS) z *= scale[i];
          if constexpr (MODE == SQUARES || MODE == FORWARD) sum += z * z;
          if constexpr (MODE == FORWARD) put(out + i * C + j, z * one + two, left);
          if constexpr (MODE == PAIRS || MODE == BACKWARD) {
            const V g = take(dy + i * C + j, left);
            sum += g;
            pairs += g * z;
            if constexpr (MODE == BACKWARD) {
              const V d = g * one - (z * three) * two;
              if constexpr (GROUPS)
                dots[i] += d * z;
              else
                put(out + i * C + j, d, left);
            }
          }
        }
        put(work + j, take(work + j, left) + sum, left);
        if constexpr (MODE >= PAIRS) put(work + C + j, take(work + C + j, left) + pairs, left);
      });
      if constexpr (GROUPS && MODE == BACKWARD) {  // through group scaling: (d - z * mean of d*z) * scale
        A along[R];
        for (int i = 0; i < R; ++i) along[i] = static_cast<A>(sum_lanes(dots[i]) / static_cast<double>(size));
        vectors<T>(size, [&](int64_t at, int left) EVENLY_EACH {
          const int64_t j = k * size + at;
          const V one = take(a + j, left), two = take(b + j, left), three = take(c + j, left);
          for (int i = 0; i < R; ++i) {
            const V z = take(x + i * C + j, left) * scale[i];
            const V d = take(dy + i * C + j, left) * one - ((z * three) * two + z * along[i]);
            put(out + i * C + j, d * scale[i], left);
          }
        });
      }
    }
  }
};

// ---- online normalization -------------------------------------------------------------------------------------

template <class T>
class OnlinePass {
  using A = typename Tr<T>::A;
  using V = typename Tr<T>::V;
  static constexpr int W = Tr<T>::W;

 public:
  explicit OnlinePass(const Online& problem)
      : p(problem),
        N(p.steps),
        C(p.channels),
        tile(p.group ? max_of(1, min_of(N, TILE / C)) : N),
        strips(ceil_div(C, STRIP)),
        rates{static_cast<A>(1 - p.alpha_fwd), static_cast<A>(p.alpha_fwd * (1 - p.alpha_fwd)),
              static_cast<A>(1 - p.alpha_bkw), static_cast<A>(p.eps), static_cast<A>(p.limit)} {}

  int forward() {
    read_numbers(p.mean ? p.mean : p.mean_before, p.wdtype, C, p.kept);
    read_numbers(p.var ? p.var : p.var_before, p.wdtype, C, p.kept + C);
    if (p.mean) {
      write_numbers(p.mean_before, p.wdtype, C, p.kept);
      write_numbers(p.var_before, p.wdtype, C, p.kept + C);
    }
    if (!prepare(4, p.group ? 1 : 0)) return NO_MEMORY;
    T* out = static_cast<T*>(p.out);
    if (!p.group)
      spread(N * C, strips, [&](int64_t strip) {
        if (p.limit > 0)
          normalize<WITHIN>(strip, 0, N, out);
        else
          normalize<PLAIN>(strip, 0, N, out);
      });
    else  // a tile is normalized while the one before it is scaled
      for (int64_t from = 0; from < N + tile; from += tile) {
        const int64_t before = from - tile;
        both(from < N ? strips : 0, [&](int64_t strip) { normalize<PLAIN>(strip, from, end_of(from), tile_of(from) - from * C); },
             before < 0 ? 0 : row_tasks(before), [&](int64_t task) {
               over_rows(before, task, [&](int64_t t) { guard(tile_of(before) + (t - before) * C, out + t * C); });
             });
      }
    if (p.mean) {
      state_to(p.mean, MEAN);
      state_to(p.var, VAR);
    }
    return OK;
  }

  int backward() {
    if (!prepare(8, p.group ? 3 : 0) || !sums.zeros(2 * C)) return NO_MEMORY;
    const T* dy = static_cast<const T*>(p.dy);
    if (!p.group)
      spread(N * C, strips, [&](int64_t strip) {
        if (p.limit > 0)
          at_once<true>(strip);
        else
          at_once<false>(strip);
      });
    else  // a tile is normalized while the one before it is controlled
      for (int64_t from = 0; from < N + tile; from += tile) {
        const int64_t before = from - tile;
        both(from < N ? strips : 0, [&](int64_t strip) { normalize<KEPT>(strip, from, end_of(from), tile_of(from) - from * C); },
             before < 0 ? 0 : strips, [&](int64_t strip) { control(strip, before, end_of(before), tile_of(before)); });
        if (from < N)
          spread(N * C, row_tasks(from), [&](int64_t task) {
            over_rows(from, task, [&](int64_t t) { unguard(dy + t * C, tile_of(from) + (t - from) * C); });
          });
      }
    write_numbers(p.dweight, p.wdtype, C, sums.data);
    write_numbers(p.dbias, p.wdtype, C, sums.data + C);
    state_to(p.v, CTRL_V);
    state_to(p.u, CTRL_U);
    return OK;
  }

 private:
  // What becomes of a normalized value: mapped, mapped and clamped, or kept beside 1/scale for the backward pass.
  enum { PLAIN, WITHIN, KEPT };
  enum { MEAN = 0, VAR = 2, CTRL_V = 4, CTRL_U = 6 };  // each followed by what rounding took from it

  const Online& p;
  int64_t N, C, tile, strips;
  struct Rates {
    A fwd, gained, bkw, eps, limit;
  } rates;
  Buffer<A> state;        // [8][C]
  Buffer<A> affine;       // weight, bias
  Buffer<A> tiles;        // two of each. Forward: z; backward: y, 1/scale, and the gradient before the guard
  int64_t parts = 0;      // of which a tile has so many
  Buffer<double> sums;    // gradients of weight and bias

  bool prepare(int64_t states, int64_t many) {
    Buffer<double> numbers;
    parts = many;
    if (!state.allocate(states * C) || !affine.allocate(2 * C) || !tiles.allocate(many * min_of(2, ceil_div(N, tile)) * tile * C) || !numbers.allocate(C))
      return false;
    read_numbers(p.weight, p.wdtype, C, numbers.data, 1.0);
    for (int64_t j = 0; j < C; ++j) affine.data[j] = static_cast<A>(numbers.data[j]);
    read_numbers(p.bias, p.wdtype, C, numbers.data);
    for (int64_t j = 0; j < C; ++j) affine.data[C + j] = static_cast<A>(numbers.data[j]);
    state_from(p.kept, MEAN);
    state_from(p.kept + C, VAR);
    if (states == 8) {
      read_numbers(p.v, p.wdtype, C, numbers.data);
      state_from(numbers.data, CTRL_V);
      read_numbers(p.u, p.wdtype, C, numbers.data);
      state_from(numbers.data, CTRL_U);
    }
    return true;
  }
  void state_from(const double* from, int64_t slot) {
    for (int64_t j = 0; j < C; ++j) {
      const A high = static_cast<A>(from[j]);
      const double low = from[j] - static_cast<double>(high);
      state.data[slot * C + j] = high;
      state.data[(slot + 1) * C + j] = std::isfinite(low) ? static_cast<A>(low) : A(0);
    }
  }
  void state_to(void* to, int64_t slot) const {
    const A* high = state.data + slot * C;
    with_storage(p.wdtype, [&](auto* type) {
      using S = std::remove_pointer_t<decltype(type)>;
      for (int64_t j = 0; j < C; ++j)
        static_cast<S*>(to)[j] = from_double<S>(static_cast<double>(high[j]) + static_cast<double>(high[C + j]));
    });
  }

  int64_t end_of(int64_t from) const { return min_of(N, from + tile); }
  A* tile_of(int64_t from) const { return tiles.data + from / tile % 2 * parts * tile * C; }

  // Two kinds of tasks at the same time.
  template <class F, class G>
  void both(int64_t many, const F& f, int64_t more, const G& g) const {
    spread(N * C, many + more, [&](int64_t task) { return task < many ? f(task) : g(task - many); });
  }

  // The rows of a tile, a few a task.
  int64_t rows_a_task() const { return max_of(1, TILE / 8 / C); }
  int64_t row_tasks(int64_t from) const { return ceil_div(end_of(from) - from, rows_a_task()); }
  template <class F>
  void over_rows(int64_t from, int64_t task, const F& f) const {
    const int64_t first = from + task * rows_a_task(), last = min_of(end_of(from), first + rows_a_task());
    for (int64_t t = first; t < last; ++t) f(t);
  }

  // Layer scaling of a row.
  void guard(const A* z, T* out) const {
    for (int64_t k = 0; k < C; k += p.group) {
      const A scale = static_cast<A>(group_scale(z + k, p.group, p.guard_eps));
      vectors<T>(p.group, [&](int64_t j, int left) EVENLY_EACH { put(out + k + j, take(z + k + j, left) * scale, left); });
    }
  }

  // f(number of vectors, channel, lanes, first sample, last) over a strip: few samples at a time.
  template <class F>
  EVENLY_INLINE void over_strip(int64_t strip, int64_t from, int64_t to, const F& f) const {
    const int64_t first = strip * STRIP, n = min_of(STRIP, C - first);
    for (int64_t t = from; t < to; t += NEAR)
      by_two<T>(n, [&](auto many, int64_t j, int left) EVENLY_EACH { f(many, first + j, left, t, min_of(to, t + NEAR)); });
  }

  // R vectors of a later sample into the cache: the processor does not see a stride of rows.
  template <int R, int WRITE = 0, class S>
  EVENLY_INLINE static void fetch_row(const S* from) {
    constexpr int LINE = 64;
    const char* at = reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(from));
    for (size_t i = 0; i < R * W * sizeof(S); i += LINE) __builtin_prefetch(at + i, WRITE, 2);
  }

  // R vectors of numbers.
  template <int R>
  EVENLY_INLINE static void take_all(const A* from, V* to, int left) {
    for (int i = 0; i < R; ++i) to[i] = take(from + i * W, left);
  }

  // A state of R vectors, in registers.
  template <int R>
  struct Held {
    V high[R], low[R];
    A* at;
    int64_t channels;
    EVENLY_INLINE Held(A* from, int64_t C, int left) : at(from), channels(C) {
      take_all<R>(from, high, left);
      take_all<R>(from + C, low, left);
    }
    EVENLY_INLINE void store(int left) const {
      for (int i = 0; i < R; ++i) put(at + i * W, high[i], left), put(at + channels + i * W, low[i], left);
    }
    EVENLY_INLINE void advance(int i, V step) { move(i, step + low[i]); }
    EVENLY_INLINE void fade(int i, A rate, V step) { move(i, (step + low[i]) - high[i] * rate); }
    EVENLY_INLINE void move(int i, V carried) {  // with what rounding takes from it
      const V moved = high[i] + carried;
      low[i] = carried - (moved - high[i]);
      high[i] = moved;
    }
  };
  template <int R>
  EVENLY_INLINE Held<R> held(int slot, int64_t channel, int left) const {
    return Held<R>(state.data + slot * C + channel, C, left);
  }
  // A sample moves the statistics.
  template <int R>
  EVENLY_INLINE static void observe(Held<R>& m, Held<R>& s, int i, V d, const Rates& k) {
    m.advance(i, d * k.fwd);
    s.fade(i, k.fwd, (d * k.gained) * d);
  }

  template <int MODE, class S>
  void normalize(int64_t strip, int64_t from, int64_t to, S* out) const {
    over_strip(strip, from, to, [&](auto many, int64_t c, int left, int64_t begin, int64_t end) EVENLY_EACH {
      constexpr int R = decltype(many)::value;
      const Rates k = rates;
      const int64_t row = C;
      auto m = held<R>(MEAN, c, left), s = held<R>(VAR, c, left);
      V w[R], b[R];
      take_all<R>(affine.data + c, w, left);
      take_all<R>(affine.data + C + c, b, left);
      const T* x = static_cast<const T*>(p.x) + begin * C + c;
      S* y = out + begin * C + c;
      S* scale = MODE == KEPT ? y + tile * C : y;
      for (int64_t t = begin; t < end; ++t, x += row, y += row, scale += row) {
        fetch_row<R>(x + NEAR * row);
        for (int i = 0; i < R; ++i) {
          const V d = (take(x + i * W, left) - m.high[i]) - m.low[i];
          const V inverse = inverse_root(s.high[i] + k.eps), unit = d * inverse;
          observe<R>(m, s, i, d, k);
          if constexpr (MODE == KEPT) {
            put(y + i * W, unit, left);
            put(scale + i * W, inverse, left);
          } else {
            const V z = unit * w[i] + b[i];
            put(y + i * W, MODE == WITHIN ? mapped<T, CLAMPED>(z, nullptr, V{}, splat(k.limit), left) : z, left);
          }
        }
      }
      m.store(left);
      s.store(left);
    });
  }

  // The gradient before layer scaling, of a row, into the third part of a tile.
  void unguard(const T* dy, A* y) const {
    A* g = y + 2 * tile * C;
    const A* w = affine.data;
    const A* b = affine.data + C;
    for (int64_t k = 0; k < C; k += p.group) {
      auto mapped_at = [&](int64_t j, int left) EVENLY_EACH { return take(y + j, left) * take(w + j, left) + take(b + j, left); };
      V dots{}, squares{};
      vectors<T>(p.group, [&](int64_t i, int left) EVENLY_EACH {
        const V z = mapped_at(k + i, left);
        dots += z * take(dy + k + i, left);
        squares += z * z;
      });
      double square = sum_lanes(squares);
      if (lost<A>(square)) {
        vectors<T>(p.group, [&](int64_t i, int left) EVENLY_EACH { put(g + k + i, mapped_at(k + i, left), left); });
        square = group_squares(g + k, p.group, p.guard_eps);
      }
      const double scale = 1 / std::sqrt(square / static_cast<double>(p.group) + p.guard_eps);
      const double along = sum_lanes(dots) / static_cast<double>(p.group) * scale;  // mean of dy times the output
      const A one = static_cast<A>(scale), two = static_cast<A>(along * scale * scale);
      vectors<T>(p.group, [&](int64_t i, int left) EVENLY_EACH {
        put(g + k + i, take(dy + k + i, left) * one - mapped_at(k + i, left) * two, left);
      });
    }
  }

  // One step of the control process: the gradient before it from that after it.
  template <int R>
  EVENLY_INLINE static V controlled(Held<R>& v, Held<R>& u, int i, V grad, V y, V inverse, const Rates& k) {
    const V tilde = grad - v.high[i] * (y * k.bkw);
    v.advance(i, tilde * y);
    const V back = tilde * inverse - u.high[i] * k.bkw;
    u.advance(i, back);
    return back;
  }

  template <int R>
  EVENLY_INLINE void add_sums(const V* dw, const V* db, int64_t c, int left) const {
    for (int i = 0; i < R; ++i) {
      A one[2][W];
      raw_store(one[0], dw[i]), raw_store(one[1], db[i]);
      double* __restrict to_w = sums.data + c + i * W;
      double* __restrict to_b = to_w + C;
      if (left == W)
        for (int lane = 0; lane < W; ++lane) to_w[lane] += one[0][lane], to_b[lane] += one[1][lane];
      else
        for (int lane = 0; lane < left; ++lane) to_w[lane] += one[0][lane], to_b[lane] += one[1][lane];
    }
  }

  // The control process over a tile, from what the phases before it have left there.
  void control(int64_t strip, int64_t from, int64_t to, const A* kept) const {
    over_strip(strip, from, to, [&](auto many, int64_t c, int left, int64_t begin, int64_t end) EVENLY_EACH {
      constexpr int R = decltype(many)::value;
      const Rates k = rates;
      const int64_t row = C;
      auto v = held<R>(CTRL_V, c, left), u = held<R>(CTRL_U, c, left);
      V w[R], dw[R] = {}, db[R] = {};
      take_all<R>(affine.data + c, w, left);
      const A* y = kept + (begin - from) * C + c;
      const A* scale = y + tile * C;
      const A* grad = scale + tile * C;
      T* dx = p.out ? static_cast<T*>(p.out) + begin * C + c : nullptr;
      for (int64_t t = begin; t < end; ++t, y += row, scale += row, grad += row) {
        V back[R];
        for (int i = 0; i < R; ++i) {
          const V unit = take(y + i * W, left), g = take(grad + i * W, left);
          dw[i] += g * unit;
          db[i] += g;
          back[i] = controlled<R>(v, u, i, g * w[i], unit, take(scale + i * W, left), k);
        }
        if (!dx) continue;
        fetch_row<R, 1>(dx + NEAR * row);
        for (int i = 0; i < R; ++i) put(dx + i * W, back[i], left);
        dx += row;
      }
      v.store(left);
      u.store(left);
      add_sums<R>(dw, db, c, left);
    });
  }

  // The backward pass of a strip, without layer scaling: nothing in it needs another channel.
  template <bool CLAMP>
  void at_once(int64_t strip) const {
    over_strip(strip, 0, N, [&](auto many, int64_t c, int left, int64_t begin, int64_t end) EVENLY_EACH {
      constexpr int R = decltype(many)::value;
      const Rates k = rates;
      const int64_t row = C;
      auto m = held<R>(MEAN, c, left), s = held<R>(VAR, c, left);
      auto v = held<R>(CTRL_V, c, left), u = held<R>(CTRL_U, c, left);
      V w[R], b[R], dw[R] = {}, db[R] = {};
      take_all<R>(affine.data + c, w, left);
      take_all<R>(affine.data + C + c, b, left);
      const T* x = static_cast<const T*>(p.x) + begin * C + c;
      const T* dy = static_cast<const T*>(p.dy) + begin * C + c;
      T* dx = p.out ? static_cast<T*>(p.out) + begin * C + c : nullptr;
      for (int64_t t = begin; t < end; ++t, x += row, dy += row) {
        fetch_row<R>(x + NEAR * row);
        fetch_row<R>(dy + NEAR * row);
        V back[R];
        for (int i = 0; i < R; ++i) {
          const V d = (take(x + i * W, left) - m.high[i]) - m.low[i];
          const V inverse = inverse_root(s.high[i] + k.eps), unit = d * inverse;
          observe<R>(m, s, i, d, k);
          const T* at = dy + i * W;
          const V g = CLAMP ? mapped<T, INSIDE>(unit * w[i] + b[i], at, V{}, splat(k.limit), left) : take(at, left);
          dw[i] += g * unit;
          db[i] += g;
          back[i] = controlled<R>(v, u, i, g * w[i], unit, inverse, k);
        }
        if (!dx) continue;
        fetch_row<R, 1>(dx + NEAR * row);
        for (int i = 0; i < R; ++i) put(dx + i * W, back[i], left);
        dx += row;
      }
      m.store(left);
      s.store(left);
      v.store(left);
      u.store(left);
      add_sums<R>(dw, db, c, left);
    });
  }
};

// Its numbers where there are several values a sample and channel: loops over the samples in strips of channels, and
// over the channels of a sample.
class OnlineFew {
 public:
  explicit OnlineFew(const OnlineNumbers& problem)
      : p(problem),
        N(p.steps),
        C(p.channels),
        inverse(p.out),
        offset(inverse + N * C),
        gain(offset + N * C),
        shift(gain + N * C),
        guard(shift + N * C) {}

  int numbers() {
    double* mean = p.kept;
    double* var = p.kept + C;
    if (p.mean_before) {
      read_numbers(p.mean ? p.mean : p.mean_before, p.wdtype, C, mean);
      read_numbers(p.var ? p.var : p.var_before, p.wdtype, C, var);
    }
    if (p.mean) {
      write_numbers(p.mean_before, p.wdtype, C, mean);
      write_numbers(p.var_before, p.wdtype, C, var);
    }
    if (!prepare()) return NO_MEMORY;
    double* moved = state.data;
    std::memcpy(moved, p.kept, static_cast<size_t>(2 * C) * sizeof(double));
    over_strips([&](int64_t c, int64_t end) {
      const double rate = 1 - p.alpha_fwd, gained = p.alpha_fwd * rate;
      for (int64_t t = 0; t < N; ++t)
        for (int64_t j = c; j < end; ++j) {
          const int64_t at = t * C + j;
          const double lag = p.m[at] - moved[j];
          inverse[at] = 1 / std::sqrt(moved[C + j] + p.eps);
          offset[at] = lag * inverse[at];
          moved[j] = p.alpha_fwd * moved[j] + rate * p.m[at];
          moved[C + j] = p.alpha_fwd * moved[C + j] + (rate * p.s[at] + gained * lag * lag);
        }
    });
    over_groups([&](int64_t at, int64_t c, int64_t n) {
      double squares = 0;
      for (int64_t j = 0; j < n; ++j) {
        gain[at + j] = inverse[at + j] * weight[c + j];
        shift[at + j] = offset[at + j] * weight[c + j] + bias[c + j];
        squares += gain[at + j] * gain[at + j] * p.s[at + j] + shift[at + j] * shift[at + j];
      }
      const double scale = p.group ? 1 / std::sqrt(squares / static_cast<double>(n) + p.guard_eps) : 1;
      for (int64_t j = 0; j < n; ++j) gain[at + j] *= scale, shift[at + j] *= scale, guard[at + j] = scale;
    });
    write_numbers(p.mean, p.wdtype, C, moved);
    write_numbers(p.var, p.wdtype, C, moved + C);
    return OK;
  }

  int control() {
    Buffer<double> terms;  // [2][N][C]: the means over positions of the unguarded gradient, and of it times y
    if (!prepare() || !terms.allocate(2 * N * C)) return NO_MEMORY;
    const double positions = static_cast<double>(p.positions);
    double* mean_g = terms.data;
    double* mean_gy = mean_g + N * C;
    over_groups([&](int64_t at, int64_t, int64_t n) {
      double along = 0;
      for (int64_t j = at; j < at + n; ++j) {
        const double g = p.total_g[j] / positions, gd = p.total_gd[j] / positions;
        mean_g[j] = g;
        mean_gy[j] = inverse[j] * gd + offset[j] * g;
        along += gain[j] * gd + shift[j] * g;
      }
      if (!p.group) return;
      along /= static_cast<double>(n);
      for (int64_t j = at; j < at + n; ++j) {
        mean_g[j] = (mean_g[j] - along * shift[j]) * guard[j];
        mean_gy[j] = (mean_gy[j] - along * (gain[j] * inverse[j] * p.s[j] + shift[j] * offset[j])) * guard[j];
        guard[j] = along;
      }
    });
    double* v = state.data;
    double* u = v + C;
    double* dweight = u + C;
    double* dbias = dweight + C;
    read_numbers(p.v, p.wdtype, C, v);
    read_numbers(p.u, p.wdtype, C, u);
    over_strips([&](int64_t c, int64_t end) {
      const double rate = 1 - p.alpha_bkw;
      for (int64_t j = c; j < end; ++j) dweight[j] = dbias[j] = 0;
      for (int64_t t = 0; t < N; ++t)
        for (int64_t j = c; j < end; ++j) {
          const int64_t at = t * C + j;
          const double r = inverse[at], o = offset[at], along = p.group ? guard[at] * gain[at] : 0;
          dweight[j] += positions * mean_gy[at];
          dbias[j] += positions * mean_g[at];
          inverse[at] = -(rate * v[j] * r * r + along * gain[at]);
          const double back = (mean_g[at] * weight[j] - rate * v[j] * o) * r;
          const double constant = rate * (v[j] * o * r + u[j]) + along * shift[at];
          v[j] = (1 - rate * (r * r * p.s[at] + o * o)) * v[j] + mean_gy[at] * weight[j];
          u[j] = p.alpha_bkw * u[j] + back;
          shift[at] = -constant;
        }
    });
    write_numbers(p.v, p.wdtype, C, v);
    write_numbers(p.u, p.wdtype, C, u);
    write_numbers(p.dweight, p.wdtype, C, dweight);
    write_numbers(p.dbias, p.wdtype, C, dbias);
    return OK;
  }

 private:
  static constexpr int64_t WORK = 8;  // a number takes as long as so many values

  const OnlineNumbers& p;
  int64_t N, C;
  double *inverse, *offset, *gain, *shift, *guard;
  Buffer<double> state;   // what moves, in both passes
  Buffer<double> affine;  // weight, bias
  const double *weight = nullptr, *bias = nullptr;

  bool prepare() {
    if (!state.allocate(4 * C) || !affine.allocate(2 * C)) return false;
    read_numbers(p.weight, p.wdtype, C, affine.data, 1.0);
    read_numbers(p.bias, p.wdtype, C, affine.data + C);
    weight = affine.data, bias = affine.data + C;
    return true;
  }
  // f(first channel, end)
  template <class F>
  void over_strips(const F& f) const {
    spread(WORK * N * C, ceil_div(C, STRIP), [&](int64_t strip) { f(strip * STRIP, min_of(C, (strip + 1) * STRIP)); });
  }
  // f(index of the first number, its channel, how many) for each sample and group of channels
  template <class F>
  void over_groups(const F& f) const {
    const int64_t size = p.group ? p.group : C, rows = max_of(1, TASK / WORK / C);
    spread(WORK * N * C, ceil_div(N, rows), [&](int64_t task) {
      for (int64_t t = task * rows; t < min_of(N, (task + 1) * rows); ++t)
        for (int64_t c = 0; c < C; c += size) f(t * C + c, c, size);
    });
  }
};

// ---- entry ----------------------------------------------------------------------------------------------------

// f(T*) for the type of a dtype.
template <class F>
int with_type(int dtype, const F& f) {
  switch (dtype) {
    case F32:
      return f(static_cast<float*>(nullptr));
    case BF16:
      return f(static_cast<bf16*>(nullptr));
#ifndef EVENLY_FEW_TYPES  // the tests build two under sanitizers
    case F64:
      return f(static_cast<double*>(nullptr));
    case F16:
      return f(static_cast<f16*>(nullptr));
#endif
    default:
      return UNSUPPORTED;
  }
}

int sums(const Block& b, const void* x, const void* g, const double* m, double* first, double* second) {
  return with_type(b.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return sums_of<T>(b, x, g, m, first, second);
  });
}

int products(int dtype, int64_t rows, int64_t n, const void* g, const void* x, double* out, int64_t apart) {
  return with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t group = max_of(1, TASK / n);
    spread(rows * n, ceil_div(rows, group), [&](int64_t task) {
      for (int64_t r = task * group; r < min_of(rows, (task + 1) * group); ++r)
        products_of_run<T>(static_cast<const T*>(g) + r * n, static_cast<const T*>(x) + r * n, n, out + r, apart);
    });
    return static_cast<int>(OK);
  });
}

int advance(int dtype, int64_t rows, int64_t n, const void* g, double gain, const double* slope, void* x) {
  return with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = typename Tr<T>::A;
    const int64_t group = max_of(1, TASK / n);
    spread(rows * n, ceil_div(rows, group), [&](int64_t task) {
      for (int64_t r = task * group; r < min_of(rows, (task + 1) * group); ++r) {
        const T* u = static_cast<const T*>(g) + r * n;
        T* v = static_cast<T*>(x) + r * n;
        const auto a = splat(static_cast<A>(gain)), b = splat(static_cast<A>(slope[r]));
        vectors<T>(n, [&](int64_t j, int left) EVENLY_EACH {
          const auto old = take(v + j, left);
          put(v + j, old + (take(u + j, left) * a + old * b), left);
        });
      }
    });
    return static_cast<int>(OK);
  });
}

int combine(const Block& b, const void* x, const void* g, const double* gain, const double* m, const double* slope,
            const double* shift, void* y) {
  return with_type(b.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* xs = static_cast<const T*>(x);
    const T* gs = static_cast<const T*>(g);
    T* to = static_cast<T*>(y);
    return g ? map_of<T, COMBINED>(b, xs, gs, gain, m, slope, shift, 0, to)
             : map_of<T, SCALED>(b, xs, gs, gain, m, slope, shift, 0, to);
  });
}

int clip(const Block& b, const void* x, const void* g, const double* m, const double* slope, const double* shift,
         double limit, void* out) {
  return with_type(b.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* xs = static_cast<const T*>(x);
    const T* gs = static_cast<const T*>(g);
    T* to = static_cast<T*>(out);
    return g ? map_of<T, INSIDE>(b, xs, gs, nullptr, m, slope, shift, limit, to)
             : map_of<T, CLAMPED>(b, xs, gs, nullptr, m, slope, shift, limit, to);
  });
}

int scan(int dtype, int64_t steps, int64_t width, const void* a, double constant, const void* v, const void* start,
         void* before, void* last) {
  auto run = [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    return scan_of<S>(steps, width, static_cast<const S*>(a), constant, static_cast<const S*>(v),
                      static_cast<const S*>(start), static_cast<S*>(before), static_cast<S*>(last));
  };
  if (dtype == F64) return run(static_cast<double*>(nullptr));
  return dtype == F32 ? run(static_cast<float*>(nullptr)) : static_cast<int>(UNSUPPORTED);
}

int power_forward(const Power& p) {
  return with_type(p.dtype, [&](auto* type) { return PowerPass<std::remove_pointer_t<decltype(type)>>(p).forward(); });
}
int power_backward(const Power& p) {
  return with_type(p.dtype, [&](auto* type) { return PowerPass<std::remove_pointer_t<decltype(type)>>(p).backward(); });
}
int online_forward(const Online& p) {
  return with_type(p.dtype, [&](auto* type) { return OnlinePass<std::remove_pointer_t<decltype(type)>>(p).forward(); });
}
int online_backward(const Online& p) {
  return with_type(p.dtype, [&](auto* type) { return OnlinePass<std::remove_pointer_t<decltype(type)>>(p).backward(); });
}
int online_numbers(const OnlineNumbers& p) { return OnlineFew(p).numbers(); }
int online_control(const OnlineNumbers& p) { return OnlineFew(p).control(); }

}  // namespace
}  // namespace EVENLY_ISA

extern const Pieces EVENLY_TABLE;
const Pieces EVENLY_TABLE = {
    EVENLY_ISA::sums,          EVENLY_ISA::products,        EVENLY_ISA::advance,        EVENLY_ISA::combine,
    EVENLY_ISA::clip,          EVENLY_ISA::scan,            EVENLY_ISA::power_forward,  EVENLY_ISA::power_backward,
    EVENLY_ISA::online_forward, EVENLY_ISA::online_backward, EVENLY_ISA::online_numbers, EVENLY_ISA::online_control};

}  // namespace evenly
