// Statistics over short runs: rows are added up column by column, then columns that share a statistic are merged.
// A row of K1*R1 values is widened to several rows in one where it is short; the last row may be partial.

template <class T>
class Cols {
  using X = Tr<T>;
  using A = typename X::A;
  using V = typename X::V;
  static constexpr int W = X::W;
  static constexpr int64_t PIVOT = 16;    // rows that a value near the mean is taken from
  static constexpr int64_t PART = 24576;  // values of a part of the rows, at least

 public:
  Cols(const Problem& problem, const Geometry& geometry) : p(problem), g(geometry) {
    K = p.K0 * p.K1;
    n = p.R0 * p.R1;
    L = p.K1 * p.R1;
    P = g.width;
    size = p.R0 * L;
    rows = size / P;
    rest = size % P;
    block = max_of(64, min_of(256, 32768 / (P * static_cast<int64_t>(sizeof(T)))));
    block = max_of(16, min_of(block, ceil_div(rows, max_of(1, min_of(64, size / PART)))));
    blocks = ceil_div(rows, block);
    parts = min_of(blocks, max_of(1, min_of(64, size / PART)));
    total = p.K0 * size;
    past = is_far(p, total * static_cast<int64_t>(sizeof(T)));
    soon = soon_of<T>(total);
    same_weight = p.wsize <= 1 || p.wdiv % p.R1 == 0;
  }

  int forward() {
    if (!parameters()) return NO_MEMORY;
    raw = is_raw(p);
    const bool measure = !p.given && !p.ready, affects = p.y != nullptr;
    const int64_t threads = few() ? 1 : thread_count();
    std::atomic<int> status{OK};
    if (alone(threads)) {
      const int64_t group = group_of(threads);
      parallel(ceil_div(p.K0, group), [&](int64_t task) {
        const Fence fence{past};
        Buffer<double> column, part;
        Buffer<A> work, c;
        if (!column.allocate(2 * P) || !part.allocate(2 * P) || !work.allocate(3 * P) || !c.allocate(3 * P)) {
          status.store(NO_MEMORY);
          return;
        }
        for (int64_t k0 = task * group; k0 < min_of(p.K0, (task + 1) * group); ++k0) {
          if (measure) {
            double count = 0;
            for (int64_t i = 0; i < parts; ++i)
              merge_columns(column.data, count, part.data, measure_part(k0, i, part.data, work.data));
            settle(k0, column.data, count);
          }
          if (!affects) continue;
          expand(k0, c.data);
          apply(k0, 0, rows + (rest ? 1 : 0), c.data);
        }
      });
      return status.load();
    }
    if (measure) {
      Buffer<double> all;
      if (!all.allocate(2 * P * parts * p.K0)) return NO_MEMORY;
      parallel(p.K0 * parts, [&](int64_t task) {
        Buffer<A> work;
        if (!work.allocate(3 * P)) {
          status.store(NO_MEMORY);
          return;
        }
        measure_part(task / parts, task % parts, all.data + 2 * P * task, work.data);
      });
      if (status.load() != OK) return status.load();
      for (int64_t k0 = 0; k0 < p.K0; ++k0) {
        double* first = all.data + 2 * P * k0 * parts;
        double count = rows_of(0);
        for (int64_t i = 1; i < parts; ++i) merge_columns(first, count, first + 2 * P * i, rows_of(i));
        settle(k0, first, count);
      }
    }
    if (affects) {
      Buffer<A> c;
      if (!c.allocate(3 * P * p.K0)) return NO_MEMORY;
      for (int64_t k0 = 0; k0 < p.K0; ++k0) expand(k0, c.data + 3 * P * k0);
      over_rows([&](int64_t k0, int64_t from, int64_t to) { apply(k0, from, to, c.data + 3 * P * k0); });
    }
    return OK;
  }

