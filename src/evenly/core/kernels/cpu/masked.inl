// Masks, and the scales that take a pass of their own: the sum of absolute values, the largest of them, and the
// Euclidean norm in double, whose squares can overflow.
//
// A mask has one byte an element; where neighbours share one it is not expanded in memory but piece by piece, in the
// first cache. What a masked value contributes is taken out of the vectors, never skipped by a branch; what is written
// for it is zero. A piece that is masked as a whole is not read.
//
// The statistics have two rows more: how many values count, and what the gradient of the norm needs.
//   l1:  1, or 0 where the norm is at its floor;
//   max: the largest absolute value, NaN where it is at its floor.

constexpr int64_t STRIP = 1024;  // values of a piece of a run

struct Ones {
  uint8_t at[STRIP];
  constexpr Ones() : at() {
    for (auto& flag : at) flag = 1;
  }
};
constexpr Ones ones;

// Which of n values count.
struct Flags {
  const uint8_t* at;
  bool none, all;
};

__attribute__((noinline)) Flags flags_of(const Problem& p, int64_t from, int64_t n, uint8_t* buffer) {
  auto constant = [&](int value) -> Flags {
    if (!value) return {buffer, true, false};  // not read
    if (n <= STRIP) return {ones.at, false, true};
    std::memset(buffer, 1, static_cast<size_t>(n));
    return {buffer, false, true};
  };
  if (!p.mask) return constant(1);
  if (p.mdiv == 1) {
    const int64_t at = from % p.msize;
    if (at + n <= p.msize) return {p.mask + from / p.mouter * p.msize + at, false, false};
  } else if (from / p.mdiv == (from + n - 1) / p.mdiv) {
    return constant(p.mask[from / p.mouter * p.msize + from / p.mdiv % p.msize] != 0);
  }
  bool none = true, all = true;
  for (int64_t done = 0; done < n;) {
    const int64_t o = from + done;
    const uint8_t* flag = p.mask + o / p.mouter * p.msize + o / p.mdiv % p.msize;
    int64_t many;
    if (p.mdiv == 1) {
      many = min_of(n - done, p.msize - o % p.msize);
      std::memcpy(buffer + done, flag, static_cast<size_t>(many));
      none = all = false;
    } else {
      many = min_of(n - done, p.mdiv - o % p.mdiv);
      std::memset(buffer + done, *flag != 0, static_cast<size_t>(many));
      none &= *flag == 0;
      all &= *flag != 0;
    }
    done += many;
  }
  return {buffer, none, all};
}

// All ones in the lanes of the n <= W values that count.
template <class A>
EVENLY_INLINE typename Tr<A>::M lanes_of(const uint8_t* flags, int n) {
  using M = typename Tr<A>::M;
  constexpr int W = Tr<A>::W;
  uint8_t part[16] = {};
  if (n != W) {
    for (int i = 0; i < n; ++i) part[i] = flags[i];
    flags = part;
  }
  M m;
#if defined(__AVX512F__)
  if constexpr (W == 16)
    m = as<M>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(flags))));
  else
    m = as<M>(_mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(flags))));
#elif defined(__AVX2__)
  if constexpr (W == 8) {
    m = as<M>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(flags))));
  } else {
    int four;
    std::memcpy(&four, flags, 4);
    m = as<M>(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four)));
  }
#else
  for (int i = 0; i < W; ++i) m[i] = flags[i];
#endif
  return as<M>(m != M{});
}

template <class V>
EVENLY_INLINE V absolute(V v) {
  return choose(v < V{}, -v, v);
}
template <class V>
EVENLY_INLINE V sign_of(V v) {
  return keep(v > V{}, V{} + 1) - keep(v < V{}, V{} + 1);
}

// Zero what does not count.
template <class U>
inline void hide_bytes(U* __restrict to, const uint8_t* __restrict flags, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = flags[i] ? to[i] : U(0);
}
template <class T>
inline void hide(T* to, const uint8_t* flags, int64_t n) {
  typedef uint16_t __attribute__((may_alias)) u2;
  typedef uint32_t __attribute__((may_alias)) u4;
  typedef uint64_t __attribute__((may_alias)) u8;
  if constexpr (sizeof(T) == 2) hide_bytes(reinterpret_cast<u2*>(to), flags, n);
  if constexpr (sizeof(T) == 4) hide_bytes(reinterpret_cast<u4*>(to), flags, n);
  if constexpr (sizeof(T) == 8) hide_bytes(reinterpret_cast<u8*>(to), flags, n);
}

// Merge the moments of those of n values that count.
template <class T>
void masked_moments(const T* x, const uint8_t* flags, int64_t n, bool raw, Moments& out) {
  using A = typename Tr<T>::A;
  using V = typename Tr<T>::V;
  constexpr int W = Tr<T>::W;
  V c0{}, c1{}, s0{}, s1{}, q0{}, q1{};
  auto over = [&](auto&& f) __attribute__((always_inline)) {
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
      f(i, W, c0, s0, q0);
      f(i + W, W, c1, s1, q1);
    }
    for (; i + W <= n; i += W) f(i, W, c0, s0, q0);
    if (i < n) f(i, static_cast<int>(n - i), c1, s1, q1);
  };
  over([&](int64_t i, int left, V& c, V& s, V&) __attribute__((always_inline)) {
    const auto m = lanes_of<A>(flags + i, left);
    c += keep(m, V{} + 1);
    s += keep(m, take(x + i, left));
  });
  const double count = sum_lanes(c0 + c1);
  if (count == 0) return;
  const A pivot = raw ? A(0) : static_cast<A>(sum_lanes(s0 + s1) / count);
  const V middle = splat(pivot);
  s0 = s1 = V{};
  over([&](int64_t i, int left, V&, V& s, V& q) __attribute__((always_inline)) {
    const V d = keep(lanes_of<A>(flags + i, left), take(x + i, left) - middle);
    s += d;
    q += d * d;
  });
  const double s = sum_lanes(s0 + s1), ss = sum_lanes(q0 + q1);
  if constexpr (sizeof(T) == 4)  // an outlier, see moments_block
    if (count >= 256 && pack_lanes(q0 + q1 > splat(static_cast<A>(0.5 * ss))))
      return moments_slow(x, 1, 0, n, raw, flags, out);
  if (sizeof(A) == 4 ? out_of_range(ss) : !std::isfinite(ss)) {
    const bool constant = ss == 0 && s == 0 && std::fabs(static_cast<double>(pivot)) > 1e-10;
    if (!constant) return moments_slow(x, 1, 0, n, raw, flags, out);
  }
  const double moved = raw ? 0 : s / count, m2 = ss - s * moved;
  out.merge(count, static_cast<double>(pivot) + moved, m2 > 0 ? m2 : 0);
}

