// Statistics over sets of contiguous runs.
//
// Short runs come many at a time: statistics whose runs are neighbours in memory form a batch that stays in the first
// cache, and each step (moments, what follows from them, the output) is taken for the whole batch before the next one.
// Which statistics share a batch depends on the shape alone.

template <class T>
class Runs {
  using A = typename Tr<T>::A;
  static constexpr int64_t GROUP = 512;
  static constexpr int64_t NEAR = 12288;    // bytes of the input of a batch
  static constexpr int64_t FETCH = 65536;   // bytes of a batch that is fetched ahead at most
  static constexpr int64_t PARK = 1 << 17;  // values of a statistic that are parked in a buffer
  static constexpr int64_t CHUNK = 32;      // pieces in a table
  static_assert(CHUNK >= MANY, "a batch has one table");

 public:
  Runs(const Problem& problem, const Geometry& geometry) : p(problem), g(geometry) {
    K = p.K0 * p.K1;
    n = p.R0 * p.R1;
    total = K * n;
    stride = p.K1 * p.R1;
    per_block = p.R1 <= BLOCK ? max_of(1, BLOCK / p.R1) : 1;
    pieces = ceil_div(p.R1, BLOCK);
    piece = min_of(BLOCK, ceil_div(ceil_div(p.R1, pieces), 64) * 64);  // of about the same length
    blocks = p.R1 <= BLOCK ? ceil_div(p.R0, per_block) : p.R0 * pieces;
    if (p.R1 <= BLOCK) per_block = ceil_div(p.R0, blocks);
    unit = min_of(g.seg, UNIT);
    units_seg = ceil_div(g.seg, unit);
    units = g.nseg * units_seg;
    wide = static_cast<double>(n);
    per_weight = p.wsize > 0 ? 1.0 / static_cast<double>(p.wsize) : 0;
    neighbours = p.R0 == 1 ? K : p.K1;
    // Gradients of weights along the run: what is done once a batch is more, and the inputs of two fill the first cache.
    const bool along = g.mode == VECTOR && p.dy;
    batch = min_of(MANY, (along ? 2 : 1) * NEAR / max_of(1, n * static_cast<int64_t>(sizeof(T))));
    if (total >= PARALLEL) batch = min_of(batch, ceil_div(neighbours, 8));  // something for every thread
    batch = max_of(1, batch);
    past = is_far(p, total * static_cast<int64_t>(sizeof(T)));
    soon = soon_of<T>(total);
    // A small batch leaves time to fetch the next one while its own output is written, where that is written past the
    // caches, or arithmetic takes longer than memory: measured, in half precision, and for gradients of weights.
    const bool slow = past || sizeof(T) == 2 || (along && soon);
    ahead = slow && total >= PARALLEL && batch * n * static_cast<int64_t>(sizeof(T)) <= FETCH ? batch * p.R1 : 0;
    shifting = g.mode == VECTOR && g.nseg == 1 && p.R1 != g.period;
    steady = !shifting && (p.wsize <= 1 || stride % (p.wdiv * p.wsize) == 0);
  }