  int backward() {
    if (!parameters()) return NO_MEMORY;
    kind = kind_of(p);
    const bool wants_parameters = p.wsize > 0 && (p.dweight || p.dbias);
    const bool sums_needed = wants_parameters || !p.given;
    const int64_t threads = few() ? 1 : thread_count();
    std::atomic<int> status{OK};
    Buffer<double> sums;  // [K0][2][P]
    if (!sums.zeros(2 * P * p.K0)) return NO_MEMORY;
    if (alone(threads)) {
      const int64_t group = group_of(threads);
      parallel(ceil_div(p.K0, group), [&](int64_t task) {
        const Fence fence{past};
        Buffer<double> part;
        Buffer<A> work, c, e;
        if (!part.allocate(2 * P) || !work.allocate(2 * P) || !c.allocate(3 * P) || !e.allocate(4 * P)) {
          status.store(NO_MEMORY);
          return;
        }
        for (int64_t k0 = task * group; k0 < min_of(p.K0, (task + 1) * group); ++k0) {
          expand(k0, c.data);
          double* s = sums.data + 2 * P * k0;
          const bool at_once = p.given && sums_needed;
          if (at_once) expand_back(k0, s, e.data);
          if (sums_needed)
            for (int64_t i = 0; i < parts; ++i) {
              reduce_part(k0, i, c.data, part.data, work.data, at_once ? e.data : nullptr);
              for (int64_t j = 0; j < 2 * P; ++j) s[j] += part.data[j];
            }
          if (at_once || (!p.dx && !p.dresidual)) continue;
          expand_back(k0, s, e.data);
          unapply(k0, 0, rows + (rest ? 1 : 0), c.data, e.data);
        }
      });
      if (status.load() != OK) return status.load();
    } else {
      Buffer<A> c;
      if (!c.allocate(3 * P * p.K0)) return NO_MEMORY;
      for (int64_t k0 = 0; k0 < p.K0; ++k0) expand(k0, c.data + 3 * P * k0);
      Buffer<A> e;
      if (!e.allocate(4 * P * p.K0)) return NO_MEMORY;
      const bool at_once = p.given && sums_needed;
      if (at_once)
        for (int64_t k0 = 0; k0 < p.K0; ++k0) expand_back(k0, sums.data + 2 * P * k0, e.data + 4 * P * k0);
      if (sums_needed) {
        Buffer<double> all;
        if (!all.allocate(2 * P * parts * p.K0)) return NO_MEMORY;
        parallel(p.K0 * parts, [&](int64_t task) {
          const Fence fence{past};
          Buffer<A> work;
          if (!work.allocate(2 * P)) {
            status.store(NO_MEMORY);
            return;
          }
          const int64_t k0 = task / parts;
          reduce_part(k0, task % parts, c.data + 3 * P * k0, all.data + 2 * P * task, work.data,
                      at_once ? e.data + 4 * P * k0 : nullptr);
        });
        if (status.load() != OK) return status.load();
        for (int64_t k0 = 0; k0 < p.K0; ++k0)
          for (int64_t i = 0; i < parts; ++i)
            for (int64_t j = 0; j < 2 * P; ++j) sums.data[2 * P * k0 + j] += all.data[2 * P * (k0 * parts + i) + j];
      }
      if (!at_once && (p.dx || p.dresidual)) {
        for (int64_t k0 = 0; k0 < p.K0; ++k0) expand_back(k0, sums.data + 2 * P * k0, e.data + 4 * P * k0);
        over_rows([&](int64_t k0, int64_t from, int64_t to) {
          unapply(k0, from, to, c.data + 3 * P * k0, e.data + 4 * P * k0);
        });
      }
    }
    if (wants_parameters) {
      Buffer<double> out, scale;
      if (!out.zeros(2 * p.wsize) || !scale.allocate(2 * L)) return NO_MEMORY;
      for (int64_t k0 = 0; k0 < p.K0; ++k0) {
        double* s = sums.data + 2 * P * k0;
        fold(s);
        fold(s + P);
        double* r = scale.data;
        double* c = scale.data + L;
        for (int64_t k1 = 0; k1 < p.K1; ++k1) {
          const Stat st = stat_of<A>(p, k0 * p.K1 + k1);
          for (int64_t j = k1 * p.R1; j < (k1 + 1) * p.R1; ++j) r[j] = st.r, c[j] = st.c + st.shift;
        }
        if (p.wsize == L) {  // a weight for each column
          for (int64_t j = 0; j < L; ++j) {
            out.data[j] += r[j] * s[P + j] + c[j] * s[j];
            out.data[L + j] += s[j];
          }
        } else {
          over_weights([&](int64_t i, int64_t at, int64_t many) __attribute__((always_inline)) {
            double dw = 0, db = 0;
            for (int64_t j = at; j < at + many; ++j) dw += r[j] * s[P + j] + c[j] * s[j], db += s[j];
            out.data[i] += dw, out.data[p.wsize + i] += db;
          });
        }
      }
      store_parameters(p.dweight, p.wdtype, 0, p.wsize, out.data);
      store_parameters(p.dbias, p.wdtype, 0, p.wsize, out.data + p.wsize);
    }
    return OK;
  }