// What the second pass backward adds to the gradient for a norm that is not Euclidean: slope * sign(d), everywhere (l1)
// or where |d| is the largest (max); d = (x - m) - low.
template <class T>
struct Norm {
  using A = typename Tr<T>::A;
  using V = typename Tr<T>::V;
  int scale = SCALE_NONE;
  A low = 0, top = 0, slope = 0;
  const A* lows = nullptr;  // by column
  const A* tops = nullptr;
  const A* slopes = nullptr;

  EVENLY_INLINE V direction(V d, V low_, V top_) const {
    d -= low_;
    if (scale == SCALE_MAX) return keep(absolute(d) == top_, sign_of(d));
    return sign_of(d) * top_;
  }
  template <int MODE>
  EVENLY_INLINE V at(V d, int64_t i, int left) const {
    if constexpr (MODE == COLUMN) return direction(d, take(lows + i, left), take(tops + i, left));
    return direction(d, splat(low), splat(top));
  }
};

// The gradient before the activation.
template <class T, int KIND, int MODE>
void park_run(const Run<T>& run, int64_t n, const Coefficients<T>& k, typename Tr<T>::A* park) {
  constexpr int W = Tr<T>::W;
  auto step = [&](int64_t i, int left) __attribute__((always_inline)) {
    put(park + i, gradient<T, KIND, MODE>(run, nullptr, take(run.x + i, left), k, i, left), left);
  };
  int64_t i = 0;
  for (; i + W <= n; i += W) step(i, W);
  if (i < n) step(i, static_cast<int>(n - i));
}

template <class T>
using ParkFn = void (*)(const Run<T>&, int64_t, const Coefficients<T>&, typename Tr<T>::A*);
template <class T, int MODE>
ParkFn<T> pick_park(int kind) {
  static constexpr ParkFn<T> table[] = {
      park_run<T, PLAIN, MODE>, park_run<T, SIGN_BITS, MODE>, park_run<T, RELU, MODE>,     park_run<T, RELU_RES, MODE>,
      park_run<T, SILU, MODE>,  park_run<T, GELU, MODE>,      park_run<T, SILU_RES, MODE>, park_run<T, GELU_RES, MODE>};
  return table[kind];
}

// Sums over what counts of a piece of a run: g, g*d, and of the direction of the norm and its size.
template <class T>
struct Tally {
  double g = 0, gd = 0, e = 0, ties = 0;
  typename Tr<T>::A* dw = nullptr;  // VECTOR: add the gradients of weight and bias here
  typename Tr<T>::A* db = nullptr;
};

template <class T, int MODE>
void masked_reduce(const Run<T>& run, const uint8_t* flags, int64_t n, const Coefficients<T>& k,
                   const typename Tr<T>::A* park, const Norm<T>& norm, Tally<T>& out) {
  using A = typename Tr<T>::A;
  using V = typename Tr<T>::V;
  constexpr int W = Tr<T>::W;
  V s{}, q{}, e{}, ties{};
  auto step = [&](int64_t i, int left) __attribute__((always_inline)) {
    const auto m = lanes_of<A>(flags + i, left);
    V g = keep(m, park ? take(park + i, left) : take(run.dy + i, left));
    const V d = take(run.x + i, left) - k.m;
    if constexpr (MODE == VECTOR) {
      const V v = d * k.a + k.b;
      put(out.dw + i, take(out.dw + i, left) + keep(m, g * v), left);
      put(out.db + i, take(out.db + i, left) + g, left);
      g *= take(k.wv + i, left);
    }
    s += g;
    q += keep(m, g * d);
    if (norm.scale != SCALE_NONE) {
      const V one = keep(m, norm.template at<MODE>(d, i, left));
      e += one;
      ties += absolute(one);
    }
  };
  int64_t i = 0;
  for (; i + W <= n; i += W) step(i, W);
  if (i < n) step(i, static_cast<int>(n - i));
  out.g += sum_lanes(s);
  out.gd += sum_lanes(q);
  out.e += sum_lanes(e);
  out.ties += sum_lanes(ties);
}

template <class T, int MODE>
void masked_back(const Run<T>& run, const uint8_t* flags, int64_t n, const Coefficients<T>& k,
                 const BackCoefficients<T>& e, const typename Tr<T>::A* park, const Norm<T>& norm) {
  using A = typename Tr<T>::A;
  using V = typename Tr<T>::V;
  constexpr int W = Tr<T>::W;
  auto step = [&](int64_t i, int left) __attribute__((always_inline)) {
    const auto m = lanes_of<A>(flags + i, left);
    const V g = park ? take(park + i, left) : take(run.dy + i, left);
    if (run.dresidual) put(run.dresidual + i, keep(m, g), left);
    if (!run.dx) return;
    const V x = take(run.x + i, left);
    V d, dx;
    if constexpr (MODE == COLUMN) {
      d = x - take(k.mv + i, left);
      dx = g * take(e.rwv + i, left) + ((d * take(e.rv + i, left)) * take(e.bv + i, left) + take(e.cv + i, left));
    } else {
      d = x - k.m;
      if constexpr (MODE == SCALAR) dx = g * e.rw + ((d * e.r) * e.b + e.c);
      if constexpr (MODE == VECTOR) dx = g * (e.r * take(k.wv + i, left)) + ((d * e.r) * e.b + e.c);
    }
    if (norm.scale != SCALE_NONE) {
      if constexpr (MODE == COLUMN)
        dx += norm.template at<MODE>(d, i, left) * take(norm.slopes + i, left);
      else
        dx += norm.template at<MODE>(d, i, left) * norm.slope;
    }
    put(run.dx + i, keep(m, dx), left);
  };
  int64_t i = 0;
  for (; i + W <= n; i += W) step(i, W);
  if (i < n) step(i, static_cast<int>(n - i));
}

// Whether these loops compute a problem.
inline bool is_masked(const Problem& p) {
  return p.mask || p.scale == SCALE_L1 || p.scale == SCALE_MAX || (p.scale == SCALE_L2 && p.dtype == F64);
}

// What both families share: statistics from moments and norms, and the order of the work.
template <class T>
class MaskedBase {
 protected:
  using A = typename Tr<T>::A;
  using V = typename Tr<T>::V;
  static constexpr int W = Tr<T>::W;

