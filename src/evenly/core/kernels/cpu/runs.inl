// Statistics over sets of contiguous runs.

template <class T>
class Runs {
  using A = typename Tr<T>::A;
  static constexpr int64_t GROUP = 512;

 public:
  Runs(const Problem& problem, const Geometry& geometry) : p(problem), g(geometry) {
    K = p.K0 * p.K1;
    n = p.R0 * p.R1;
    total = K * n;
    stride = p.K1 * p.R1;
    per_block = p.R1 <= BLOCK ? max_of(1, BLOCK / p.R1) : 1;
    pieces = ceil_div(p.R1, BLOCK);
    blocks = p.R1 <= BLOCK ? ceil_div(p.R0, per_block) : p.R0 * pieces;
    unit = min_of(g.seg, UNIT);
    units_seg = ceil_div(g.seg, unit);
    units = g.nseg * units_seg;
    wide = static_cast<double>(n);
    per_weight = p.wsize > 0 ? 1.0 / static_cast<double>(p.wsize) : 0;
  }

  int forward() {
    if (!parameters()) return NO_MEMORY;
    apply_fn = g.mode == SCALAR ? pick_apply<T, SCALAR>(p.act, p.residual, p.relu_bits)
                                : pick_apply<T, VECTOR>(p.act, p.residual, p.relu_bits);
    const bool raw = is_raw(p);
    const bool measure = !p.given && !p.ready;
    const bool affects = p.y != nullptr;
    const int64_t threads = total < PARALLEL ? 1 : thread_count();
    if (measure && (threads == 1 || K >= 4 * threads || blocks == 1)) {
      const int64_t group = total < PARALLEL ? K : max_of(1, min_of(TASK / max_of(n, 1), ceil_div(K, 4 * threads)));
      parallel(ceil_div(K, group), [&](int64_t task) {
        for (int64_t k = task * group; k < min_of(K, (task + 1) * group); ++k) {
          if (measure) {
            Moments mo;
            for (int64_t b = 0; b < blocks; ++b) measure_block(k, b, raw, mo);
            finish<A>(p, k, mo, raw);
          }
          if (affects) {
            const Stat s = stat_of<A>(p, k);
            for (int64_t r0 = 0; r0 < p.R0; ++r0) apply(k, r0, 0, units, s);
          }
        }
      });
      return OK;
    }
    if (measure) {
      Buffer<Moments> partial;
      if (!partial.allocate(K * blocks)) return NO_MEMORY;
      const int64_t group = max_of(1, TASK / BLOCK);
      parallel(ceil_div(K * blocks, group), [&](int64_t task) {
        for (int64_t i = task * group; i < min_of(K * blocks, (task + 1) * group); ++i) {
          partial.data[i] = Moments();
          measure_block(i / blocks, i % blocks, raw, partial.data[i]);
        }
      });
      for (int64_t k = 0; k < K; ++k) {
        Moments mo;
        for (int64_t b = 0; b < blocks; ++b) {
          const Moments& one = partial.data[k * blocks + b];
          if (one.n > 0) mo.merge(one.n, one.mean, one.m2);
        }
        finish<A>(p, k, mo, raw);
      }
    }
    if (affects)
      over_units([&](int64_t k, int64_t r0, int64_t from, int64_t to) { apply(k, r0, from, to, stat_of<A>(p, k)); });
    return OK;
  }

