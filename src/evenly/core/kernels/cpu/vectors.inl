// Vectors of one register: loads, stores, conversions and the functions that the kernels need.
// GCC and Clang vector extensions; intrinsics only where the extension has no word for it.

#if defined(__AVX512F__)
#define EVENLY_VB 64
#elif defined(__AVX__)
#define EVENLY_VB 32
#else
#define EVENLY_VB 16
#endif

typedef float vf __attribute__((vector_size(EVENLY_VB)));
typedef int32_t vi __attribute__((vector_size(EVENLY_VB)));
typedef uint32_t vu __attribute__((vector_size(EVENLY_VB)));
typedef double vd __attribute__((vector_size(EVENLY_VB)));
typedef int64_t vl __attribute__((vector_size(EVENLY_VB)));
typedef float vfh __attribute__((vector_size(EVENLY_VB / 2)));
typedef uint16_t vh __attribute__((vector_size(EVENLY_VB / 2)));

constexpr int WF = EVENLY_VB / 4;
constexpr int WD = EVENLY_VB / 8;

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

#define EVENLY_INLINE inline __attribute__((always_inline))

template <class To, class From>
EVENLY_INLINE To as(From v) {
  static_assert(sizeof(To) == sizeof(From), "");
  To out;
  __builtin_memcpy(&out, &v, sizeof(To));
  return out;
}

template <class V, class S>
EVENLY_INLINE V raw_load(const S* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
// PAST: past the caches, so that the line need not be read before it is written; p must be a multiple of the vector.
template <bool PAST = false, class V, class S>
EVENLY_INLINE void raw_store(S* p, V v) {
#if defined(__AVX512F__)
  if constexpr (PAST && sizeof(V) == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), as<__m512i>(v));
#endif
#if defined(__AVX__)
  if constexpr (PAST && sizeof(V) == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), as<__m256i>(v));
#endif
#if defined(__SSE2__)
  if constexpr (PAST && sizeof(V) == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), as<__m128i>(v));
#endif
  __builtin_memcpy(p, &v, sizeof(V));
}
// What was written past the caches is seen by others from here on.
EVENLY_INLINE void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

EVENLY_INLINE vf splat(float s) { return s - vf{}; }
EVENLY_INLINE vd splat(double s) { return s - vd{}; }
EVENLY_INLINE vi splat(int32_t s) { return s - vi{}; }

// ---- half precision -------------------------------------------------------------------------------------------

EVENLY_INLINE vf widen_bf16(vh h) {
#if defined(__AVX512F__)
  return as<vf>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(as<__m256i>(h)), 16));
#elif defined(__AVX2__)
  return as<vf>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(as<__m128i>(h)), 16));
#else
  return as<vf>(__builtin_convertvector(h, vu) << 16);
#endif
}

EVENLY_INLINE vh narrow_bf16(vf v) {
#if defined(__AVX512BF16__)
  return as<vh>(_mm512_cvtneps_pbh(as<__m512>(v)));
#elif defined(__AVX512F__)
  const __m512i u = as<__m512i>(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7fff));
  const __mmask16 nan = _mm512_cmp_ps_mask(as<__m512>(v), as<__m512>(v), _CMP_UNORD_Q);
  const __m512i r = _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7fc0));
  return as<vh>(_mm512_cvtepi32_epi16(r));
#elif defined(__AVX2__)
  const __m256i u = as<__m256i>(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7fff));
  const __m256i nan = as<__m256i>(_mm256_cmp_ps(as<__m256>(v), as<__m256>(v), _CMP_UNORD_Q));
  const __m256i r = _mm256_srli_epi32(_mm256_or_si256(up, nan), 16);
  return as<vh>(_mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1)));
#else
  vu u = as<vu>(v);
  vu rounded = u + 0x7fffu + ((u >> 16) & 1u);
  vu nan = as<vu>(v != v);
  rounded = (rounded & ~nan) | (nan & 0x7fc00000u);
  return __builtin_convertvector(rounded >> 16, vh);
#endif
}