  MaskedBase(const Problem& problem, const Geometry& geometry) : p(problem), g(geometry) {
    K = p.K0 * p.K1;
    raw = is_raw(p);
    own_norm = !p.given && (p.scale == SCALE_L1 || p.scale == SCALE_MAX);
    s = static_cast<A*>(p.stats);
  }

  const Problem& p;
  const Geometry& g;
  int64_t K;
  bool raw, own_norm;
  A* s;
  int kind = PLAIN;
  Parameters<A> weight, bias;

  // Stages of work on groups of values. Of each stage the parts of a group come first, in any order, then what joins
  // them: part(stage, group, part, sums of the parts, room of the group), join(stage, group, sums, room). A group at a
  // time where there are enough of them, else all parts of a stage at once; the results are the same.
  template <class Part, class Join>
  int work(int stages, int64_t groups, int64_t values, int64_t parts, int64_t sums, int64_t room, const Part& part,
           const Join& join) const {
    const int64_t threads = groups * values < PARALLEL ? 1 : thread_count();
    std::atomic<int> status{OK};
    if (threads == 1 || groups >= 4 * threads || parts == 1) {
      const int64_t many =
          groups * values < PARALLEL ? groups : max_of(1, min_of(TASK / max_of(values, 1), ceil_div(groups, 4 * threads)));
      parallel(ceil_div(groups, many), [&](int64_t task) {
        Buffer<double> sum;
        Buffer<A> own;
        if (!sum.allocate(parts * sums) || !own.allocate(room)) {
          status.store(NO_MEMORY);
          return;
        }
        for (int64_t k = task * many; k < min_of(groups, (task + 1) * many); ++k)
          for (int stage = 0; stage < stages; ++stage) {
            for (int64_t i = 0; i < parts; ++i) part(stage, k, i, sum.data + i * sums, own.data);
            join(stage, k, sum.data, own.data);
          }
      });
      return status.load();
    }
    Buffer<double> sum;
    Buffer<A> own;
    if (!sum.allocate(groups * parts * sums) || !own.allocate(groups * room)) return NO_MEMORY;
    for (int stage = 0; stage < stages; ++stage) {
      parallel(groups * parts, [&](int64_t task) {
        const int64_t k = task / parts;
        part(stage, k, task % parts, sum.data + task * sums, own.data + k * room);
      });
      for (int64_t k = 0; k < groups; ++k) join(stage, k, sum.data + k * parts * sums, own.data + k * room);
    }
    return OK;
  }

  bool double_norm_failed(double m2) const {
    return sizeof(T) == 8 && p.scale == SCALE_L2 && !(m2 > 1e-280 && m2 < 1e300);
  }

  void settle_moments(int64_t k, const Moments& mo) const {
    finish<A>(p, k, mo, raw);
    s[3 * K + k] = static_cast<A>(mo.n);
    s[4 * K + k] = 0;
    if (mo.n == 0) s[K + k] = 0;  // nothing counts, nothing is divided
  }
  void settle_norm(int64_t k, double norm) const {
    if (raw) s[k] = s[2 * K + k] = s[3 * K + k] = 0;
    const bool floor = norm < p.eps;
    s[K + k] = static_cast<A>(1 / (floor ? p.eps : norm));
    s[4 * K + k] = p.scale == SCALE_L1 ? A(floor ? 0 : 1) : static_cast<A>(floor ? NAN : norm);
  }

  // Of one piece or one column: the sum of absolute values, or the largest.
  double norm_slow(const T* x, const uint8_t* flags, int64_t n, int64_t stride, double m, double low) const {
    double norm = 0;
    for (int64_t i = 0; i < n; ++i)
      if (flags[i * stride]) {
        const double d = std::fabs((to_double(x[i * stride]) - m) - low);
        if (p.scale == SCALE_L1)
          norm += d;
        else
          norm = d > norm || d != d ? d : norm;
        if (norm != norm) return norm;
      }
    return norm;
  }

  double more_norm(double norm, double one) const {
    if (p.scale == SCALE_L1) return norm + one;
    return one > norm || one != one ? one : norm;
  }

  // The slope of the norm: how much of its direction is added to each gradient; `sum` and `sum_d` as for back_of.
  double slope_of(int64_t k, double sum, double sum_d, double ties) const {
    if (!own_norm || ties == 0) return 0;
    const Stat st = stat_of<A>(p, k);
    const double sum_v = st.r * sum_d + (st.c + st.shift) * sum;
    return -st.r * sum_v / (p.scale == SCALE_MAX ? ties : 1);
  }
  double weight_at(int64_t i) const { return weight.at ? static_cast<double>(weight.at[i]) : 1.0; }
  double bias_at(int64_t i) const { return bias.at ? static_cast<double>(bias.at[i]) : 0.0; }

  Run<T> pointers(int64_t at) const {
    Run<T> r{};
    r.x = static_cast<const T*>(p.x) + at;
    if (p.residual) r.residual = static_cast<const T*>(p.residual) + at;
    if (p.y) r.y = static_cast<T*>(p.y) + at;
    if (p.dy) r.dy = static_cast<const T*>(p.dy) + at;
    if (p.dx) r.dx = static_cast<T*>(p.dx) + at;
    if (p.dresidual) r.dresidual = static_cast<T*>(p.dresidual) + at;
    return r;
  }
  static void clear(T* to, int64_t n) {
    if (to) std::memset(static_cast<void*>(to), 0, sizeof(T) * static_cast<size_t>(n));
  }
};

// ---- statistics over runs -----------------------------------------------------------------------------------------

template <class T>
class MaskedRuns : MaskedBase<T> {
  using Base = MaskedBase<T>;
  using typename Base::A;
  using typename Base::V;
  using Base::bias, Base::g, Base::K, Base::kind, Base::own_norm, Base::p, Base::raw, Base::s, Base::weight, Base::W;

 public:
  MaskedRuns(const Problem& problem, const Geometry& geometry) : Base(problem, geometry) {
    n = p.R0 * p.R1;
    unit = min_of(g.seg, STRIP);
    units_seg = ceil_div(g.seg, unit);
    units = g.nseg * units_seg;
    in_stat = p.R0 * units;
    per_part = max_of(1, TASK / unit);
    parts = ceil_div(in_stat, per_part);
  }

