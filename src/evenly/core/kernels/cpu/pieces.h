// The pieces of layers whose gradient is not autograd's: sums, maps and recursions, and two layers as one pass.
#pragma once

#include <cstdint>

namespace evenly {

// A contiguous block (K0, R0, K1, R1) of a dtype, as in problem.h. A statistic is one double for each (k0, k1).
struct Block {
  int dtype;
  int64_t K0, R0, K1, R1;
};

// Power normalization of rows of channels. Scaled values z are x / sqrt(mean of x² over the group + eps), or x.
struct Power {
  int dtype;
  int64_t rows, channels, group;  // group: channels that are scaled together; 0: none
  double eps;
  const void* x;
  const void* dy;                // backward
  void* out;                     // forward: y = z*a + b, may be null; backward: dz = dy*a - z*b, from which dx
  const double *a, *b;           // [channels], may be null: 1 and 0
  double *first, *second;        // [channels]; forward: sum of z²; backward: sums of dy and of dy*z
};

// Online normalization of (steps, channels): one value a sample and channel.
struct Online {
  int dtype;
  int64_t steps, channels, group;  // group: channels that layer scaling scales together; 0: none
  double alpha_fwd, alpha_bkw, eps, guard_eps;
  const void* x;
  const void* dy;               // backward
  void* out;                    // y; backward: dx
  const double *weight, *bias;  // [channels], may be null
  double *mean, *var;           // [channels], before the first step; forward: moved past the last
  double *u, *v;                // [channels], backward: moved past the last
  double *dweight, *dbias;      // [channels], backward
};

struct Pieces {
  // g null: first = sum of x². Otherwise first = sum of g, second = sum of g*(x - m); m may be null.
  int (*sums)(const Block&, const void* x, const void* g, const double* m, double* first, double* second);
  // y = g*gain + (x - m)*slope + shift; g, m and shift may be null.
  int (*combine)(const Block&, const void* x, const void* g, const double* gain, const double* m,
                 const double* slope, const double* shift, void* y);
  // s_t = a_t s_{t-1} + v_t: the state before each step, and the last. a null: the constant. float or double.
  int (*scan)(int dtype, int64_t steps, int64_t width, const void* a, double constant, const void* v,
              const void* start, void* before, void* last);
  int (*power_forward)(const Power&);
  int (*power_backward)(const Power&);
  int (*online_forward)(const Online&);
  int (*online_backward)(const Online&);
};
extern const Pieces pieces_portable;
#ifdef EVENLY_X86
extern const Pieces pieces_avx2;
extern const Pieces pieces_avx512;
#endif

}  // namespace evenly