  int backward() {
    if (!parameters()) return NO_MEMORY;
    kind = kind_of(p);
    const bool wants_parameters = p.wsize > 0 && (p.dweight || p.dbias);
    const int64_t threads = total < PARALLEL ? 1 : thread_count();
    if (g.mode == SCALAR) {
      reduce_fn = pick_reduce<T, SCALAR>(kind);
      back_fn = pick_back<T, SCALAR>(kind);
      parked_fn = pick_back<T, SCALAR>(PARKED);
    } else {
      reduce_fn = pick_reduce<T, VECTOR>(kind);
      back_fn = pick_back<T, VECTOR>(kind);
      parked_fn = pick_back<T, VECTOR>(PARKED);
    }
    if (g.mode == VECTOR) return backward_vector();

    // Sums of each unit; with parameters they are kept until the end.
    const bool whole = threads == 1 || K >= 4 * threads || p.R0 * units == 1;
    const bool keep_all = wants_parameters || !whole;
    const int64_t in_stat = p.R0 * units;
    Buffer<double> kept;
    if (keep_all && !kept.allocate(2 * K * in_stat)) return NO_MEMORY;
    const bool sums_needed = wants_parameters || !p.given;
    if (p.given) {
      over_units([&](int64_t k, int64_t r0, int64_t from, int64_t to) {
        const Stat s = stat_of<A>(p, k);
        const int64_t run = run_of(k, r0);
        for (int64_t u = from; u < to; ++u) {
          double* sums = kept.data + 2 * (k * in_stat + r0 * units + u);
          if (sums_needed) reduce(s, run, u, index_of(run, u), sums, nullptr);
          if (p.dx || p.dresidual) unapply(s, run, u, Back{0, 0}, nullptr);
        }
      });
    } else if (whole) {
      const int64_t group = total < PARALLEL ? K : max_of(1, min_of(TASK / max_of(n, 1), ceil_div(K, 4 * threads)));
      std::atomic<int> status{OK};
      parallel(ceil_div(K, group), [&](int64_t task) {
        Buffer<A> park;
        const bool parked = sums_needed && can_park(n) && park_into(park, n);
        for (int64_t k = task * group; k < min_of(K, (task + 1) * group); ++k) {
          const Stat s = stat_of<A>(p, k);
          double sum = 0, sum_d = 0;
          if (sums_needed) {
            for (int64_t r0 = 0; r0 < p.R0; ++r0) {
              const int64_t run = run_of(k, r0);
              for (int64_t u = 0; u < units; ++u) {
                const int64_t i = index_of(run, u);
                double one[2];
                double* to = keep_all ? kept.data + 2 * (k * in_stat + r0 * units + u) : one;
                reduce(s, run, u, i, to, parked ? park_at(park, k, r0, u) : nullptr);
                const double w = weight_at(i);
                sum += w * to[0];
                sum_d += w * to[1];
              }
            }
          }
          if (!p.dx && !p.dresidual) continue;
          const Back e = back_of<A>(p, k, wide, sum, sum_d);
          for (int64_t r0 = 0; r0 < p.R0; ++r0) {
            const int64_t run = run_of(k, r0);
            for (int64_t u = 0; u < units; ++u)
              unapply(s, run, u, e, parked ? park_at(park, k, r0, u) : nullptr);
          }
        }
      });
      if (status.load() != OK) return status.load();
    } else {
      if (sums_needed)
        over_units([&](int64_t k, int64_t r0, int64_t from, int64_t to) {
          const Stat s = stat_of<A>(p, k);
          const int64_t run = run_of(k, r0);
          for (int64_t u = from; u < to; ++u)
            reduce(s, run, u, index_of(run, u), kept.data + 2 * (k * in_stat + r0 * units + u), nullptr);
        });
      if (p.dx || p.dresidual) {
        Buffer<Back> coefficients;
        if (!coefficients.allocate(K)) return NO_MEMORY;
        for (int64_t k = 0; k < K; ++k) {
          double sum = 0, sum_d = 0;
          if (sums_needed)
            for (int64_t r0 = 0; r0 < p.R0; ++r0)
              for (int64_t u = 0; u < units; ++u) {
                const double* one = kept.data + 2 * (k * in_stat + r0 * units + u);
                const double w = weight_at(index_of(run_of(k, r0), u));
                sum += w * one[0];
                sum_d += w * one[1];
              }
          coefficients.data[k] = back_of<A>(p, k, wide, sum, sum_d);
        }
        over_units([&](int64_t k, int64_t r0, int64_t from, int64_t to) {
          const Stat s = stat_of<A>(p, k);
          const int64_t run = run_of(k, r0);
          for (int64_t u = from; u < to; ++u) unapply(s, run, u, coefficients.data[k], nullptr);
        });
      }
    }
    if (wants_parameters) {
      Buffer<double> sums;
      if (!sums.zeros(2 * p.wsize)) return NO_MEMORY;
      for (int64_t k = 0; k < K; ++k) {
        const Stat s = stat_of<A>(p, k);
        for (int64_t r0 = 0; r0 < p.R0; ++r0) {
          const int64_t run = run_of(k, r0);
          for (int64_t u = 0; u < units; ++u) {
            const double* one = kept.data + 2 * (k * in_stat + r0 * units + u);
            const int64_t i = index_of(run, u);
            sums.data[i] += s.r * one[1] + (s.c + s.shift) * one[0];
            sums.data[p.wsize + i] += one[0];
          }
        }
      }
      store_parameters(p.dweight, p.wdtype, 0, p.wsize, sums.data);
      store_parameters(p.dbias, p.wdtype, 0, p.wsize, sums.data + p.wsize);
    }
    return OK;
  }