EVENLY_INLINE vf widen_f16(vh h) {
#if defined(__AVX512F__)
  return as<vf>(_mm512_cvtph_ps(as<__m256i>(h)));
#elif defined(__F16C__) && defined(__AVX__)
  return as<vf>(_mm256_cvtph_ps(as<__m128i>(h)));
#else
  vu u = __builtin_convertvector(h, vu);
  vu o = (u & 0x7fffu) << 13;
  const vu top = vu{} + (0x7c00u << 13);
  vu e = o & top;
  vu normal = o + ((127u - 15u) << 23);
  vu special = normal + ((128u - 16u) << 23);
  vu tiny = as<vu>(as<vf>(normal + (1u << 23)) - as<vf>(vu{} + (113u << 23)));
  vu is_special = as<vu>(e == top), is_tiny = as<vu>(e == vu{});
  vu r = (special & is_special) | (tiny & is_tiny) | (normal & ~(is_special | is_tiny));
  return as<vf>(r | ((u & 0x8000u) << 16));
#endif
}

EVENLY_INLINE vh narrow_f16(vf v) {
#if defined(__AVX512F__)
  return as<vh>(_mm512_cvtps_ph(as<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__) && defined(__AVX__)
  return as<vh>(_mm256_cvtps_ph(as<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  vu u = as<vu>(v);
  vu sign = u & 0x80000000u;
  u ^= sign;
  const vu magic = vu{} + ((127u - 15u + 23u - 10u + 1u) << 23);
  vu tiny = as<vu>(as<vf>(u) + as<vf>(magic)) - magic;
  vu normal = (u + ((15u - 127u) << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
  vu is_nan = as<vu>(u > (vu{} + 0x7f800000u));
  vu large = (is_nan & 0x7e00u) | (~is_nan & 0x7c00u);
  vu is_large = as<vu>(u >= (vu{} + ((127u + 16u) << 23)));
  vu is_tiny = as<vu>(u < (vu{} + (113u << 23)));
  vu r = (large & is_large) | (tiny & is_tiny) | (normal & ~(is_large | is_tiny));
  return __builtin_convertvector(r | (sign >> 16), vh);
#endif
}

// ---- one trait a storage type ---------------------------------------------------------------------------------
// A: type of statistics and arithmetic; V: its vector; M: a comparison of two V; W: lanes.

template <class T>
struct Tr;

template <>
struct Tr<float> {
  using A = float;
  using V = vf;
  using M = vi;
  static constexpr int W = WF;
  static EVENLY_INLINE V load(const float* p) { return raw_load<V>(p); }
  template <bool PAST = false>
  static EVENLY_INLINE void store(float* p, V v) {
    raw_store<PAST>(p, v);
  }
};
template <>
struct Tr<double> {
  using A = double;
  using V = vd;
  using M = vl;
  static constexpr int W = WD;
  static EVENLY_INLINE V load(const double* p) { return raw_load<V>(p); }
  template <bool PAST = false>
  static EVENLY_INLINE void store(double* p, V v) {
    raw_store<PAST>(p, v);
  }
};
template <>
struct Tr<bf16> {
  using A = float;
  using V = vf;
  using M = vi;
  static constexpr int W = WF;
  static EVENLY_INLINE V load(const bf16* p) { return widen_bf16(raw_load<vh>(p)); }
  template <bool PAST = false>
  static EVENLY_INLINE void store(bf16* p, V v) {
    raw_store<PAST>(p, narrow_bf16(v));
  }
};
template <>
struct Tr<f16> {
  using A = float;
  using V = vf;
  using M = vi;
  static constexpr int W = WF;
  static EVENLY_INLINE V load(const f16* p) { return widen_f16(raw_load<vh>(p)); }
  template <bool PAST = false>
  static EVENLY_INLINE void store(f16* p, V v) {
    raw_store<PAST>(p, narrow_f16(v));
  }
};

// The first n < W lanes; the others are zero.
template <class T>
EVENLY_INLINE typename Tr<T>::V load_part(const T* p, int n) {
  T buffer[Tr<T>::W];
  __builtin_memset(buffer, 0, sizeof(buffer));
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return Tr<T>::load(buffer);
}
template <class T>
EVENLY_INLINE void store_part(T* p, typename Tr<T>::V v, int n) {
  T buffer[Tr<T>::W];
  Tr<T>::store(buffer, v);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}

// Halves, a few at once: through registers, since memory that was written in pieces is slow to read as a whole.
EVENLY_INLINE uint64_t few_halves(const uint16_t* p, int n) {
  uint32_t two = 0;
  uint16_t one = 0;
  if (n & 2) __builtin_memcpy(&two, p, 4);
  if (n & 1) __builtin_memcpy(&one, p + (n & 2), 2);
  return n & 2 ? two | static_cast<uint64_t>(one) << 32 : one;
}
EVENLY_INLINE void few_halves_to(uint16_t* p, uint64_t v, int n) {
  if (n & 2) {
    const uint32_t two = static_cast<uint32_t>(v);
    __builtin_memcpy(p, &two, 4);
    v >>= 32;
  }
  if (n & 1) {
    const uint16_t one = static_cast<uint16_t>(v);
    __builtin_memcpy(p + (n & 2), &one, 2);
  }
}
#if defined(__AVX512F__)
EVENLY_INLINE vh load_halves(const uint16_t* p, int n) {
  return as<vh>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1u), p));
}
EVENLY_INLINE void store_halves(uint16_t* p, vh v, int n) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1u), as<__m256i>(v));
}
#else
EVENLY_INLINE vh load_halves(const uint16_t* p, int n) {
  uint64_t part[EVENLY_VB / 16] = {};
  int done = 0, at = 0;
  for (; done + 4 <= n; done += 4, ++at) __builtin_memcpy(&part[at], p + done, 8);
  if (done < n) part[at] = few_halves(p + done, n - done);
#if EVENLY_VB == 32
  return as<vh>(_mm_set_epi64x(static_cast<long long>(part[1]), static_cast<long long>(part[0])));
#else
  return raw_load<vh>(part);
#endif
}
EVENLY_INLINE void store_halves(uint16_t* p, vh v, int n) {
  uint64_t part[EVENLY_VB / 16];
  raw_store(part, v);
  int done = 0, at = 0;
  for (; done + 4 <= n; done += 4, ++at) __builtin_memcpy(p + done, &part[at], 8);
  if (done < n) few_halves_to(p + done, part[at], n - done);
}
#endif
template <>
EVENLY_INLINE vf load_part<bf16>(const bf16* p, int n) {
  return widen_bf16(load_halves(reinterpret_cast<const uint16_t*>(p), n));
}
template <>
EVENLY_INLINE void store_part<bf16>(bf16* p, vf v, int n) {
  store_halves(reinterpret_cast<uint16_t*>(p), narrow_bf16(v), n);
}
template <>
EVENLY_INLINE vf load_part<f16>(const f16* p, int n) {
  return widen_f16(load_halves(reinterpret_cast<const uint16_t*>(p), n));
}
template <>
EVENLY_INLINE void store_part<f16>(f16* p, vf v, int n) {
  store_halves(reinterpret_cast<uint16_t*>(p), narrow_f16(v), n);
}