 private:
  const Problem& p;
  const Geometry& g;
  int64_t K, n, L, P, size, rows, rest, block, blocks, parts, total, soon;
  int kind = PLAIN;
  bool raw = false;
  bool past;         // write past the caches
  bool same_weight;  // the columns of a statistic have the same weight
  Parameters<A> weight, bias;

  const A *column_weight = nullptr, *column_bias = nullptr;  // of each of L columns
  Buffer<A> own_weight, own_bias;

  bool parameters() {
    return weight.set(p.weight, p.wdtype, p.wsize, 1) && bias.set(p.bias, p.wdtype, p.wsize, 1) &&
           by_column(weight.at, 1, own_weight, column_weight) && by_column(bias.at, 0, own_bias, column_bias);
  }
  bool by_column(const A* from, A missing, Buffer<A>& own, const A*& to) const {
    if (from && p.wsize == L) {
      to = from;
      return true;
    }
    if (!own.allocate(L + W)) return false;
    if (from)
      over_weights([&](int64_t i, int64_t at, int64_t many) { spread(own.data + at, from + i, 1, many, W); });
    else
      for (int64_t j = 0; j < L; ++j) own.data[j] = missing;
    to = own.data;
    return true;
  }

  // f(i, first, many): weight i is that of as many columns.
  template <class F>
  EVENLY_INLINE void over_weights(const F& f) const {
    if (p.wsize <= 1) return f(0, 0, L);
    for (int64_t i = 0, at = 0; at < L; at += p.wdiv, i = i + 1 == p.wsize ? 0 : i + 1) f(i, at, min_of(p.wdiv, L - at));
  }

  // Each of n numbers `times` times; `room` values behind them may be written over.
  template <class S>
  static EVENLY_INLINE void spread(A* to, const S* from, int64_t n, int64_t times, int64_t room = 0) {
    if (times == 1) {
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<A>(from[i]);
      return;
    }
    const A* stop = to + n * times + room;
    for (int64_t i = 0; i < n; ++i) {
      const V v = splat(static_cast<A>(from[i]));
      A* end = to + times;
      for (; to < end; to += W) put(to, v, static_cast<int>(min_of(W, stop - to)));
      to = end;  // what a vector wrote too much is written over
    }
  }

  int64_t first_block(int64_t part) const { return part * blocks / parts; }
  double rows_of(int64_t part) const {
    return static_cast<double>(min_of(rows, first_block(part + 1) * block) - first_block(part) * block);
  }

  // Too few values for several threads, whose columns one of them prepares.
  bool few() const { return total < PARALLEL + (p.K0 == 1 ? min_of(64 * P, PARALLEL) : 0); }
  // Whether a thread does all of a k0, and how many a task has.
  bool alone(int64_t threads) const { return threads == 1 || p.K0 >= 4 * threads || p.K0 % threads == 0; }
  int64_t group_of(int64_t threads) const {
    return total < PARALLEL ? p.K0 : max_of(1, min_of(TASK / max_of(size, 1), p.K0 / (4 * threads)));
  }