 private:
  const Problem& p;
  const Geometry& g;
  int64_t K, n, total, stride, per_block, pieces, blocks, unit, units_seg, units;
  double wide, per_weight;
  int kind = PLAIN;
  ApplyFn<T> apply_fn = nullptr;
  ReduceFn<T> reduce_fn = nullptr;
  BackFn<T> back_fn = nullptr, parked_fn = nullptr;
  Parameters<A> weight, bias;

  bool parameters() {
    const int64_t times = g.mode == VECTOR ? p.wdiv : 1;
    if (!weight.set(p.weight, p.wdtype, p.wsize, times) || !bias.set(p.bias, p.wdtype, p.wsize, times)) return false;
    if (g.mode == VECTOR) return weight.fill(1, g.period) && bias.fill(0, g.period);
    return true;
  }

  int64_t run_of(int64_t k, int64_t r0) const {
    if (p.K0 == 1) return r0 * p.K1 + k;
    if (p.R0 == 1) return k;
    return ((k / p.K1) * p.R0 + r0) * p.K1 + k % p.K1;
  }

  // The segment that unit u lies in, and where the unit starts and ends in it.
  EVENLY_INLINE int64_t segment(int64_t u) const { return units_seg == 1 ? u : u / units_seg; }
  EVENLY_INLINE int64_t begin(int64_t u) const { return units_seg == 1 ? 0 : (u % units_seg) * unit; }
  EVENLY_INLINE int64_t length(int64_t u) const { return min_of(unit, g.seg - begin(u)); }

  // SCALAR: which weight unit u of a run has. A run lies within one weight, or is cut into one segment a weight.
  EVENLY_INLINE int64_t index_of(int64_t run, int64_t u) const {
    if (p.wsize <= 1) return 0;
    if (g.nseg > 1) return around(run * g.nseg + segment(u));
    return around(p.R1 == p.wdiv ? run : (run * p.R1) / p.wdiv);
  }
  // i % wsize; a division of integers takes longer than all else that is done for a short unit.
  EVENLY_INLINE int64_t around(int64_t i) const {
    if (i < p.wsize) return i;
    int64_t r = i - static_cast<int64_t>(static_cast<double>(i) * per_weight) * p.wsize;
    if (r < 0) r += p.wsize;
    return r >= p.wsize ? r - p.wsize : r;
  }
  EVENLY_INLINE double weight_at(int64_t i) const { return weight.at ? static_cast<double>(weight.at[i]) : 1.0; }

  void measure_block(int64_t k, int64_t b, bool raw, Moments& mo) const {
    const T* x = static_cast<const T*>(p.x);
    if (p.R1 <= BLOCK) {
      const int64_t r0 = b * per_block;
      moments_block(x + run_of(k, r0) * p.R1, min_of(per_block, p.R0 - r0), stride, p.R1, raw, mo);
    } else {
      const int64_t r0 = b / pieces, from = (b % pieces) * BLOCK;
      moments_block(x + run_of(k, r0) * p.R1 + from, 1, 0, min_of(BLOCK, p.R1 - from), raw, mo);
    }
  }

  int64_t k_of(int64_t run) const {
    if (p.R0 == 1) return run;
    return run / (p.R0 * p.K1) * p.K1 + run % p.K1;
  }
  int64_t r0_of(int64_t run) const { return p.R0 == 1 ? 0 : run / p.K1 % p.R0; }