#if defined(__AVX2__) && !defined(__AVX512F__)
alignas(64) const int32_t lane_table[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
template <>
EVENLY_INLINE vf load_part<float>(const float* p, int n) {
  return as<vf>(_mm256_maskload_ps(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lane_table + 8 - n))));
}
template <>
EVENLY_INLINE void store_part<float>(float* p, vf v, int n) {
  // in powers of two: a masked store is a short program on some processors
  __m128 part = _mm256_castps256_ps128(as<__m256>(v));
  if (n & 4) {
    _mm_storeu_ps(p, part);
    part = _mm256_extractf128_ps(as<__m256>(v), 1);
    p += 4;
  }
  if (n & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p), part);
    part = _mm_movehl_ps(part, part);
    p += 2;
  }
  if (n & 1) _mm_store_ss(p, part);
}
#elif defined(__AVX512F__)
template <>
EVENLY_INLINE vf load_part<float>(const float* p, int n) {
  return as<vf>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p));
}
template <>
EVENLY_INLINE void store_part<float>(float* p, vf v, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), as<__m512>(v));
}
template <>
EVENLY_INLINE vd load_part<double>(const double* p, int n) {
  return as<vd>(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1u), p));
}
template <>
EVENLY_INLINE void store_part<double>(double* p, vd v, int n) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1u), as<__m512d>(v));
}
#endif