  int forward() {
    if (!parameters()) return NO_MEMORY;
    const ApplyFn<T> apply_fn = g.mode == SCALAR ? pick_apply<T, SCALAR>(p.act, p.residual, p.relu_bits)
                                                 : pick_apply<T, VECTOR>(p.act, p.residual, p.relu_bits);
    int plan[3], stages = 0;
    if (!p.given && !(own_norm && raw)) plan[stages++] = 0;
    if (own_norm) plan[stages++] = 1;
    if (p.y) plan[stages++] = 2;
    auto part = [&](int stage, int64_t k, int64_t i, double* sums, A*) {
      uint8_t buffer[STRIP];
      Moments mo;
      double norm = 0;
      each(k, i, [&](int64_t run, int64_t u, int64_t at, int64_t len) {
        const Flags f = flags_of(p, at, len, buffer);
        const T* x = static_cast<const T*>(p.x) + at;
        if (plan[stage] == 0) {
          if (f.all && len >= 64)
            moments_block(x, 1, 0, len, raw, 0, mo);
          else if (!f.none)
            masked_moments(x, f.at, len, raw, mo);
        } else if (plan[stage] == 1) {
          if (!f.none) norm = this->more_norm(norm, norm_of(k, x, f.at, len));
        } else if (f.none) {
          this->clear(static_cast<T*>(p.y) + at, len);
        } else {
          apply_fn(run_at(at, run, u), len, coefficients(k, run, u), {});
          if (!f.all) hide(static_cast<T*>(p.y) + at, f.at, len);
        }
      });
      if (plan[stage] == 0) sums[0] = mo.n, sums[1] = mo.mean, sums[2] = mo.m2;
      if (plan[stage] == 1) sums[0] = norm;
    };
    auto join = [&](int stage, int64_t k, const double* sums, A*) {
      if (plan[stage] == 0) {
        Moments mo;
        for (int64_t i = 0; i < parts; ++i)
          if (sums[3 * i] > 0) mo.merge(sums[3 * i], sums[3 * i + 1], sums[3 * i + 2]);
        this->settle_moments(k, mo);
        if (mo.n > 0 && this->double_norm_failed(mo.m2)) scaled_norm(k);
      } else if (plan[stage] == 1) {
        double norm = 0;
        for (int64_t i = 0; i < parts; ++i) norm = this->more_norm(norm, sums[3 * i]);
        this->settle_norm(k, norm);
      }
    };
    return this->work(stages, K, n, parts, 3, 0, part, join);
  }

  int backward() {
    if (!parameters()) return NO_MEMORY;
    kind = kind_of(p);
    park_fn = g.mode == SCALAR ? pick_park<T, SCALAR>(kind) : pick_park<T, VECTOR>(kind);
    if (g.mode == VECTOR) return backward_vector();
    const bool wants_parameters = p.wsize > 0 && (p.dweight || p.dbias);
    const bool sums_needed = wants_parameters || !p.given, writes = p.dx || p.dresidual;
    Buffer<double> kept;  // g and g*d of each unit
    if (wants_parameters && !kept.allocate(2 * K * in_stat)) return NO_MEMORY;
    auto part = [&](int stage, int64_t k, int64_t i, double* sums, A* room) {
      if (stage == 0) sums[0] = sums[1] = sums[2] = sums[3] = 0;
      if (stage == 0 ? !sums_needed : !writes) return;
      uint8_t buffer[STRIP];
      A park[STRIP];
      int64_t v = i * per_part;
      each(k, i, [&](int64_t run, int64_t u, int64_t at, int64_t len) {
        const double w = this->weight_at(index_of(run, u));
        if (stage == 0) {
          Tally<T> tally;
          reduce<SCALAR>(k, run, u, at, len, buffer, park, tally);
          if (wants_parameters) kept.data[2 * (k * in_stat + v)] = tally.g, kept.data[2 * (k * in_stat + v) + 1] = tally.gd;
          sums[0] += w * tally.g, sums[1] += w * tally.gd, sums[2] += tally.e, sums[3] += tally.ties;
          ++v;
        } else {
          unapply<SCALAR>(k, run, u, at, len, buffer, park, room, w);
        }
      });
    };
    auto join = [&](int stage, int64_t k, const double* sums, A* room) {
      if (stage == 1) return;
      double total[4] = {0, 0, 0, 0};
      for (int64_t i = 0; i < parts; ++i)
        for (int j = 0; j < 4; ++j) total[j] += sums[4 * i + j];
      back(k, total, room);
    };
    const int status = this->work(2, K, n, parts, 4, 3, part, join);
    if (status != OK || !wants_parameters) return status;
    Buffer<double> sums;
    if (!sums.zeros(2 * p.wsize)) return NO_MEMORY;
    for (int64_t k = 0; k < K; ++k) {
      const Stat st = stat_of<A>(p, k);
      for (int64_t v = 0; v < in_stat; ++v) {
        const double* one = kept.data + 2 * (k * in_stat + v);
        const int64_t i = index_of(run_of(k, v / units), v % units);
        if (one[0] == 0 && one[1] == 0) continue;
        sums.data[i] += st.r * one[1] + (st.c + st.shift) * one[0];
        sums.data[p.wsize + i] += one[0];
      }
    }
    store_parameters(p.dweight, p.wdtype, 0, p.wsize, sums.data);
    store_parameters(p.dbias, p.wdtype, 0, p.wsize, sums.data + p.wsize);
    return OK;
  }

 private:
  int64_t n, unit, units_seg, units, in_stat, per_part, parts;
  ParkFn<T> park_fn = nullptr;

  bool parameters() {
    const int64_t times = g.mode == VECTOR ? p.wdiv : 1;
    if (!weight.set(p.weight, p.wdtype, p.wsize, times) || !bias.set(p.bias, p.wdtype, p.wsize, times)) return false;
    if (g.mode == VECTOR) return weight.fill(1, g.period) && bias.fill(0, g.period);
    return true;
  }
  int64_t run_of(int64_t k, int64_t r0) const { return ((k / p.K1) * p.R0 + r0) * p.K1 + k % p.K1; }
  int64_t begin(int64_t u) const { return (u % units_seg) * unit; }
  int64_t index_of(int64_t run, int64_t u) const {
    if (p.wsize <= 1) return 0;
    if (g.nseg > 1) return (run * g.nseg + u / units_seg) % p.wsize;
    return ((run * p.R1) / p.wdiv) % p.wsize;
  }
  int64_t period_at(int64_t run, int64_t u) const {
    return g.seg == g.period ? begin(u) : (run * p.R1 + begin(u)) % g.period;
  }