  template <class F>
  void over_rows(const F& f) const {
    const int64_t all = rows + (rest ? 1 : 0), threads = thread_count();
    const int64_t wanted = ceil_div(max_of(1, size / TASK), threads) * threads;
    const int64_t group = max_of(1, ceil_div(all, wanted)), tasks = ceil_div(all, group);
    auto some = [&](int64_t task) {
      const Fence fence{past};
      const int64_t from = (task % tasks) * group;
      f(task / tasks, from, min_of(all, from + group));
    };
    parallel(p.K0 * tasks, some, true);  // what the statistics read last is still in cache
  }

  // ---- statistics

  static void merge_columns(double* __restrict into, double& count, const double* __restrict from, double more,
                            int64_t P) {
    if (count == 0) {
      std::memcpy(into, from, sizeof(double) * static_cast<size_t>(2 * P));
      count = more;
      return;
    }
    const double all = count + more, f = more / all, h = count * more / all;
    for (int64_t j = 0; j < P; ++j) {
      const double delta = from[j] - into[j];
      into[j] = std::fabs(delta) < HUGE_VAL ? into[j] + delta * f : into[j] + from[j];
      into[P + j] += from[P + j] + delta * delta * h;
    }
    count = all;
  }
  void merge_columns(double* into, double& count, const double* from, double more) const {
    merge_columns(into, count, from, more, P);
  }

  // Mean and sum of squared deviations of each column over the rows of a part: out[0..P), out[P..2P). The pivot is the
  // mean of its first rows; where that was far from the mean of the part, all is taken again about the latter.
  double measure_part(int64_t k0, int64_t part, double* out, A* work) const {
    A* pivot = work;
    const T* base = static_cast<const T*>(p.x) + k0 * size;
    const int64_t first = first_block(part) * block, end = min_of(rows, first_block(part + 1) * block);
    const double count = static_cast<double>(end - first);
    for (int64_t j = 0; j < P; ++j) pivot[j] = 0;
    if (!raw) {
      const int64_t many = min_of(PIVOT, end - first);
      sum_rows(base + first * P, many, pivot);
      const A inverse = static_cast<A>(1.0 / static_cast<double>(many));
      for (int64_t j = 0; j < P; ++j) pivot[j] *= inverse;
    }
    double* s1 = out;
    double* s2 = out + P;
    square_part(base, first, end, pivot, s1, work);
    if (!raw) {
      bool far = false;
      for (int64_t j = 0; j < P; ++j) far |= s1[j] * s1[j] > 0.75 * count * s2[j];
      if (far) {
        for (int64_t j = 0; j < P; ++j) {
          const A moved = static_cast<A>(static_cast<double>(pivot[j]) + s1[j] / count);
          if (std::isfinite(moved)) pivot[j] = moved;
        }
        square_part(base, first, end, pivot, s1, work);
      }
    }
    // where float could not hold the sums: column by column in double, after the rest is settled
    bool bad = false;
    for (int64_t j = 0; j < P; ++j) bad |= sizeof(A) == 4 ? out_of_range(s2[j]) : !(s2[j] < 1e300);
    const double inverse = 1 / count;
    if (!bad) {
      for (int64_t j = 0; j < P; ++j) {
        const double moved = raw ? 0 : s1[j] * inverse, m2 = s2[j] - s1[j] * moved;
        s1[j] = static_cast<double>(pivot[j]) + moved;
        s2[j] = m2 > 0 ? m2 : 0;
      }
    } else {
      for (int64_t j = 0; j < P; ++j) {
        const T* x = base + first * P + j;
        const double m = pivot[j];
        const bool constant = s2[j] == 0 && s1[j] == 0 && to_double(x[0]) == m && to_double(x[(end - first - 1) * P]) == m;
        if (constant || (sizeof(A) == 4 ? !out_of_range(s2[j]) : s2[j] < 1e300)) {
          const double moved = raw ? 0 : s1[j] * inverse, m2 = s2[j] - s1[j] * moved;
          s1[j] = m + moved;
          s2[j] = m2 > 0 ? m2 : 0;
          continue;
        }
        Moments mo;
        moments_slow(x, end - first, P, 1, raw, nullptr, mo);
        s1[j] = mo.mean;
        s2[j] = mo.m2;
      }
    }
    return count;
  }