// Two vectors. MIX: in any order of lanes, the same for all pointers of a storage type.
template <bool MIX, class T>
EVENLY_INLINE void load_two(const T* p, typename Tr<T>::V& a, typename Tr<T>::V& b) {
  a = Tr<T>::load(p);
  b = Tr<T>::load(p + Tr<T>::W);
}
#if defined(__AVX512BF16__)
// One instruction packs two vectors in order.
template <bool PAST>
EVENLY_INLINE void store_packed(bf16* p, vf a, vf b) {
  raw_store<PAST>(p, as<vi>(_mm512_cvtne2ps_pbh(as<__m512>(b), as<__m512>(a))));
}
#else
// A bfloat16 in the upper half; what is below has no meaning.
EVENLY_INLINE vu rounded_bf16(vf v) {
  const vu u = as<vu>(v);
  return (u + ((u >> 16) & 1u) + 0x7fffu) | as<vu>(v != v);
}
template <>
EVENLY_INLINE void load_two<true, bf16>(const bf16* p, vf& a, vf& b) {
  const vu both = raw_load<vu>(p);
  a = as<vf>(both << 16);
  b = as<vf>(both & 0xffff0000u);
}
#endif
template <bool MIX, bool PAST, class T>
EVENLY_INLINE void store_two_of(T* p, typename Tr<T>::V a, typename Tr<T>::V b) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>) return store_packed<PAST>(p, a, b);
#else
  if constexpr (MIX && std::is_same_v<T, bf16>)
    return raw_store<PAST>(p, (rounded_bf16(a) >> 16) | (rounded_bf16(b) & 0xffff0000u));
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (std::is_same_v<T, bf16>) {
    const __m256i x = as<__m256i>(rounded_bf16(a) >> 16), y = as<__m256i>(rounded_bf16(b) >> 16);
    return raw_store<PAST>(p, _mm256_permute4x64_epi64(_mm256_packus_epi32(x, y), 0xd8));
  }
#endif
  Tr<T>::template store<PAST>(p, a);
  Tr<T>::template store<PAST>(p + Tr<T>::W, b);
}
// past: past the caches, where p allows it.
template <bool MIX, class T>
EVENLY_INLINE void store_two(T* p, typename Tr<T>::V a, typename Tr<T>::V b, bool past) {
  if (past && reinterpret_cast<uintptr_t>(p) % EVENLY_VB == 0)
    store_two_of<MIX, true>(p, a, b);
  else
    store_two_of<MIX, false>(p, a, b);
}

// The first n <= W lanes, where n is W everywhere but at the end of a run.
template <class T>
EVENLY_INLINE typename Tr<T>::V take(const T* p, int n) {
  return n == Tr<T>::W ? Tr<T>::load(p) : load_part(p, n);
}
template <class T>
EVENLY_INLINE void put(T* p, typename Tr<T>::V v, int n) {
  if (n == Tr<T>::W)
    Tr<T>::store(p, v);
  else
    store_part(p, v, n);
}

// All ones in the first n lanes.
template <class T>
EVENLY_INLINE typename Tr<T>::M first_lanes(int n);
template <>
EVENLY_INLINE vi first_lanes<float>(int n) {
#if defined(__AVX512F__)
  return as<vi>(_mm512_movm_epi32(static_cast<__mmask16>((1u << n) - 1u)));
#endif
  vi index;
  for (int i = 0; i < WF; ++i) index[i] = i;
  return as<vi>(index < splat(static_cast<int32_t>(n)));
}
template <>
EVENLY_INLINE vl first_lanes<double>(int n) {
#if defined(__AVX512F__)
  return as<vl>(_mm512_movm_epi64(static_cast<__mmask8>((1u << n) - 1u)));
#endif
  vl index;
  for (int i = 0; i < WD; ++i) index[i] = i;
  return as<vl>(index < (static_cast<int64_t>(n) - vl{}));
}

EVENLY_INLINE vf keep(vi m, vf v) { return as<vf>(m & as<vi>(v)); }
EVENLY_INLINE vd keep(vl m, vd v) { return as<vd>(m & as<vl>(v)); }
EVENLY_INLINE vf choose(vi m, vf a, vf b) { return as<vf>((m & as<vi>(a)) | (~m & as<vi>(b))); }
EVENLY_INLINE vd choose(vl m, vd a, vd b) { return as<vd>((m & as<vl>(a)) | (~m & as<vl>(b))); }