  // Tasks of several units of one run each, in the order of memory.
  template <class F>
  void over_units(const F& f) const {
    const int64_t runs = K * p.R0;
    const int64_t per_task = max_of(1, min_of(units, TASK / unit));
    const int64_t tasks_run = ceil_div(units, per_task);
    const int64_t runs_task = max_of(1, TASK / p.R1);
    if (tasks_run > 1) {
      parallel(runs * tasks_run, [&](int64_t task) {
        const int64_t run = task / tasks_run, from = (task % tasks_run) * per_task;
        f(k_of(run), r0_of(run), from, min_of(units, from + per_task));
      });
    } else {
      parallel(ceil_div(runs, runs_task), [&](int64_t task) {
        for (int64_t run = task * runs_task; run < min_of(runs, (task + 1) * runs_task); ++run)
          f(k_of(run), r0_of(run), 0, units);
      });
    }
  }

  // i: the index of the unit's weight (SCALAR).
  EVENLY_INLINE Coefficients<T> coefficients(const Stat& s, int64_t run, int64_t u, int64_t i) const {
    Coefficients<T> k{};
    k.m = static_cast<A>(s.m);
    if (g.mode == SCALAR) {
      const double w = weight_at(i);
      k.a = static_cast<A>(s.r * w);
      k.b = static_cast<A>((s.c + s.shift) * w + (bias.at ? static_cast<double>(bias.at[i]) : 0.0));
    } else {
      k.a = static_cast<A>(s.r);
      k.b = static_cast<A>(s.c + s.shift);
      const int64_t at = period_at(run, u);
      k.wv = weight.at + at;
      k.bv = bias.at + at;
    }
    return k;
  }

  // VECTOR: where in the period a unit starts.
  EVENLY_INLINE int64_t period_at(int64_t run, int64_t u) const {
    return g.seg == g.period ? begin(u) : (run * p.R1 + begin(u)) % g.period;
  }

  EVENLY_INLINE Run<T> run_at(int64_t at, int64_t run, int64_t u) const {
    Run<T> r{};
    r.x = static_cast<const T*>(p.x) + at;
    if (p.residual) r.residual = static_cast<const T*>(p.residual) + at;
    if (p.y) r.y = static_cast<T*>(p.y) + at;
    if (p.bits) r.bits = p.bits + (run * g.nseg + segment(u)) * g.bits_row + begin(u) / 8;
    if (p.dy) r.dy = static_cast<const T*>(p.dy) + at;
    if (p.dx) r.dx = static_cast<T*>(p.dx) + at;
    if (p.dresidual) r.dresidual = static_cast<T*>(p.dresidual) + at;
    return r;
  }

  void apply(int64_t k, int64_t r0, int64_t from, int64_t to, const Stat& s) const {
    const int64_t run = run_of(k, r0);
    for (int64_t u = from; u < to; ++u) {
      const int64_t at = run * p.R1 + segment(u) * g.seg + begin(u);
      apply_fn(run_at(at, run, u), length(u), coefficients(s, run, u, index_of(run, u)));
    }
  }

  // ---- backward

  // The gradient before an activation that is dear to compute is left for the second pass: in dresidual or dx where
  // they have the accumulation type, else in a buffer if the statistic's values are few.
  bool can_park(int64_t values) const {
    if (kind < SILU) return false;
    if (sizeof(T) == sizeof(A)) return p.dresidual || p.dx;
    return values <= 65536;
  }
  bool park_into(Buffer<A>& park, int64_t values) const { return sizeof(T) == sizeof(A) || park.allocate(values); }
  A* park_at(const Buffer<A>& park, int64_t k, int64_t r0, int64_t u) const {
    const int64_t offset = segment(u) * g.seg + begin(u);
    if (sizeof(T) != sizeof(A)) return park.data + r0 * p.R1 + offset;
    A* out = static_cast<A*>(p.dresidual ? p.dresidual : p.dx);
    return out + run_of(k, r0) * p.R1 + offset;
  }

  EVENLY_INLINE void reduce(const Stat& s, int64_t run, int64_t u, int64_t i, double* to, A* park) const {
    const int64_t at = run * p.R1 + segment(u) * g.seg + begin(u);
    const Coefficients<T> c = coefficients(s, run, u, i);
    Sums<T> sums;
    sums.park = park;
    reduce_fn(run_at(at, run, u), length(u), c, sums);
    to[0] = sums.g;
    to[1] = sums.gd;
  }