  void square_part(const T* base, int64_t first, int64_t end, const A* pivot, double* s1, A* work) const {
    A* f1 = work + P;
    A* f2 = work + 2 * P;
    for (int64_t j = 0; j < 2 * P; ++j) s1[j] = 0;
    for (int64_t from = first; from < end; from += block) {
      for (int64_t j = 0; j < 2 * P; ++j) f1[j] = 0;
      square_rows(base + from * P, min_of(block, end - from), pivot, f1, f2);
      for (int64_t j = 0; j < 2 * P; ++j) s1[j] += static_cast<double>(f1[j]);
    }
  }

  template <class F>
  EVENLY_INLINE void over_columns(const F& f) const {
    int64_t j = 0;
    for (; j + W <= P; j += W) f(j, W);
    if (j < P) f(j, static_cast<int>(P - j));
  }

  void sum_rows(const T* x, int64_t many, A* sum) const {
    int64_t r = 0;
    for (; r + 4 <= many; r += 4) {
      const T* q = x + r * P;
      over_columns([&](int64_t j, int left) __attribute__((always_inline)) {
        const V v = (take(q + j, left) + take(q + P + j, left)) + (take(q + 2 * P + j, left) + take(q + 3 * P + j, left));
        put(sum + j, take(sum + j, left) + v, left);
      });
    }
    for (; r < many; ++r)
      over_columns([&](int64_t j, int left) __attribute__((always_inline)) {
        put(sum + j, take(sum + j, left) + take(x + r * P + j, left), left);
      });
  }

  void square_rows(const T* x, int64_t many, const A* pivot, A* s1, A* s2) const {
    int64_t r = 0;
    for (; r + 4 <= many; r += 4) {
      const T* q = x + r * P;
      over_columns([&](int64_t j, int left) __attribute__((always_inline)) {
        if (soon) fetch<3>(q + soon + 4 * j, 4 * W);
        const V m = take(pivot + j, left);
        const V d0 = take(q + j, left) - m, d1 = take(q + P + j, left) - m;
        const V d2 = take(q + 2 * P + j, left) - m, d3 = take(q + 3 * P + j, left) - m;
        put(s1 + j, take(s1 + j, left) + ((d0 + d1) + (d2 + d3)), left);
        put(s2 + j, take(s2 + j, left) + ((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)), left);
      });
    }
    for (; r < many; ++r)
      over_columns([&](int64_t j, int left) __attribute__((always_inline)) {
        const V d = take(x + r * P + j, left) - take(pivot + j, left);
        put(s1 + j, take(s1 + j, left) + d, left);
        put(s2 + j, take(s2 + j, left) + d * d, left);
      });
  }

  // Add rows of L columns that lie side by side.
  template <class S>
  void fold(S* columns) const {
    for (int64_t q = 1; q < P / L; ++q)
      for (int64_t j = 0; j < L; ++j) columns[j] += columns[q * L + j];
  }
  // Repeat the first L columns.
  void repeat(A* columns) const {
    for (int64_t q = 1; q < P / L; ++q) std::memcpy(columns + q * L, columns, sizeof(A) * static_cast<size_t>(L));
  }