#if defined(__AVX__)
EVENLY_INLINE __m256d folded(vd v) {  // four lanes
  __m256d part[sizeof(vd) / 32];
  __builtin_memcpy(part, &v, sizeof(v));
  return sizeof(vd) == 64 ? _mm256_add_pd(part[0], part[sizeof(vd) / 32 - 1]) : part[0];
}
#endif
EVENLY_INLINE double sum_lanes(vd v) {
#if defined(__AVX__)
  const __m256d u = folded(v);
  const __m128d h = _mm_add_pd(_mm256_castpd256_pd128(u), _mm256_extractf128_pd(u, 1));
  return _mm_cvtsd_f64(_mm_add_sd(h, _mm_unpackhi_pd(h, h)));
#endif
  double s[WD];
  raw_store(s, v);
  for (int step = WD / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) s[i] += s[i + step];
  return s[0];
}
// Lanes in double, two to one where there are twice as many.
EVENLY_INLINE vd widened(vd v) { return v; }
EVENLY_INLINE vd widened(vf v) {
#if defined(__AVX512F__)
  __m256 half[2];
  __builtin_memcpy(half, &v, sizeof(v));
  return as<vd>(_mm512_maskz_cvtps_pd(0xff, half[0])) + as<vd>(_mm512_maskz_cvtps_pd(0xff, half[1]));
#else
  vfh half[2];
  __builtin_memcpy(half, &v, sizeof(v));
  return __builtin_convertvector(half[0], vd) + __builtin_convertvector(half[1], vd);
#endif
}
EVENLY_INLINE double sum_lanes(vf v) { return sum_lanes(widened(v)); }
// In the type itself, for what need not be exact.
template <class V>
EVENLY_INLINE auto rough_sum(V v) {
  typedef decltype(v[0] + v[0]) S;
  if constexpr (sizeof(V) > 16) {
    struct Halves {
      typedef S half __attribute__((vector_size(sizeof(V) / 2)));
      half of[2];
    };
    const Halves h = as<Halves>(v);
    return rough_sum(h.of[0] + h.of[1]);
  } else {
    S sum = v[0];
    for (size_t i = 1; i < sizeof(V) / sizeof(S); ++i) sum += v[i];
    return sum;
  }
}
// The sums of two vectors, which cost little more than one.
EVENLY_INLINE void sum_lanes(vd a, vd b, double& sum_a, double& sum_b) {
#if defined(__AVX__)
  const __m256d pairs = _mm256_hadd_pd(folded(a), folded(b));
  const __m128d both = _mm_add_pd(_mm256_castpd256_pd128(pairs), _mm256_extractf128_pd(pairs, 1));
  sum_a = _mm_cvtsd_f64(both);
  sum_b = _mm_cvtsd_f64(_mm_unpackhi_pd(both, both));
#else
  sum_a = sum_lanes(a), sum_b = sum_lanes(b);
#endif
}
EVENLY_INLINE void sum_lanes(vf a, vf b, double& sum_a, double& sum_b) {
  sum_lanes(widened(a), widened(b), sum_a, sum_b);
}

// The sums of as many vectors as one has lanes, each added up as by sum_lanes().
EVENLY_INLINE vd sums_of(const vd (&v)[WD]) {
#if defined(__AVX512F__)
  auto halves = [&](int a, int b) __attribute__((always_inline)) {
    const __m512d x = as<__m512d>(v[a]), y = as<__m512d>(v[b]);
    return _mm512_add_pd(_mm512_shuffle_f64x2(x, y, 0x44), _mm512_shuffle_f64x2(x, y, 0xee));
  };
  auto pairs = [](__m512d x, __m512d y) __attribute__((always_inline)) {
    return _mm512_add_pd(_mm512_unpacklo_pd(x, y), _mm512_unpackhi_pd(x, y));
  };
  const __m512d x = pairs(halves(0, 2), halves(1, 3)), y = pairs(halves(4, 6), halves(5, 7));
  return as<vd>(_mm512_add_pd(_mm512_shuffle_f64x2(x, y, 0x88), _mm512_shuffle_f64x2(x, y, 0xdd)));
#elif defined(__AVX__)
  const __m256d x = _mm256_hadd_pd(as<__m256d>(v[0]), as<__m256d>(v[1]));
  const __m256d y = _mm256_hadd_pd(as<__m256d>(v[2]), as<__m256d>(v[3]));
  return as<vd>(_mm256_add_pd(_mm256_permute2f128_pd(x, y, 0x20), _mm256_permute2f128_pd(x, y, 0x31)));
#else
  vd out;
  for (int i = 0; i < WD; ++i) out[i] = sum_lanes(v[i]);
  return out;
#endif
}