  int forward() {
    if (!parameters()) return NO_MEMORY;
    apply_fn = g.mode == SCALAR ? pick_apply<T, SCALAR>(p.act, p.residual, p.relu_bits)
                                : pick_apply<T, VECTOR>(p.act, p.residual, p.relu_bits);
    const bool raw = is_raw(p);
    const bool measure = !p.given && !p.ready;
    const bool affects = p.y != nullptr;
    const int64_t threads = total < PARALLEL ? 1 : thread_count();
    if (measure && (threads == 1 || batches() >= 2 * threads || blocks == 1)) {
      over_batches(threads, [&](int64_t k, int64_t many) {
        measure_batch(k, many, raw);
        if (!affects) return;
        Table table;
        over_all(k, many, [&](const Piece& q) { apply(q, table); });
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
      over_memory(threads, [&](const Piece& q) {
        Table table;
        apply(q, table);
      });
    return OK;
  }

  int backward() {
    if (!parameters()) return NO_MEMORY;
    kind = kind_of(p);
    if (past && kind >= SILU && n > PARK) past = false;  // what is parked in the output is to stay in the cache
    const bool wants_parameters = p.wsize > 0 && (p.dweight || p.dbias);
    const bool wants_inputs = p.dx || p.dresidual;
    const bool sums_needed = wants_parameters || !p.given;
    const int64_t threads = total < PARALLEL ? 1 : thread_count();
    if (g.mode == SCALAR) {
      reduce_fn = pick_reduce<T>(kind);
      back_fn = pick_back<T, SCALAR>(kind);
      parked_fn = pick_back<T, SCALAR>(PARKED);
    } else {
      reduce_vector_fn = pick_reduce_vector<T>(kind);
      back_fn = pick_back<T, VECTOR>(kind);
      parked_fn = pick_back<T, VECTOR>(PARKED);
      return backward_vector();
    }

    // Sums of each piece, kept until the end for the gradients of parameters. Runs of one weight are added up in rows.
    joined = p.R0 > 2 && g.nseg == 1 && steady && p.R1 <= UNIT && !(p.given && n * static_cast<int64_t>(sizeof(T)) > NEAR);
    rows_joined = max_of(1, UNIT / p.R1);
    in_stat = joined ? ceil_div(p.R0, rows_joined) : p.R0 * units;
    // how runs are added up must not depend on the number of threads: given statistics, joined, take this way always
    const bool whole = threads == 1 || batches() >= 2 * threads || in_stat == 1 || (p.given && joined);
    Buffer<double> kept;
    if (sums_needed && !kept.allocate(2 * K * in_stat)) return NO_MEMORY;
    sums_g = kept.data, sums_gd = kept.data + K * in_stat;
    std::atomic<int> status{OK};
    if (whole && !(p.given && !joined)) {
      over_batches(threads, [&](int64_t k, int64_t many) {
        Buffer<A> park;
        const bool parked = sums_needed && can_park(n);
        if (parked && !park_into(park, many * n)) {
          status.store(NO_MEMORY);
          return;
        }
        Table table;
        if (sums_needed) {
          if (joined)
            for (int64_t j = 0; j < many; ++j)
              for (int64_t b = 0; b < in_stat; ++b) reduce_joined(k + j, b, parked, park.data, j);
          else
            over_all(k, many, [&](const Piece& q) { reduce(q, table, parked ? park_at(park.data, q) : nullptr); }, true);
        }
        if (!wants_inputs) return;
        double b[MANY], c[MANY];
        backs_of_sums(k, many, b, c);
        over_all(k, many, [&](const Piece& q) {
          unapply(q, table, b + (q.k - k), c + (q.k - k), parked ? park_at(park.data, q) : nullptr);
        });
      });
      if (status.load() != OK) return status.load();
    } else if (p.given) {
      const double none[CHUNK] = {};
      over_memory(threads, [&](const Piece& q) {
        Table table;
        if (sums_needed) reduce(q, table, nullptr);
        if (wants_inputs) unapply(q, table, none, none, nullptr);
      });
    } else {
      if (joined && sums_needed)
        parallel(K * in_stat, [&](int64_t i) { reduce_joined(i / in_stat, i % in_stat, false, nullptr, 0); });
      else if (sums_needed)
        over_memory(threads, [&](const Piece& q) {
          Table table;
          reduce(q, table, nullptr);
        });
      if (wants_inputs) {
        Buffer<double> backs;
        if (!backs.allocate(2 * K)) return NO_MEMORY;
        double* b = backs.data;
        double* c = backs.data + K;
        for (int64_t k = 0; k < K; k += MANY) backs_of_sums(k, min_of(MANY, K - k), b + k, c + k);
        over_memory(threads, [&](const Piece& q) {
          Table table;
          unapply(q, table, b + q.k, c + q.k, nullptr);
        });
      }
    }
    return wants_parameters ? store_sums() : OK;
  }

 private:
  const Problem& p;
  const Geometry& g;
  int64_t K, n, total, stride, per_block, pieces, piece, blocks, unit, units_seg, units, neighbours, batch, ahead, soon;
  double wide, per_weight;
  bool past;      // write past the caches
  bool shifting;  // VECTOR: runs start at different places of the period
  bool steady;    // the runs of a statistic have the same weights
  int kind = PLAIN;
  ApplyFn<T> apply_fn = nullptr;
  ReduceFn<T> reduce_fn = nullptr;
  ReduceVectorFn<T> reduce_vector_fn = nullptr;
  BackFn<T> back_fn = nullptr, parked_fn = nullptr;
  Parameters<A> weight, bias;

  // backward: sums of the runs (r0, k), or of their units; joined: of the rows (b, k)
  bool joined = false;
  int64_t rows_joined = 1, in_stat = 1;
  double* sums_g = nullptr;
  double* sums_gd = nullptr;

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

  // ---- the order of the work

  int64_t batches() const { return K / neighbours * ceil_div(neighbours, batch); }

  // Tasks of several batches, f(first statistic, how many).
  template <class F>
  void over_batches(int64_t threads, const F& f) const {
    const int64_t all = batches(), each = ceil_div(neighbours, batch);
    const int64_t group =
        total < PARALLEL ? all : max_of(1, min_of(TASK / max_of(batch * n, 1), all / (16 * threads)));
    parallel(ceil_div(all, group), [&](int64_t task) {
      const Fence fence{past};
      for (int64_t i = task * group; i < min_of(all, (task + 1) * group); ++i) {
        const int64_t first = i % each * batch;
        f(i / each * neighbours + first, min_of(batch, neighbours - first));
      }
    });
  }

  // Pieces of the same length, each with one statistic and one weight: piece j starts j * stride values after the
  // first and belongs to statistic k + j / each. They are runs from `run` on, or units from unit u of it on.
  struct Piece {
    int64_t at, len, count, stride;
    int64_t k, each, run, u;
    int64_t r0, bits;
    bool same;   // all have the same statistic and weight
    bool fresh;  // the table does not hold them yet
    int64_t park, park_stride;  // where the gradient before the activation is left, in a buffer of the batch
  };

  // All pieces of the statistics k, ..., k + many - 1, which are neighbours. separate: the runs of one statistic are not
  // pieces of one series.
  template <class F>
  EVENLY_INLINE void over_all(int64_t k, int64_t many, const F& f, bool separate = false) const {
    if (many == 1 && p.R0 > 1 && steady && units == 1 && !separate) {
      const int64_t run = run_of(k, 0);
      f(Piece{run * p.R1, p.R1, p.R0, stride, k, p.R0, run, 0, 0, p.K1 * g.bits_row, true, true, 0, p.R1});
      return;
    }
    for (int64_t r0 = 0; r0 < p.R0; ++r0) over_runs(k, many, r0, f);
  }

  template <class F>
  EVENLY_INLINE void over_runs(int64_t k, int64_t many, int64_t r0, const F& f, int64_t from = 0, int64_t to = -1) const {
    const int64_t run = run_of(k, r0);
    if (to < 0) to = units;
    if (units == 1 && !shifting) {
      f(Piece{run * p.R1, p.R1, many, p.R1, k, 1, run, 0, r0, g.bits_row, false, r0 == 0 || !steady, r0 * p.R1, n});
      return;
    }
    const bool complete = units_seg == 1 && from == 0 && to == units;
    if (p.R0 == 1 && g.nseg <= CHUNK && complete && !shifting) {  // all segments of as many runs as fit
      const int64_t at_once = CHUNK / g.nseg;
      for (int64_t j = 0; j < many; j += at_once)
        f(Piece{(run + j) * p.R1, g.seg, min_of(at_once, many - j) * g.nseg, g.seg, k + j, g.nseg, run + j, 0, r0,
                g.bits_row, false, true, j * n, g.seg});
      return;
    }
    for (int64_t j = 0; j < many; ++j) {
      const int64_t start = (run + j) * p.R1, park = j * n + r0 * p.R1;
      if (units_seg == 1 && !shifting) {
        for (int64_t u = from; u < to; u += CHUNK)
          f(Piece{start + u * g.seg, g.seg, min_of(CHUNK, to - u), g.seg, k + j, CHUNK, run + j, u, r0, g.bits_row, false,
                  true, park + u * g.seg, g.seg});
      } else {
        for (int64_t u = from; u < to; ++u) {
          const int64_t offset = segment(u) * g.seg + begin(u);
          f(Piece{start + offset, length(u), 1, 0, k + j, 1, run + j, u, r0, 0, true, true, park + offset, 0});
        }
      }
    }
  }

  // All pieces in the order of memory.
  template <class F>
  void over_memory(int64_t threads, const F& f) const {
    const int64_t runs = K * p.R0;
    auto k_of = [&](int64_t run) { return p.R0 == 1 ? run : run / (p.R0 * p.K1) * p.K1 + run % p.K1; };
    auto r0_of = [&](int64_t run) { return p.R0 == 1 ? 0 : run / p.K1 % p.R0; };
    auto divided = [&](int64_t all) { return ceil_div(max_of(1, all / TASK), threads) * threads; };
    const int64_t per_task = max_of(1, min_of(units, TASK / unit));
    const int64_t tasks_run = ceil_div(units, per_task);
    if (tasks_run > 1) {
      parallel(runs * tasks_run, [&](int64_t task) {
        const Fence fence{past};
        const int64_t run = task / tasks_run, from = (task % tasks_run) * per_task;
        over_runs(k_of(run), 1, r0_of(run), f, from, min_of(units, from + per_task));
      });
      return;
    }
    const int64_t runs_task = max_of(1, ceil_div(runs, divided(total)));
    parallel(ceil_div(runs, runs_task), [&](int64_t task) {
      const Fence fence{past};
      const int64_t end = min_of(runs, (task + 1) * runs_task);
      for (int64_t run = task * runs_task; run < end;) {
        const int64_t k = k_of(run), left = p.R0 == 1 ? K - k : p.K1 - k % p.K1;
        const int64_t many = min_of(min_of(CHUNK, end - run), left);
        over_runs(k, many, r0_of(run), [&](Piece q) __attribute__((always_inline)) {
          q.fresh = true;
          f(q);
        });
        run += many;
      }
    });
  }

  // ---- what the loops need, of each piece

  struct Table {
    A m[CHUNK], a[CHUNK], b[CHUNK];
    A r[CHUNK], rw[CHUNK], shift[CHUNK], slope[CHUNK];
    int64_t at = -1, count = 0;  // the pieces that m, a and b belong to
  };

  // Means, 1/scales and what rounding took from the means: one after the other, or one of each for all pieces.
  struct Numbers {
    const A *m, *r, *low;
    bool own;
  };

  // f(j, many, numbers, weights, biases) for the pieces j, ..., j + many - 1 of the first `count`. Weights and biases lie
  // one after the other.
  template <class F>
  EVENLY_INLINE void look_up(const Piece& q, int64_t count, const F& f) const {
    const A* s = static_cast<const A*>(p.stats) + q.k;
    A spread[3][CHUNK], one[CHUNK], zero[CHUNK];
    const bool has_w = g.mode != VECTOR && weight.at, has_b = g.mode != VECTOR && bias.at;
    if (!has_w)
      for (int64_t j = 0; j < count; ++j) one[j] = 1;
    if (!has_b)
      for (int64_t j = 0; j < count; ++j) zero[j] = 0;
    bool own = q.each == 1;
    if (q.each > 1 && q.each < 8 && q.each < count) {  // few pieces a statistic: each with numbers of its own
      for (int64_t j = 0, k = 0; j < count; ++k)
        for (const int64_t end = min_of(count, j + q.each); j < end; ++j)
          spread[0][j] = s[k], spread[1][j] = s[K + k], spread[2][j] = s[2 * K + k];
      own = true;
    }
    const bool spreads = own && q.each > 1;
    Numbers of{s, s + K, s + 2 * K, own};
    if (spreads) of = {spread[0], spread[1], spread[2], true};
    const bool one_each = p.wsize > 1 && (g.nseg > 1 || p.R1 == p.wdiv), none = !has_w && !has_b;
    int64_t i = none ? 0 : index_of(q.run, q.u), left = own ? count : q.each;
    for (int64_t j = 0; j < count;) {
      int64_t many = min_of(left, count - j);
      if (!none) many = one_each ? min_of(many, p.wsize - i) : 1;
      f(j, many, of, has_w ? weight.at + i : one, has_b ? bias.at + i : zero);
      j += many;
      if (j == count) return;
      const int64_t on = own ? many : (left -= many) == 0 ? (left = q.each, 1) : 0;
      of.m += on, of.r += on, of.low += on;
      if (one_each)
        i = i + many == p.wsize ? 0 : i + many;
      else if (!none)
        i = index_of(q.run + j, q.u);
    }
  }

  // Where the gradient before the activation is known without the rest of (x - m)*a + b.
  bool only_means() const { return p.dy && (kind == PLAIN || kind == SIGN_BITS) && g.mode == SCALAR; }
  // (x - m)*a + b
  template <bool OWN>
  EVENLY_INLINE void fill_some(int64_t many, const Numbers& of, const A* __restrict w, const A* __restrict bias,
                               bool lift, A* __restrict m, A* __restrict a, A* __restrict b) const {
    const A* __restrict mean = of.m;
    const A* __restrict rest = of.low;
    const A* __restrict gain = of.r;
    for (int64_t j = 0; j < many; ++j) {
      const int64_t i = OWN ? j : 0;
      const double r = gain[i], low = rest[i], shift = lift ? (static_cast<double>(mean[i]) + low) * r : 0;
      m[j] = mean[i];
      a[j] = gain[i] * w[j];
      b[j] = static_cast<A>((shift - low * r) * static_cast<double>(w[j]) + static_cast<double>(bias[j]));
    }
  }
  void fill(const Piece& q, Table& t) const {
    if (!q.fresh || (t.at == q.at && t.count == q.count)) return;
    t.at = q.at, t.count = q.count;
    const int64_t count = q.same ? 1 : q.count;
    if (only_means()) {
      const A* m = static_cast<const A*>(p.stats) + q.k;
      if (q.each == 1) std::memcpy(t.m, m, sizeof(A) * static_cast<size_t>(count));
      if (q.each > 1)
        for (int64_t j = 0; j < count; ++m)
          for (const int64_t end = min_of(count, j + q.each); j < end; ++j) t.m[j] = *m;
      return;
    }
    const bool lift = !p.center && p.scale == SCALE_STD && !p.given;
    look_up(q, count, [&](int64_t j, int64_t many, const Numbers& of, const A* w, const A* bias) {
      if (of.own)
        fill_some<true>(many, of, w, bias, lift, t.m + j, t.a + j, t.b + j);
      else
        fill_some<false>(many, of, w, bias, lift, t.m + j, t.a + j, t.b + j);
    });
  }
  // g*rw + (x - m)*r*slope + shift
  template <bool OWN>
  EVENLY_INLINE void fill_back_some(int64_t many, const A* __restrict gain, const A* __restrict w, A* __restrict r,
                                    A* __restrict rw) const {
    for (int64_t j = 0; j < many; ++j) {
      const A one = gain[OWN ? j : 0];
      r[j] = one, rw[j] = one * w[j];
    }
  }
  void fill_back(const Piece& q, Table& t, const double* b, const double* c) const {
    const int64_t count = q.same ? 1 : q.count;
    look_up(q, count, [&](int64_t j, int64_t many, const Numbers& of, const A* w, const A*) {
      if (of.own)
        fill_back_some<true>(many, of.r, w, t.r + j, t.rw + j);
      else
        fill_back_some<false>(many, of.r, w, t.r + j, t.rw + j);
    });
    if (q.each == 1) {
      for (int64_t j = 0; j < count; ++j) t.slope[j] = static_cast<A>(b[j]), t.shift[j] = static_cast<A>(c[j]);
      return;
    }
    for (int64_t j = 0; j < count; ++b, ++c)
      for (const int64_t end = min_of(count, j + q.each); j < end; ++j)
        t.slope[j] = static_cast<A>(*b), t.shift[j] = static_cast<A>(*c);
  }

  EVENLY_INLINE Coefficients<T> coefficients(const Piece& q, const Table& t) const {
    Coefficients<T> k{};
    k.m = t.m[0], k.a = t.a[0], k.b = t.b[0];
    if (g.mode == VECTOR) {
      const int64_t at = period_at(q.run, q.u);
      k.wv = weight.at + at;
      k.bv = bias.at + at;
    }
    return k;
  }
  EVENLY_INLINE Series<T> series(const Piece& q, const Table& t) const {
    Series<T> s;
    s.many = q.count, s.stride = q.stride, s.bits_stride = q.bits;
    if (!q.same) s.m = t.m, s.a = t.a, s.b = t.b;
    return s;
  }

  // VECTOR: where in the period a unit starts.
  EVENLY_INLINE int64_t period_at(int64_t run, int64_t u) const {
    return g.seg == g.period ? begin(u) : (run * p.R1 + begin(u)) % g.period;
  }

  EVENLY_INLINE Run<T> run_at(const Piece& q) const {
    Run<T> r{};
    r.x = static_cast<const T*>(p.x) + q.at;
    if (p.residual) r.residual = static_cast<const T*>(p.residual) + q.at;
    if (p.y) r.y = static_cast<T*>(p.y) + q.at;
    if (p.bits) r.bits = p.bits + (q.run * g.nseg + segment(q.u)) * g.bits_row + begin(q.u) / 8;
    if (p.dy) r.dy = static_cast<const T*>(p.dy) + q.at;
    if (p.dx) r.dx = static_cast<T*>(p.dx) + q.at;
    if (p.dresidual) r.dresidual = static_cast<T*>(p.dresidual) + q.at;
    r.ahead = ahead, r.soon = soon, r.past = past;
    return r;
  }

  // ---- forward

  // Where block b of statistic k starts.
  EVENLY_INLINE int64_t block_at(int64_t k, int64_t b) const {
    if (p.R1 <= BLOCK) return run_of(k, b * per_block) * p.R1;
    return run_of(k, b / pieces) * p.R1 + b % pieces * piece;
  }

  void measure_block(int64_t k, int64_t b, bool raw, Moments& mo) const {
    const int64_t at = block_at(k, b);
    int64_t next = 0;
    if (soon) next = (b + 1 < blocks ? block_at(k, b + 1) : k + 1 < K ? block_at(k + 1, 0) : at) - at;
    const T* x = static_cast<const T*>(p.x) + at;
    if (p.R1 <= BLOCK)
      moments_block(x, min_of(per_block, p.R0 - b * per_block), stride, p.R1, raw, next, mo);
    else
      moments_block(x, 1, 0, min_of(piece, p.R1 - b % pieces * piece), raw, next, mo);
  }

  void measure_batch(int64_t k, int64_t many, bool raw) const {
    if (blocks == 1) {
      double mean[MANY], m2[MANY];
      const T* x = static_cast<const T*>(p.x) + run_of(k, 0) * p.R1;
      const int64_t next = soon && (!ahead || !p.y) && k + many < K ? many * p.R1 : 0;
      moments_many(x, many, p.R1, p.R0, stride, p.R1, raw, next, mean, m2);
      finish_many<A>(p, k, many, wide, mean, m2, raw);
      return;
    }
    for (int64_t j = 0; j < many; ++j) {
      Moments mo;
      for (int64_t b = 0; b < blocks; ++b) measure_block(k + j, b, raw, mo);
      finish<A>(p, k + j, mo, raw);
    }
  }

  EVENLY_INLINE void apply(const Piece& q, Table& table) const {
    fill(q, table);
    apply_fn(run_at(q), q.len, coefficients(q, table), series(q, table));
  }

  // ---- backward

  // The gradient before an activation that is dear to compute is left for the second pass: in dresidual or dx where
  // they have the accumulation type and are read back from the cache, else in a buffer if the statistic's values are few.
  bool in_output() const { return sizeof(T) == sizeof(A) && !past; }
  bool can_park(int64_t values) const {
    if (kind < SILU) return false;
    return in_output() ? p.dresidual || p.dx : values <= PARK;
  }
  bool park_into(Buffer<A>& park, int64_t values) const { return in_output() || park.allocate(values); }
  A* parked_output(int64_t at) const { return static_cast<A*>(p.dresidual ? p.dresidual : p.dx) + at; }
  A* park_at(A* park, const Piece& q) const { return in_output() ? parked_output(q.at) : park + q.park; }
  int64_t park_stride(const Piece& q) const { return in_output() ? q.stride : q.park_stride; }

  EVENLY_INLINE void reduce(const Piece& q, Table& table, A* park) const {
    fill(q, table);
    const int64_t to = (q.r0 * K + q.k) * units + q.u;
    reduce_fn(run_at(q), q.len, coefficients(q, table), series(q, table), false, park, park_stride(q), sums_g + to,
              sums_gd + to);
  }

  // The runs of statistic k from block b on; it is the j-th of its batch.
  void reduce_joined(int64_t k, int64_t b, bool parked, A* park, int64_t j) const {
    const int64_t r0 = b * rows_joined, run = run_of(k, r0), rows = min_of(rows_joined, p.R0 - r0);
    const Piece q{run * p.R1, p.R1, rows, stride, k, rows, run, 0, r0, p.K1 * g.bits_row, true, true, j * n + r0 * p.R1,
                  p.R1};
    Table table;
    fill(q, table);
    const int64_t to = b * K + k;
    reduce_fn(run_at(q), q.len, coefficients(q, table), series(q, table), true, parked ? park_at(park, q) : nullptr,
              park_stride(q), sums_g + to, sums_gd + to);
  }

  // Sums with weights (or without), in four chains of additions each.
  static EVENLY_INLINE void add_products(const A* w, const double* s, const double* d, int64_t n, double& sum_s,
                                         double& sum_d) {
    constexpr int CHAINS = 4;
    int64_t i = 0;
    if (n < CHAINS) {
      for (; i < n; ++i) {
        const double one = w ? static_cast<double>(w[i]) : 1.0;
        sum_s += one * s[i], sum_d += one * d[i];
      }
      return;
    }
    double a[CHAINS] = {}, b[CHAINS] = {};
    for (; i + CHAINS <= n; i += CHAINS)
      for (int c = 0; c < CHAINS; ++c) {
        const double one = w ? static_cast<double>(w[i + c]) : 1.0;
        a[c] += one * s[i + c], b[c] += one * d[i + c];
      }
    for (; i < n; ++i) {
      const double one = w ? static_cast<double>(w[i]) : 1.0;
      a[0] += one * s[i], b[0] += one * d[i];
    }
    sum_s += (a[0] + a[1]) + (a[2] + a[3]), sum_d += (b[0] + b[1]) + (b[2] + b[3]);
  }

  // From the sums of the pieces of the statistics k, ..., k + many - 1.
  void backs_of_sums(int64_t k, int64_t many, double* b, double* c) const {
    double sum[2][MANY] = {};  // of no use where statistics are given
    if (!p.given && (joined || units == 1)) {
      for (int64_t r = 0; r < in_stat; ++r) {
        const double* one = sums_g + r * K + k;
        const double* one_d = sums_gd + r * K + k;
        if (steady) {
          for (int64_t j = 0; j < many; ++j) sum[0][j] += one[j], sum[1][j] += one_d[j];
        } else {
          for (int64_t j = 0; j < many; ++j) {
            const double w = weight_at(index_of(run_of(k + j, r), 0));
            sum[0][j] += w * one[j], sum[1][j] += w * one_d[j];
          }
        }
      }
      if (steady && weight.at) {
        const int64_t i = index_of(run_of(k, 0), 0);
        const bool together = p.wsize > 1 && p.R1 == p.wdiv && i + many <= p.wsize && (p.R0 == 1 || k % p.K1 + many <= p.K1);
        for (int64_t j = 0; j < many; ++j) {
          const double w = weight.at[together ? i + j : index_of(run_of(k + j, 0), 0)];
          sum[0][j] *= w, sum[1][j] *= w;
        }
      }
    } else if (!p.given) {
      const bool one_each = units_seg == 1 && p.wsize > 1;
      const bool few = one_each && p.R0 == 1 && units < 8 && p.wsize % units == 0;
      if (few) {
        const double* one = sums_g + k * units;
        const double* one_d = sums_gd + k * units;
        for (int64_t j = 0, i = index_of(run_of(k, 0), 0); j < many; ++j, i = i + units == p.wsize ? 0 : i + units)
          for (int64_t u = 0; u < units; ++u, ++one, ++one_d) {
            const double w = weight_at(i + u);
            sum[0][j] += w * *one, sum[1][j] += w * *one_d;
          }
      }
      for (int64_t j = 0; j < many && !few; ++j)
        for (int64_t r0 = 0; r0 < p.R0; ++r0) {
          const int64_t run = run_of(k + j, r0);
          const double* one = sums_g + (r0 * K + k + j) * units;
          const double* one_d = sums_gd + (r0 * K + k + j) * units;
          int64_t i = index_of(run, 0);
          if (!one_each) {
            for (int64_t u = 0; u < units; i = index_of(run, ++u)) {
              const double w = weight_at(i);
              sum[0][j] += w * one[u], sum[1][j] += w * one_d[u];
            }
            continue;
          }
          for (int64_t u = 0; u < units;) {
            const int64_t more = min_of(units - u, p.wsize - i);
            add_products(weight.at ? weight.at + i : nullptr, one + u, one_d + u, more, sum[0][j], sum[1][j]);
            u += more, i = 0;
          }
        }
    }
    backs_of<A>(p, k, many, wide, sum[0], sum[1], b, c);
  }

  // b, c: of the first piece's statistic and those after it.
  EVENLY_INLINE void unapply(const Piece& q, Table& table, const double* b, const double* c, const A* park) const {
    fill(q, table);
    if (q.fresh) fill_back(q, table, b, c);
    BackCoefficients<T> e{};
    e.r = table.r[0], e.rw = table.rw[0], e.b = table.slope[0], e.c = table.shift[0];
    e.given = p.given;
    BackTable<A> each;
    if (!q.same) each = {table.r, table.rw, table.slope, table.shift};
    (park ? parked_fn : back_fn)(run_at(q), q.len, coefficients(q, table), e, series(q, table), each, park, park_stride(q));
  }

  // The gradients of parameters from the sums of all pieces.
  int store_sums() const {
    Buffer<double> sums;
    if (!sums.zeros(2 * p.wsize)) return NO_MEMORY;
    double* __restrict dw = sums.data;
    double* __restrict db = sums.data + p.wsize;
    const A* __restrict s = static_cast<const A*>(p.stats);
    const double* __restrict sums_g = this->sums_g;
    const double* __restrict sums_gd = this->sums_gd;
    const bool lift = !p.center && p.scale == SCALE_STD && !p.given;
    auto add = [&](int64_t i, int64_t k, int64_t at) __attribute__((always_inline)) {
      const double m = s[k], r = s[K + k], low = s[2 * K + k], shift = lift ? (m + low) * r : 0;
      dw[i] += r * sums_gd[at] + (shift - low * r) * sums_g[at];
      db[i] += sums_g[at];
    };
    // in the order of memory: (r0, k, u), a statistic each `units` sums
    const int64_t rows = joined ? in_stat : p.R0, each = joined ? 1 : units;
    const bool one_each = p.wsize > 1 && units_seg == 1 && (g.nseg > 1 || p.R1 == p.wdiv);
    for (int64_t r0 = 0; r0 < rows; ++r0)
      for (int64_t k = 0; k < K;) {
        const int64_t run = run_of(k, joined ? 0 : r0), at = (r0 * K + k) * each;
        if (each == 1) {
          int64_t i = index_of(run, 0), many = 1;
          if (one_each) many = min_of(p.wsize - i, (p.R0 == 1 ? K : p.K1 - k % p.K1 + k) - k);
          for (int64_t j = 0; j < many; ++j) add(i + j, k + j, at + j);
          k += many;
        } else {
          if (one_each && each < MANY && p.R0 == 1 && p.wsize % each == 0) {  // several statistics at a time
            const int64_t i = index_of(run, 0), many = min_of((p.wsize - i) / each, min_of(K - k, MANY));
            double r[MANY * MANY], c[MANY * MANY];
            for (int64_t j = 0; j < many; ++j) {
              const double m = s[k + j], one = s[K + k + j], low = s[2 * K + k + j];
              const double shift = (lift ? (m + low) * one : 0) - low * one;
              for (int64_t u = 0; u < each; ++u) r[j * each + u] = one, c[j * each + u] = shift;
            }
            for (int64_t j = 0; j < many * each; ++j) {
              dw[i + j] += r[j] * sums_gd[at + j] + c[j] * sums_g[at + j];
              db[i + j] += sums_g[at + j];
            }
            k += many - 1;
          } else if (one_each) {
            int64_t i = index_of(run, 0);
            for (int64_t u = 0; u < each;) {
              const int64_t many = min_of(p.wsize - i, each - u);
              for (int64_t j = 0; j < many; ++j) add(i + j, k, at + u + j);
              u += many, i = 0;
            }
          } else {
            for (int64_t u = 0; u < each; ++u) add(index_of(run, u), k, at + u);
          }
          ++k;
        }
      }
    store_parameters(p.dweight, p.wdtype, 0, p.wsize, dw);
    store_parameters(p.dbias, p.wdtype, 0, p.wsize, db);
    return OK;
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
    std::atomic<int> status{OK};
    parallel(parts, [&](int64_t part) {
      const Fence fence{past};
      A* dw = direct ? static_cast<A*>(p.dweight) : partial.data + 2 * part * g.period;
      A* db = direct ? static_cast<A*>(p.dbias) : dw + g.period;
      Buffer<A> park;
      const bool parked = can_park(n);
      if (parked && !park_into(park, batch * n)) {
        status.store(NO_MEMORY);
        return;
      }
      const int64_t last = (part + 1) * K / parts;
      for (int64_t k = part * K / parts; k < last;) {
        const int64_t many = min_of(min_of(batch, last - k), neighbours - k % neighbours);
        Table table;
        double sum[2][MANY] = {};
        over_all(k, many, [&](const Piece& q) {
          double one[2][CHUNK];
          fill(q, table);
          const int64_t at = period_at(q.run, q.u);
          // pieces of a statistic share their sums
          for (int64_t done = 0; done < q.count; done += CHUNK) {
            const int64_t count = min_of(CHUNK, q.count - done);
            Series<T> these = series(q, table);
            these.many = count;
            Piece from = q;
            from.at += done * q.stride, from.park += done * q.park_stride;
            Run<T> run = run_at(from);
            if (run.bits) run.bits += done * q.bits;
            reduce_vector_fn(run, q.len, coefficients(q, table), these, parked ? park_at(park.data, from) : nullptr,
                             park_stride(q), one[0], one[1], dw + at, db + at);
            for (int64_t j = 0; j < count; ++j) {
              const int64_t of = q.k - k + (q.each == 1 ? j : (done + j) / q.each);
              sum[0][of] += one[0][j];
              sum[1][of] += one[1][j];
            }
          }
        });
        if (p.dx || p.dresidual) {
          double b[MANY], c[MANY];
          backs_of<A>(p, k, many, wide, sum[0], sum[1], b, c);
          over_all(k, many, [&](const Piece& q) {
            unapply(q, table, b + (q.k - k), c + (q.k - k), parked ? park_at(park.data, q) : nullptr);
          });
        }
        k += many;
      }
    });
    if (status.load() != OK) return status.load();
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