  // Merge columns that share a statistic, and the partial row. All columns have the same count.
  void settle(int64_t k0, const double* column, double count) const {
    const T* last = static_cast<const T*>(p.x) + k0 * size + rows * P;
    const int64_t times = P / L;
    const double share = 1 / static_cast<double>(times * p.R1);
    for (int64_t first = 0; first < p.K1; first += MANY) {
      const int64_t many = min_of(MANY, p.K1 - first);
      double mean[MANY] = {}, m2[MANY] = {};
      if (count > 0) {
        const double* from = column + first * p.R1;
        auto over = [&](const auto& f) __attribute__((always_inline)) {
          for (int64_t q = 0; q < times; ++q)
            if (p.R1 == 1)
              for (int64_t j = 0; j < many; ++j) f(j, q * L + j);
            else
              for (int64_t j = 0; j < many; ++j)
                for (int64_t r = 0; r < p.R1; ++r) f(j, q * L + j * p.R1 + r);
        };
        over([&](int64_t j, int64_t at) __attribute__((always_inline)) { mean[j] += from[at]; });
        for (int64_t j = 0; j < many; ++j) mean[j] *= share;
        over([&](int64_t j, int64_t at) __attribute__((always_inline)) {
          const double d = from[at] - mean[j];
          m2[j] += from[P + at] + count * d * d;
        });
      }
      if (rest)
        for (int64_t j = 0; j < many; ++j) {
          Moments mo;
          mo.n = count * static_cast<double>(times * p.R1), mo.mean = mean[j], mo.m2 = m2[j];
          for (int64_t q = 0; q < times; ++q)
            for (int64_t r = 0; r < p.R1; ++r) {
              const int64_t at = q * L + (first + j) * p.R1 + r;
              if (at >= rest) continue;
              const double v = to_double(last[at]);
              if (raw)
                mo.merge(1, 0, v * v);
              else
                mo.merge(1, v, std::isfinite(v) ? 0.0 : NAN);
            }
          mean[j] = mo.mean, m2[j] = mo.m2;
        }
      finish_many<A>(p, k0 * p.K1 + first, many, static_cast<double>(n), mean, m2, raw);
    }
  }

  // ---- y = (x - m)*w + b by column: c = m, w, b

  void expand(int64_t k0, A* c) const {
    const A* __restrict s = static_cast<const A*>(p.stats) + k0 * p.K1;
    const bool lift = !p.center && p.scale == SCALE_STD && !p.given;
    for (int64_t first = 0; first < p.K1; first += MANY) {
      const int64_t many = min_of(MANY, p.K1 - first), at = first * p.R1;
      double gain[MANY], shift[MANY];
      for (int64_t j = 0; j < many; ++j) {
        const double m = s[first + j], r = s[K + first + j], low = s[2 * K + first + j];
        gain[j] = r, shift[j] = (lift ? (m + low) * r : 0) - low * r;
      }
      spread(c + at, s + first, many, p.R1);
      by_weight(c + P + at, c + 2 * P + at, at, many, gain, shift);
    }
    for (int i = 0; i < 3; ++i) repeat(c + i * P);
  }

  // a = gain * weight and b = shift * weight + bias of the columns of `many` statistics, which start at column `at`.
  EVENLY_INLINE void by_weight(A* __restrict a, A* __restrict b, int64_t at, int64_t many, const double* gain,
                               const double* shift) const {
    const A* __restrict w = column_weight + at;
    const A* __restrict bias = column_bias + at;
    if (p.R1 == 1) {
      for (int64_t j = 0; j < many; ++j) {
        a[j] = static_cast<A>(gain[j] * static_cast<double>(w[j]));
        b[j] = static_cast<A>(shift[j] * static_cast<double>(w[j]) + static_cast<double>(bias[j]));
      }
    } else if (same_weight) {
      double one[2][MANY];
      for (int64_t j = 0; j < many; ++j) {
        const double weight = w[j * p.R1];
        one[0][j] = gain[j] * weight, one[1][j] = shift[j] * weight + static_cast<double>(bias[j * p.R1]);
      }
      spread(a, one[0], many, p.R1);
      spread(b, one[1], many, p.R1);
    } else {
      for (int64_t j = 0; j < many; ++j, a += p.R1, b += p.R1, w += p.R1, bias += p.R1)
        for (int64_t r = 0; r < p.R1; ++r) {
          a[r] = static_cast<A>(gain[j] * static_cast<double>(w[r]));
          b[r] = static_cast<A>(shift[j] * static_cast<double>(w[r]) + static_cast<double>(bias[r]));
        }
    }
  }

  Coefficients<T> coefficients(const A* c) const {
    Coefficients<T> k{};
    k.mv = c;
    k.wv = c + P;
    k.bv = c + 2 * P;
    return k;
  }