// 1 / sqrt(v + more) of n values, to what a float can hold and then some (A float), or as exact as it is written.
template <class A>
EVENLY_INLINE void inverse_roots(const double* v, double more, double* out, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)  // a square root and a division take 50 cycles, this takes 10
    for (; i + WD <= n; i += WD) {
      const __m512d x = _mm512_add_pd(_mm512_loadu_pd(v + i), _mm512_set1_pd(more));
      const __m512d half = _mm512_mul_pd(x, _mm512_set1_pd(0.5)), bound = _mm512_set1_pd(1.5);
      __m512d y = _mm512_rsqrt14_pd(x);
      for (int step = 0; step < 2; ++step)
        y = _mm512_mul_pd(y, _mm512_fnmadd_pd(_mm512_mul_pd(half, y), y, bound));
      const __mmask8 usual = _mm512_cmp_pd_mask(x, _mm512_set1_pd(1e-280), _CMP_GT_OQ) &
                             _mm512_cmp_pd_mask(x, _mm512_set1_pd(1e280), _CMP_LT_OQ);
      if (usual != 0xff) y = _mm512_mask_div_pd(y, static_cast<__mmask8>(~usual), _mm512_set1_pd(1), _mm512_sqrt_pd(x));
      _mm512_storeu_pd(out + i, y);
    }
#endif
  for (; i < n; ++i) out[i] = 1 / std::sqrt(v[i] + more);
}

// ---- bits -----------------------------------------------------------------------------------------------------

EVENLY_INLINE unsigned pack_lanes(vi m) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(as<__m512i>(m));
#elif defined(__AVX2__)
  return static_cast<unsigned>(_mm256_movemask_ps(as<__m256>(m)));
#else
  unsigned bits = 0;
  for (int i = 0; i < WF; ++i) bits |= (static_cast<unsigned>(m[i]) & 1u) << i;
  return bits;
#endif
}
EVENLY_INLINE unsigned pack_lanes(vl m) {
#if defined(__AVX512F__)
  return _mm512_movepi64_mask(as<__m512i>(m));
#endif
  unsigned bits = 0;
  for (int i = 0; i < WD; ++i) bits |= (static_cast<unsigned>(m[i]) & 1u) << i;
  return bits;
}
template <class A>
EVENLY_INLINE auto unpack_lanes(unsigned bits);
template <>
EVENLY_INLINE auto unpack_lanes<float>(unsigned bits) {
#if defined(__AVX512F__)
  return as<vi>(_mm512_movm_epi32(static_cast<__mmask16>(bits)));
#endif
  vi one;
  for (int i = 0; i < WF; ++i) one[i] = 1 << i;
  return as<vi>((splat(static_cast<int32_t>(bits)) & one) != vi{});
}
template <>
EVENLY_INLINE auto unpack_lanes<double>(unsigned bits) {
#if defined(__AVX512F__)
  return as<vl>(_mm512_movm_epi64(static_cast<__mmask8>(bits)));
#endif
  vl one;
  for (int i = 0; i < WD; ++i) one[i] = int64_t{1} << i;
  return as<vl>(((static_cast<int64_t>(bits) - vl{}) & one) != vl{});
}

// ---- functions ------------------------------------------------------------------------------------------------

// e^v, within 1 unit in the last place or so on [-87, 88]; 0 below, infinite above; NaN stays.
EVENLY_INLINE vf exp_of(vf x) {
  const vf magic = splat(12582912.0f);
  vf t = x * 1.44269504088896341f + magic;
  vu k = as<vu>(t) - as<vu>(magic);  // any bits where the result is replaced below
  vf n = t - magic;
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  vf y = p * as<vf>((k + 127u) << 23);
  y = choose(as<vi>(x > splat(88.37626f)), splat(__builtin_inff()), y);
  return keep(~as<vi>(x < splat(-87.33654f)), y);
}
EVENLY_INLINE vd exp_of(vd x) {
  vd y;
  for (int i = 0; i < WD; ++i) y[i] = std::exp(x[i]);
  return y;
}