  // Each unit of a part of a statistic: f(run, unit of the run, offset, length).
  template <class F>
  void each(int64_t k, int64_t part, const F& f) const {
    for (int64_t v = part * per_part; v < min_of(in_stat, (part + 1) * per_part); ++v) {
      const int64_t run = run_of(k, v / units), u = v % units;
      f(run, u, run * p.R1 + u / units_seg * g.seg + begin(u), min_of(unit, g.seg - begin(u)));
    }
  }

  Run<T> run_at(int64_t at, int64_t run, int64_t u) const {
    Run<T> r = this->pointers(at);
    if (p.bits) r.bits = p.bits + (run * g.nseg + u / units_seg) * g.bits_row + begin(u) / 8;
    return r;
  }

  Coefficients<T> coefficients(int64_t k, int64_t run, int64_t u) const {
    const Stat st = stat_of<A>(p, k);
    Coefficients<T> c{};
    c.m = static_cast<A>(st.m);
    if (g.mode == SCALAR) {
      const int64_t i = index_of(run, u);
      c.a = static_cast<A>(st.r * this->weight_at(i));
      c.b = static_cast<A>((st.c + st.shift) * this->weight_at(i) + this->bias_at(i));
    } else {
      c.a = static_cast<A>(st.r);
      c.b = static_cast<A>(st.c + st.shift);
      c.wv = weight.at + period_at(run, u);
      c.bv = bias.at + period_at(run, u);
    }
    return c;
  }

  double norm_of(int64_t k, const T* x, const uint8_t* flags, int64_t len) const {
    const V m = splat(raw ? A(0) : s[k]), low = splat(raw ? A(0) : s[2 * K + k]);
    V norm{};
    auto step = [&](int64_t i, int left) __attribute__((always_inline)) {
      const V d = absolute(keep(lanes_of<A>(flags + i, left), (take(x + i, left) - m) - low));
      if (p.scale == SCALE_L1)
        norm += d;
      else
        norm = choose((d > norm) | (d != d), d, norm);  // a missing value stays
    };
    int64_t i = 0;
    for (; i + W <= len; i += W) step(i, W);
    if (i < len) step(i, static_cast<int>(len - i));
    double out = 0;
    for (int j = 0; j < W; ++j) {
      out = this->more_norm(out, static_cast<double>(norm[j]));
      if (out != out) break;
    }
    if (std::isfinite(out)) return out;
    return this->norm_slow(x, flags, len, 1, raw ? 0 : s[k], raw ? 0 : s[2 * K + k]);
  }

  // The Euclidean norm of values whose squares overflow or vanish.
  void scaled_norm(int64_t k) const {
    uint8_t buffer[STRIP];
    double largest = 0, sum = 0;
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t i = 0; i < parts; ++i)
        each(k, i, [&](int64_t, int64_t, int64_t at, int64_t len) {
          const Flags f = flags_of(p, at, len, buffer);
          if (f.none) return;
          for (int64_t j = 0; j < len; ++j)
            if (f.at[j]) {
              const double d = (to_double(static_cast<const T*>(p.x)[at + j]) - s[k]) - s[2 * K + k];
              if (pass == 0)
                largest = std::fabs(d) > largest || d != d ? std::fabs(d) : largest;
              else
                sum += (d / largest) * (d / largest);
            }
        });
      if (!(largest > 0) || !std::isfinite(largest)) return;
    }
    const double norm = largest * std::sqrt(sum);
    s[K + k] = static_cast<A>(1 / (norm < p.eps ? p.eps : norm));
  }

  // ---- backward

  Norm<T> norm_at(int64_t k, double slope) const {
    Norm<T> norm;
    if (!own_norm) return norm;
    norm.scale = p.scale;
    norm.low = s[2 * K + k], norm.top = s[4 * K + k], norm.slope = static_cast<A>(slope);
    return norm;
  }

  // b, c and the slope of the norm, from the sums of a statistic.
  void back(int64_t k, const double* total, A* room) const {
    const double count = p.mask ? static_cast<double>(s[3 * K + k]) : static_cast<double>(n);
    Back e = back_of<A>(p, k, count, total[0], total[1]);
    const double slope = this->slope_of(k, total[0], total[1], total[3]);
    if (p.center && own_norm) e.c -= slope * total[2] / count;
    room[0] = static_cast<A>(e.b), room[1] = static_cast<A>(e.c), room[2] = static_cast<A>(slope);
  }

  template <int MODE>
  void reduce(int64_t k, int64_t run, int64_t u, int64_t at, int64_t len, uint8_t* buffer, A* park, Tally<T>& tally) const {
    const Flags f = flags_of(p, at, len, buffer);
    if (f.none) return;
    const Coefficients<T> c = coefficients(k, run, u);
    const Run<T> r = run_at(at, run, u);
    if (kind != PLAIN) park_fn(r, len, c, park);
    masked_reduce<T, MODE>(r, f.at, len, c, kind == PLAIN ? nullptr : park, norm_at(k, 0), tally);
  }

  template <int MODE>
  void unapply(int64_t k, int64_t run, int64_t u, int64_t at, int64_t len, uint8_t* buffer, A* park, const A* room,
               double w) const {
    const Flags f = flags_of(p, at, len, buffer);
    const Run<T> r = run_at(at, run, u);
    if (f.none) {
      this->clear(r.dx, len);
      this->clear(r.dresidual, len);
      return;
    }
    const Coefficients<T> c = coefficients(k, run, u);
    if (kind != PLAIN) park_fn(r, len, c, park);
    BackCoefficients<T> e{};
    e.r = s[K + k];
    e.rw = static_cast<A>(static_cast<double>(s[K + k]) * w);
    e.b = room[0], e.c = room[1];
    masked_back<T, MODE>(r, f.at, len, c, e, kind == PLAIN ? nullptr : park, norm_at(k, room[2]));
  }

  // Weights that vary along the run: their gradients are added up in one buffer for each of a fixed number of ranges.
  int backward_vector() {
    const int64_t total = K * n;
    int64_t ranges = min_of(K, max_of(1, min_of(64, total / PARALLEL)));
    ranges = max_of(1, min_of(ranges, 2 * total / max_of(1, g.period)));
    Buffer<A> partial;
    if (!partial.zeros(2 * ranges * g.period)) return NO_MEMORY;
    parallel(ranges, [&](int64_t range) {
      uint8_t buffer[STRIP];
      A park[STRIP], room[3];
      A* dw = partial.data + 2 * range * g.period;
      A* db = dw + g.period;
      for (int64_t k = range * K / ranges; k < (range + 1) * K / ranges; ++k) {
        Tally<T> tally;
        for (int64_t i = 0; i < parts; ++i)
          each(k, i, [&](int64_t run, int64_t u, int64_t at, int64_t len) {
            tally.dw = dw + period_at(run, u), tally.db = db + period_at(run, u);
            reduce<VECTOR>(k, run, u, at, len, buffer, park, tally);
          });
        if (!p.dx && !p.dresidual) continue;
        const double sums[4] = {tally.g, tally.gd, tally.e, tally.ties};
        back(k, sums, room);
        for (int64_t i = 0; i < parts; ++i)
          each(k, i, [&](int64_t run, int64_t u, int64_t at, int64_t len) {
            unapply<VECTOR>(k, run, u, at, len, buffer, park, room, 1.0);
          });
      }
    });
    Buffer<double> sums;
    if (!sums.zeros(2 * p.wsize)) return NO_MEMORY;
    for (int64_t range = 0; range < ranges; ++range)
      for (int which = 0; which < 2; ++which)
        for (int64_t j = 0; j < g.period; ++j)
          sums.data[which * p.wsize + j / p.wdiv] +=
              static_cast<double>(partial.data[(2 * range + which) * g.period + j]);
    store_parameters(p.dweight, p.wdtype, 0, p.wsize, sums.data);
    store_parameters(p.dbias, p.wdtype, 0, p.wsize, sums.data + p.wsize);
    return OK;
  }
};