  Run<T> row_at(int64_t k0, int64_t r) const {
    const int64_t at = k0 * size + r * P;
    Run<T> out{};
    out.past = past, out.soon = soon;
    out.x = static_cast<const T*>(p.x) + at;
    if (p.residual) out.residual = static_cast<const T*>(p.residual) + at;
    if (p.y) out.y = static_cast<T*>(p.y) + at;
    if (p.bits) out.bits = p.bits + (k0 * (rows + (rest ? 1 : 0)) + r) * g.bits_row;
    if (p.dy) out.dy = static_cast<const T*>(p.dy) + at;
    if (p.dx) out.dx = static_cast<T*>(p.dx) + at;
    if (p.dresidual) out.dresidual = static_cast<T*>(p.dresidual) + at;
    return out;
  }
  // The full rows of a range at once, then the partial one.
  template <class F>
  void over_series(int64_t from, int64_t to, const F& f) const {
    Series<T> series;
    series.many = min_of(to, rows) - from, series.stride = P, series.bits_stride = g.bits_row;
    if (series.many > 0) f(from, P, series);
    if (to > rows) f(rows, rest, Series<T>());
  }

  void apply(int64_t k0, int64_t from, int64_t to, const A* c) const {
    const ApplyFn<T> f = pick_apply<T, COLUMN>(p.act, p.residual, p.relu_bits);
    const Coefficients<T> k = coefficients(c);
    over_series(from, to, [&](int64_t r, int64_t width, const Series<T>& series) { f(row_at(k0, r), width, k, series); });
  }

  // ---- backward

  template <int KIND>
  void reduce_rows(int64_t k0, int64_t from, int64_t many, const A* c, A* s, A* q, int64_t width) const {
    const Coefficients<T> k = coefficients(c);
    int64_t r = from;
    auto column = [&](const Run<T>& run, int64_t j, int left, V& s1, V& s2) __attribute__((always_inline)) {
      const V x = take(run.x + j, left);
      const V v = gradient<T, KIND, COLUMN>(run, nullptr, x, k, j, left);
      s1 += v;
      s2 += v * (x - take(c + j, left));
    };
    auto over = [&](auto&& f) __attribute__((always_inline)) {
      int64_t j = 0;
      for (; j + W <= width; j += W) f(j, W);
      if (j < width) f(j, static_cast<int>(width - j));
    };
    for (; r + 4 <= from + many; r += 4) {
      const Run<T> a = row_at(k0, r), b = row_at(k0, r + 1), d = row_at(k0, r + 2), e = row_at(k0, r + 3);
      over([&](int64_t j, int left) __attribute__((always_inline)) {
        V s1{}, s2{};
        if (a.soon) fetch_inputs<KIND>(a, a.soon + 4 * j, 4 * W);
        column(a, j, left, s1, s2);
        column(b, j, left, s1, s2);
        column(d, j, left, s1, s2);
        column(e, j, left, s1, s2);
        put(s + j, take(s + j, left) + s1, left);
        put(q + j, take(q + j, left) + s2, left);
      });
    }
    for (; r < from + many; ++r) {
      const Run<T> a = row_at(k0, r);
      over([&](int64_t j, int left) __attribute__((always_inline)) {
        V s1{}, s2{};
        column(a, j, left, s1, s2);
        put(s + j, take(s + j, left) + s1, left);
        put(q + j, take(q + j, left) + s2, left);
      });
    }
  }

  void reduce_any(int64_t k0, int64_t from, int64_t many, const A* c, A* s, A* q, int64_t width) const {
    switch (kind) {
      case PLAIN:
        return reduce_rows<PLAIN>(k0, from, many, c, s, q, width);
      case SIGN_BITS:
        return reduce_rows<SIGN_BITS>(k0, from, many, c, s, q, width);
      case RELU:
        return reduce_rows<RELU>(k0, from, many, c, s, q, width);
      case RELU_RES:
        return reduce_rows<RELU_RES>(k0, from, many, c, s, q, width);
      case SILU:
        return reduce_rows<SILU>(k0, from, many, c, s, q, width);
      case GELU:
        return reduce_rows<GELU>(k0, from, many, c, s, q, width);
      case SILU_RES:
        return reduce_rows<SILU_RES>(k0, from, many, c, s, q, width);
      default:
        return reduce_rows<GELU_RES>(k0, from, many, c, s, q, width);
    }
  }