  EVENLY_INLINE void unapply(const Stat& s, int64_t run, int64_t u, const Back& e, const A* park) const {
    const int64_t at = run * p.R1 + segment(u) * g.seg + begin(u);
    const int64_t i = index_of(run, u);
    BackCoefficients<T> c{};
    c.r = static_cast<A>(s.r);
    c.rw = static_cast<A>(s.r * (g.mode == SCALAR ? weight_at(i) : 1.0));
    c.b = static_cast<A>(e.b);
    c.c = static_cast<A>(e.c);
    c.given = p.given;
    (park ? parked_fn : back_fn)(run_at(at, run, u), length(u), coefficients(s, run, u, i), c, park);
  }

  // Weights that vary along the run: their gradients are added up in one buffer for each of a fixed number of parts.
  int backward_vector() {
    int64_t parts = min_of(K, max_of(1, min_of(64, total / PARALLEL)));
    parts = max_of(1, min_of(parts, 2 * total / max_of(1, g.period)));
    // One part, and parameters of the accumulation type: into the gradients themselves.
    const bool direct = parts == 1 && p.wdiv == 1 && p.dweight && p.dbias && p.wdtype == (sizeof(A) == 4 ? F32 : F64);
    Buffer<A> partial;
    if (!direct && !partial.zeros(2 * parts * g.period)) return NO_MEMORY;
    if (direct) {
      std::memset(p.dweight, 0, sizeof(A) * static_cast<size_t>(p.wsize));
      std::memset(p.dbias, 0, sizeof(A) * static_cast<size_t>(p.wsize));
    }
    parallel(parts, [&](int64_t part) {
      A* dw = direct ? static_cast<A*>(p.dweight) : partial.data + 2 * part * g.period;
      A* db = direct ? static_cast<A*>(p.dbias) : dw + g.period;
      Buffer<A> park;
      const bool parked = can_park(n) && park_into(park, n);
      for (int64_t k = part * K / parts; k < (part + 1) * K / parts; ++k) {
        const Stat s = stat_of<A>(p, k);
        Sums<T> sums;
        for (int64_t r0 = 0; r0 < p.R0; ++r0)
          for (int64_t u = 0; u < units; ++u) {
            const int64_t run = run_of(k, r0), at = run * p.R1 + segment(u) * g.seg + begin(u);
            sums.park = parked ? park_at(park, k, r0, u) : nullptr;
            sums.dw = dw + period_at(run, u);
            sums.db = db + period_at(run, u);
            reduce_fn(run_at(at, run, u), length(u), coefficients(s, run, u, 0), sums);
          }
        if (!p.dx && !p.dresidual) continue;
        const Back e = back_of<A>(p, k, wide, sums.g, sums.gd);
        for (int64_t r0 = 0; r0 < p.R0; ++r0)
          for (int64_t u = 0; u < units; ++u) unapply(s, run_of(k, r0), u, e, parked ? park_at(park, k, r0, u) : nullptr);
      }
    });
    if (direct) return OK;
    auto finish_group = [&](int64_t task) {
      double sums[2][GROUP];
      const int64_t first = task * GROUP, many = min_of(GROUP, p.wsize - first);
      if (parts == 1 && p.wdiv == 1) {
        store_parameters(p.dweight, p.wdtype, first, many, partial.data + first);
        store_parameters(p.dbias, p.wdtype, first, many, partial.data + g.period + first);
        return;
      }
      for (int64_t i = 0; i < many; ++i) sums[0][i] = 0, sums[1][i] = 0;
      for (int64_t part = 0; part < parts; ++part)
        for (int which = 0; which < 2; ++which) {
          const A* from = partial.data + (2 * part + which) * g.period + first * p.wdiv;
          if (p.wdiv == 1)
            for (int64_t i = 0; i < many; ++i) sums[which][i] += static_cast<double>(from[i]);
          else
            for (int64_t i = 0; i < many; ++i)
              for (int64_t j = 0; j < p.wdiv; ++j) sums[which][i] += static_cast<double>(from[i * p.wdiv + j]);
        }
      store_parameters(p.dweight, p.wdtype, first, many, sums[0]);
      store_parameters(p.dbias, p.wdtype, first, many, sums[1]);
    };
    const int64_t groups = ceil_div(p.wsize, GROUP);
    if (parts * g.period < PARALLEL)
      for (int64_t t = 0; t < groups; ++t) finish_group(t);
    else
      parallel(groups, finish_group);
    return OK;
  }
};