// ---- statistics over columns --------------------------------------------------------------------------------------

template <class T>
class MaskedCols : MaskedBase<T> {
  using Base = MaskedBase<T>;
  using typename Base::A;
  using typename Base::V;
  using Base::bias, Base::g, Base::K, Base::kind, Base::own_norm, Base::p, Base::raw, Base::s, Base::weight, Base::W;

 public:
  MaskedCols(const Problem& problem, const Geometry& geometry) : Base(problem, geometry) {
    L = p.K1 * p.R1;
    P = g.width;
    size = p.R0 * L;
    rows = ceil_div(size, P);  // the last may be partial
    block = max_of(16, min_of(256, 32768 / (P * static_cast<int64_t>(sizeof(T)))));
    blocks = ceil_div(rows, block);
    parts = min_of(blocks, max_of(1, min_of(64, size / PARALLEL)));
  }

  int forward() {
    if (!parameters()) return NO_MEMORY;
    const ApplyFn<T> apply_fn = pick_apply<T, COLUMN>(p.act, p.residual, p.relu_bits);
    int plan[3], stages = 0;
    if (!p.given && !(own_norm && raw)) plan[stages++] = 0;
    if (own_norm) plan[stages++] = 1;
    if (p.y) plan[stages++] = 2;
    if (p.given && p.y)  // the coefficients come before the values
      plan[0] = 3, plan[1] = 2, stages = 2;
    std::atomic<int> status{OK};
    auto part = [&](int stage, int64_t k0, int64_t i, double* sums, A* room) {
      if (plan[stage] == 3) return;
      Buffer<uint8_t> flags;
      Buffer<A> scratch;
      if (!flags.allocate(block * P) || !scratch.allocate(4 * P)) {
        status.store(NO_MEMORY);
        return;
      }
      if (plan[stage] == 0) std::memset(sums, 0, sizeof(double) * static_cast<size_t>(3 * P));
      if (plan[stage] == 1) std::memset(sums, 0, sizeof(double) * static_cast<size_t>(P));
      each(k0, i, [&](int64_t row, int64_t at, int64_t many, int64_t width) {
        const Flags f = flags_of(p, at, (many - 1) * P + width, flags.data);
        const T* x = static_cast<const T*>(p.x) + at;
        if (plan[stage] == 0) {
          if (!f.none) measure(x, f.at, many, width, sums, scratch.data);
        } else if (plan[stage] == 1) {
          if (!f.none) norms(x, f.at, many, width, sums, room, scratch.data);
        } else {
          const Coefficients<T> c = coefficients(room);
          for (int64_t r = 0; r < many; ++r) {
            T* y = static_cast<T*>(p.y) + at + r * P;
            if (f.none) {
              this->clear(y, width);
            } else {
              apply_fn(row_at(k0, row + r), width, c, {});
              if (!f.all) hide(y, f.at + r * P, width);
            }
          }
        }
      });
    };
    auto join = [&](int stage, int64_t k0, double* sums, A* room) {
      if (plan[stage] == 0) {
        for (int64_t i = 1; i < parts; ++i)
          for (int64_t j = 0; j < P; ++j) {
            const double* one = sums + 3 * P * i;
            merge(sums, j, one[j], one[P + j], one[2 * P + j]);
          }
        for (int64_t k1 = 0; k1 < p.K1; ++k1) {
          Moments mo;
          over_shared(k1, [&](int64_t j) {
            if (sums[j] > 0) mo.merge(sums[j], sums[P + j], sums[2 * P + j]);
          });
          const int64_t k = k0 * p.K1 + k1;
          this->settle_moments(k, mo);
          if (mo.n > 0 && this->double_norm_failed(mo.m2) && !scaled_norm(k0, k1)) status.store(NO_MEMORY);
        }
        expand(k0, room);
      } else if (plan[stage] == 1) {
        for (int64_t k1 = 0; k1 < p.K1; ++k1) {
          double norm = 0;
          for (int64_t i = 0; i < parts; ++i)
            over_shared(k1, [&](int64_t j) { norm = this->more_norm(norm, sums[3 * P * i + j]); });
          this->settle_norm(k0 * p.K1 + k1, norm);
        }
        expand(k0, room);
      } else if (plan[stage] == 3) {
        expand(k0, room);
      }
    };
    const int done = this->work(stages, p.K0, size, parts, 3 * P, 4 * P, part, join);
    return done != OK ? done : status.load();
  }