  // back: coefficients that do not depend on the sums; the gradients are written while the rows are in cache.
  void reduce_part(int64_t k0, int64_t part, const A* c, double* out, A* work, const A* back) const {
    for (int64_t j = 0; j < 2 * P; ++j) out[j] = 0;
    auto flush = [&](int64_t from, int64_t many, int64_t width) {
      for (int64_t j = 0; j < 2 * P; ++j) work[j] = 0;
      reduce_any(k0, from, many, c, work, work + P, width);
      for (int64_t j = 0; j < 2 * P; ++j) out[j] += static_cast<double>(work[j]);
      if (back && (p.dx || p.dresidual)) unapply(k0, from, from + many, c, back);
    };
    for (int64_t b = first_block(part); b < first_block(part + 1); ++b)
      flush(b * block, min_of(block, rows - b * block), P);
    if (part == parts - 1 && rest) flush(rows, 1, rest);
  }

  // r * weight of the columns of `many` statistics, which start at column `at`.
  EVENLY_INLINE void gains(A* __restrict to, int64_t at, int64_t many, const A* __restrict r) const {
    const A* __restrict w = column_weight + at;
    if (p.R1 == 1) {
      for (int64_t j = 0; j < many; ++j) to[j] = r[j] * w[j];
    } else if (same_weight) {
      A one[MANY];
      for (int64_t j = 0; j < many; ++j) one[j] = r[j] * w[j * p.R1];
      spread(to, one, many, p.R1);
    } else {
      for (int64_t j = 0; j < many; ++j, to += p.R1, w += p.R1)
        for (int64_t i = 0; i < p.R1; ++i) to[i] = r[j] * w[i];
    }
  }

  // e = r, r*w, b, c by column
  void expand_back(int64_t k0, const double* __restrict sums, A* e) const {
    const A* __restrict w = column_weight;
    const A* __restrict r = static_cast<const A*>(p.stats) + K + k0 * p.K1;
    for (int64_t first = 0; first < p.K1; first += MANY) {
      const int64_t many = min_of(MANY, p.K1 - first);
      double sum[MANY] = {}, sum_d[MANY] = {}, b[MANY], c[MANY];
      for (int64_t q = 0; q < P / L; ++q) {
        const double* __restrict one = sums + q * L + first * p.R1;
        const A* __restrict weights = w + first * p.R1;
        auto add = [&](int64_t j, int64_t at) __attribute__((always_inline)) {
          sum[j] += static_cast<double>(weights[at]) * one[at];
          sum_d[j] += static_cast<double>(weights[at]) * one[P + at];
        };
        if (p.R1 == 1)
          for (int64_t j = 0; j < many; ++j) add(j, j);
        else
          for (int64_t j = 0; j < many; ++j)
            for (int64_t i = 0; i < p.R1; ++i) add(j, j * p.R1 + i);
      }
      backs_of<A>(p, k0 * p.K1 + first, many, static_cast<double>(n), sum, sum_d, b, c);
      const int64_t at = first * p.R1;
      spread(e + at, r + first, many, p.R1);
      spread(e + 2 * P + at, b, many, p.R1);
      spread(e + 3 * P + at, c, many, p.R1);
      gains(e + P + at, at, many, r + first);
    }
    for (int i = 0; i < 4; ++i) repeat(e + i * P);
  }

  void unapply(int64_t k0, int64_t from, int64_t to, const A* c, const A* e) const {
    const BackFn<T> f = pick_back<T, COLUMN>(kind);
    BackCoefficients<T> b{};
    b.rv = e;
    b.rwv = e + P;
    b.bv = e + 2 * P;
    b.cv = e + 3 * P;
    b.given = p.given;
    const Coefficients<T> k = coefficients(c);
    over_series(from, to, [&](int64_t r, int64_t width, const Series<T>& series) {
      f(row_at(k0, r), width, k, b, series, {}, nullptr, 0);
    });
  }
};