// The normal distribution: cdf Φ and density φ. erfc(z) = t P(t) exp(-z²), t = 1/(1 + z/2), with P fitted to
// a relative error of 4e-8 on [0, 9.5].
EVENLY_INLINE void normal_of(vf v, vf& cdf, vf& pdf) {
  vf e = exp_of(v * v * -0.5f);
  vf z = as<vf>(as<vi>(v) & splat(int32_t{0x7fffffff})) * 0.70710678118654752f;
  vf t = 1.0f / (1.0f + 0.5f * z);
  vf p = splat(-5.889064687e-02f);
  p = p * t + 2.837013271e-01f;
  p = p * t + -4.853823561e-01f;
  p = p * t + 2.759765769e-01f;
  p = p * t + -2.517657319e-02f;
  p = p * t + 2.020693555e-01f;
  p = p * t + 2.432611300e-01f;
  p = p * t + 2.823534672e-01f;
  p = p * t + 2.820876774e-01f;
  vf q = 0.5f * p * t * e;
  cdf = choose(as<vi>(v > vf{}), 1.0f - q, q);
  pdf = e * 0.39894228040143268f;
}
EVENLY_INLINE void normal_of(vd v, vd& cdf, vd& pdf) {
  for (int i = 0; i < WD; ++i) {
    cdf[i] = 0.5 * std::erfc(-v[i] * 0.70710678118654752440);
    pdf[i] = 0.39894228040143267794 * std::exp(-0.5 * v[i] * v[i]);
  }
}

template <int ACT, class V>
EVENLY_INLINE V activate(V v) {
  if constexpr (ACT == ACT_RELU) {
    return keep(~(v < V{}), v);  // NaN stays
  } else if constexpr (ACT == ACT_SILU) {
    return v / (1 + exp_of(-v));
  } else if constexpr (ACT == ACT_GELU) {
    V cdf, pdf;
    normal_of(v, cdf, pdf);
    return v * cdf;
  } else {
    return v;
  }
}

// The gradient before the activation, from the gradient after it and the value before it.
template <int ACT, class V>
EVENLY_INLINE V activate_backward(V g, V v) {
  if constexpr (ACT == ACT_RELU) {
    return keep(~(v <= V{}), g);
  } else if constexpr (ACT == ACT_SILU) {
    V s = 1 / (1 + exp_of(-v));
    return g * s * (1 + v * (1 - s));
  } else if constexpr (ACT == ACT_GELU) {
    V cdf, pdf;
    normal_of(v, cdf, pdf);
    return g * (cdf + v * pdf);
  } else {
    return g;
  }
}

EVENLY_INLINE double to_double(float v) { return v; }
EVENLY_INLINE double to_double(double v) { return v; }
EVENLY_INLINE double to_double(bf16 v) { return as<float>(static_cast<uint32_t>(v.bits) << 16); }
EVENLY_INLINE double to_double(f16 v) {
  const uint32_t sign = (v.bits & 0x8000u) << 16, e = (v.bits >> 10) & 31u, m = v.bits & 0x3ffu;
  float f;
  if (e == 0)
    f = static_cast<float>(m) * 5.9604644775390625e-8f;
  else if (e == 31)
    f = as<float>(0x7f800000u | (m << 13));
  else
    f = as<float>(((e + 112u) << 23) | (m << 13));
  return as<float>(as<uint32_t>(f) | sign);
}
template <class T>
EVENLY_INLINE T from_double(double v);
template <>
EVENLY_INLINE float from_double<float>(double v) { return static_cast<float>(v); }
template <>
EVENLY_INLINE double from_double<double>(double v) { return v; }
template <>
EVENLY_INLINE bf16 from_double<bf16>(double v) {
  bf16 lanes[WF];
  Tr<bf16>::store(lanes, splat(static_cast<float>(v)));
  return lanes[0];
}
template <>
EVENLY_INLINE f16 from_double<f16>(double v) {
  f16 lanes[WF];
  Tr<f16>::store(lanes, splat(static_cast<float>(v)));
  return lanes[0];
}