  int backward() {
    if (!parameters()) return NO_MEMORY;
    kind = kind_of(p);
    const ParkFn<T> park_fn = pick_park<T, COLUMN>(kind);
    const bool wants_parameters = p.wsize > 0 && (p.dweight || p.dbias);
    const bool sums_needed = wants_parameters || !p.given, writes = p.dx || p.dresidual;
    std::atomic<int> status{OK};
    Buffer<double> kept;
    if (!kept.zeros(2 * P * p.K0)) return NO_MEMORY;
    // the room of a group: 4P of the way forward, then r, r*w, b, c, the slope and the top of the norm
    auto part = [&](int stage, int64_t k0, int64_t i, double* sums, A* room) {
      if (stage == 0) return;
      if (stage == 1) std::memset(sums, 0, sizeof(double) * static_cast<size_t>(4 * P));
      if (stage == 1 ? !sums_needed : !writes) return;
      Buffer<uint8_t> flags;
      Buffer<A> scratch;
      if (!flags.allocate(block * P) || !scratch.allocate(5 * P)) {
        status.store(NO_MEMORY);
        return;
      }
      const Coefficients<T> c = coefficients(room);
      Norm<T> norm;
      if (own_norm) {
        norm.scale = p.scale;
        norm.lows = room + 3 * P, norm.slopes = room + 8 * P, norm.tops = room + 9 * P;
      }
      BackCoefficients<T> e{};
      e.rv = room + 4 * P, e.rwv = room + 5 * P, e.bv = room + 6 * P, e.cv = room + 7 * P;
      A* park = scratch.data + 4 * P;
      each(k0, i, [&](int64_t row, int64_t at, int64_t many, int64_t width) {
        const Flags f = flags_of(p, at, (many - 1) * P + width, flags.data);
        if (stage == 1) {
          if (f.none) return;
          for (int64_t j = 0; j < 4 * P; ++j) scratch.data[j] = 0;
        }
        for (int64_t r = 0; r < many; ++r) {
          const Run<T> run = row_at(k0, row + r);
          if (f.none) {
            this->clear(run.dx, width);
            this->clear(run.dresidual, width);
            continue;
          }
          if (kind != PLAIN) park_fn(run, width, c, park);
          const A* g_at = kind == PLAIN ? nullptr : park;
          if (stage == 1)
            reduce(run, f.at + r * P, width, c, g_at, norm, scratch.data);
          else
            masked_back<T, COLUMN>(run, f.at + r * P, width, c, e, g_at, norm);
        }
        if (stage == 1)
          for (int64_t j = 0; j < 4 * P; ++j) sums[j] += static_cast<double>(scratch.data[j]);
      });
    };
    auto join = [&](int stage, int64_t k0, double* sums, A* room) {
      if (stage == 0) {
        expand(k0, room);
        for (int64_t j = 0; j < P; ++j) room[9 * P + j] = s[4 * K + k0 * p.K1 + (j % L) / p.R1];
      }
      if (stage != 1) return;
      for (int64_t i = 1; i < parts; ++i)
        for (int64_t j = 0; j < 4 * P; ++j) sums[j] += sums[4 * P * i + j];
      std::memcpy(kept.data + 2 * P * k0, sums, sizeof(double) * static_cast<size_t>(2 * P));
      for (int64_t k1 = 0; k1 < p.K1; ++k1) {
        const int64_t k = k0 * p.K1 + k1;
        double total[4] = {0, 0, 0, 0};
        over_shared(k1, [&](int64_t j) {
          const double w = this->weight_at(index_of(j));
          total[0] += w * sums[j], total[1] += w * sums[P + j];
          total[2] += sums[2 * P + j], total[3] += sums[3 * P + j];
        });
        const double count = p.mask ? static_cast<double>(s[3 * K + k]) : static_cast<double>(p.R0 * p.R1);
        Back e = back_of<A>(p, k, count, total[0], total[1]);
        const double slope = this->slope_of(k, total[0], total[1], total[3]);
        if (p.center && own_norm) e.c -= slope * total[2] / count;
        over_shared(k1, [&](int64_t j) {
          room[4 * P + j] = s[K + k];
          room[5 * P + j] = static_cast<A>(static_cast<double>(s[K + k]) * this->weight_at(index_of(j)));
          room[6 * P + j] = static_cast<A>(e.b);
          room[7 * P + j] = static_cast<A>(e.c);
          room[8 * P + j] = static_cast<A>(slope);
        });
      }
    };
    const int done = this->work(3, p.K0, size, parts, 4 * P, 10 * P, part, join);
    if (done != OK || status.load() != OK) return done != OK ? done : status.load();
    if (wants_parameters) {
      Buffer<double> out;
      if (!out.zeros(2 * p.wsize)) return NO_MEMORY;
      for (int64_t k0 = 0; k0 < p.K0; ++k0) {
        const double* sums = kept.data + 2 * P * k0;
        for (int64_t j = 0; j < P; ++j) {
          const Stat st = stat_of<A>(p, k0 * p.K1 + (j % L) / p.R1);
          if (sums[j] == 0 && sums[P + j] == 0) continue;
          out.data[index_of(j)] += st.r * sums[P + j] + (st.c + st.shift) * sums[j];
          out.data[p.wsize + index_of(j)] += sums[j];
        }
      }
      store_parameters(p.dweight, p.wdtype, 0, p.wsize, out.data);
      store_parameters(p.dbias, p.wdtype, 0, p.wsize, out.data + p.wsize);
    }
    return OK;
  }

 private:
  int64_t L, P, size, rows, block, blocks, parts;

  bool parameters() {
    return weight.set(p.weight, p.wdtype, p.wsize, 1) && bias.set(p.bias, p.wdtype, p.wsize, 1);
  }
  int64_t index_of(int64_t j) const { return p.wsize <= 1 ? 0 : (j / p.wdiv) % p.wsize; }

  // Each block of rows of a part: f(first row, offset, rows, width); the partial row is a block of its own.
  template <class F>
  void each(int64_t k0, int64_t part, const F& f) const {
    const int64_t whole = size / P, rest = size % P;
    for (int64_t b = part * blocks / parts; b < (part + 1) * blocks / parts; ++b) {
      const int64_t row = b * block, many = min_of(block, whole - row);
      if (many > 0) f(row, k0 * size + row * P, many, P);
      if (b == blocks - 1 && rest) f(whole, k0 * size + whole * P, int64_t{1}, rest);
    }
  }
  // Each column of a statistic.
  template <class F>
  void over_shared(int64_t k1, const F& f) const {
    for (int64_t q = 0; q < P / L; ++q)
      for (int64_t r = 0; r < p.R1; ++r) f(q * L + k1 * p.R1 + r);
  }
  template <class F>
  EVENLY_INLINE static void over_columns(int64_t width, const F& f) {
    int64_t j = 0;
    for (; j + W <= width; j += W) f(j, W);
    if (j < width) f(j, static_cast<int>(width - j));
  }

  Run<T> row_at(int64_t k0, int64_t r) const {
    Run<T> out = this->pointers(k0 * size + r * P);
    if (p.bits) out.bits = p.bits + (k0 * rows + r) * g.bits_row;
    return out;
  }

  // m, w, b and low by column
  void expand(int64_t k0, A* room) const {
    for (int64_t j = 0; j < P; ++j) {
      const int64_t k = k0 * p.K1 + (j % L) / p.R1, i = index_of(j);
      const Stat st = stat_of<A>(p, k);
      room[j] = static_cast<A>(st.m);
      room[P + j] = static_cast<A>(st.r * this->weight_at(i));
      room[2 * P + j] = static_cast<A>((st.c + st.shift) * this->weight_at(i) + this->bias_at(i));
      room[3 * P + j] = s[2 * K + k];
    }
  }
  Coefficients<T> coefficients(const A* room) const {
    Coefficients<T> c{};
    c.mv = room, c.wv = room + P, c.bv = room + 2 * P;
    return c;
  }

  void merge(double* sums, int64_t j, double count, double mean, double m2) const {
    if (count == 0) return;
    Moments mo;
    mo.n = sums[j], mo.mean = sums[P + j], mo.m2 = sums[2 * P + j];
    mo.merge(count, mean, m2);
    sums[j] = mo.n, sums[P + j] = mo.mean, sums[2 * P + j] = mo.m2;
  }

  // Merge the moments of each column of a block.
  void measure(const T* x, const uint8_t* flags, int64_t many, int64_t width, double* sums, A* work) const {
    A* count = work;
    A* pivot = work + P;
    A* s1 = work + 2 * P;
    A* s2 = work + 3 * P;
    for (int64_t j = 0; j < 4 * P; ++j) work[j] = 0;
    for (int64_t r = 0; r < many; ++r)
      over_columns(width, [&](int64_t j, int left) __attribute__((always_inline)) {
        const auto m = lanes_of<A>(flags + r * P + j, left);
        put(count + j, take(count + j, left) + keep(m, V{} + 1), left);
        put(pivot + j, take(pivot + j, left) + keep(m, take(x + r * P + j, left)), left);
      });
    for (int64_t j = 0; j < width; ++j) pivot[j] = raw || count[j] == 0 ? A(0) : pivot[j] / count[j];
    for (int64_t r = 0; r < many; ++r)
      over_columns(width, [&](int64_t j, int left) __attribute__((always_inline)) {
        const V d = keep(lanes_of<A>(flags + r * P + j, left), take(x + r * P + j, left) - take(pivot + j, left));
        put(s1 + j, take(s1 + j, left) + d, left);
        put(s2 + j, take(s2 + j, left) + d * d, left);
      });
    for (int64_t j = 0; j < width; ++j) {
      if (count[j] == 0) continue;
      const double n = count[j], d1 = s1[j], d2 = s2[j];
      if (sizeof(A) == 4 ? out_of_range(d2) : !std::isfinite(d2)) {
        const bool constant = d2 == 0 && d1 == 0 && std::fabs(static_cast<double>(pivot[j])) > 1e-10;
        if (!constant) {
          Moments mo;
          moments_slow(x + j, many, P, 1, raw, flags + j, mo);
          merge(sums, j, mo.n, mo.mean, mo.m2);
          continue;
        }
      }
      const double moved = raw ? 0 : d1 / n, m2 = d2 - d1 * moved;
      merge(sums, j, n, static_cast<double>(pivot[j]) + moved, m2 > 0 ? m2 : 0);
    }
  }

  void norms(const T* x, const uint8_t* flags, int64_t many, int64_t width, double* sums, const A* room, A* work) const {
    for (int64_t j = 0; j < 2 * P; ++j) work[j] = 0;
    A* zeros = work + P;
    const A* m = raw ? zeros : room;
    const A* low = raw ? zeros : room + 3 * P;
    for (int64_t r = 0; r < many; ++r)
      over_columns(width, [&](int64_t j, int left) __attribute__((always_inline)) {
        const V v = (take(x + r * P + j, left) - take(m + j, left)) - take(low + j, left);
        const V d = absolute(keep(lanes_of<A>(flags + r * P + j, left), v));
        const V before = take(work + j, left);
        if (p.scale == SCALE_L1)
          put(work + j, before + d, left);
        else  // a missing value stays
          put(work + j, choose((d > before) | (d != d), d, before), left);
      });
    for (int64_t j = 0; j < width; ++j) {
      const double one = std::isfinite(work[j])
                             ? static_cast<double>(work[j])
                             : this->norm_slow(x + j, flags + j, many, P, static_cast<double>(m[j]), static_cast<double>(low[j]));
      sums[j] = this->more_norm(sums[j], one);
    }
  }

  bool scaled_norm(int64_t k0, int64_t k1) const {
    Buffer<uint8_t> flags;
    if (!flags.allocate(block * P)) return false;
    const int64_t k = k0 * p.K1 + k1;
    double largest = 0, sum = 0;
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t i = 0; i < parts; ++i)
        each(k0, i, [&](int64_t, int64_t at, int64_t many, int64_t width) {
          const Flags f = flags_of(p, at, (many - 1) * P + width, flags.data);
          if (f.none) return;
          for (int64_t r = 0; r < many; ++r)
            over_shared(k1, [&](int64_t j) {
              if (j >= width || !f.at[r * P + j]) return;
              const double d = (to_double(static_cast<const T*>(p.x)[at + r * P + j]) - s[k]) - s[2 * K + k];
              if (pass == 0)
                largest = std::fabs(d) > largest || d != d ? std::fabs(d) : largest;
              else
                sum += (d / largest) * (d / largest);
            });
        });
      if (!(largest > 0) || !std::isfinite(largest)) return true;
    }
    const double norm = largest * std::sqrt(sum);
    s[K + k] = static_cast<A>(1 / (norm < p.eps ? p.eps : norm));
    return true;
  }

  // Add a row to the sums of g, g*d, the direction of the norm and its size.
  void reduce(const Run<T>& run, const uint8_t* flags, int64_t width, const Coefficients<T>& c, const A* park,
              const Norm<T>& norm, A* out) const {
    over_columns(width, [&](int64_t j, int left) __attribute__((always_inline)) {
      const auto m = lanes_of<A>(flags + j, left);
      const V v = keep(m, park ? take(park + j, left) : take(run.dy + j, left));
      const V d = take(run.x + j, left) - take(c.mv + j, left);
      put(out + j, take(out + j, left) + v, left);
      put(out + P + j, take(out + P + j, left) + keep(m, v * d), left);
      if (norm.scale != SCALE_NONE) {
        const V one = keep(m, norm.template at<COLUMN>(d, j, left));
        put(out + 2 * P + j, take(out + 2 * P + j, left) + one, left);
        put(out + 3 * P + j, take(out + 3 * P + j, left) + absolute(one), left);
      }
    });
  }
};
