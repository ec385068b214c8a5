// The pieces of layers whose gradient is not autograd's: sums, maps and recursions, and two layers as one pass.
#pragma once

#include <cstdint>

namespace evenly {

// A contiguous block (K0, R0, K1, R1) of a dtype, as in problem.h. A statistic is one double for each (k0, k1).
struct Block {
  int dtype;
  int64_t K0, R0, K1, R1;
};

// Power normalization of rows of channels, with its state. Scaled values z are x / sqrt(mean of x² over the group
// + eps), or x. Parameters, their gradients and the state have the dtype wdtype.
struct Power {
  int dtype, wdtype;
  int64_t rows, channels, group;  // group: channels that are scaled together; 0: none
  double eps;
  const void* x;
  const void* dy;                    // backward
  void* out;                         // y; backward: dx, may be null
  const void *weight, *bias;         // [channels], may be null
  double* kept;                      // [2][channels]: the mean square by which z is divided, and the sum of z²
  int exact;                         // divide by the mean square of the batch, with the gradient of that
  // forward
  void* running;                     // the running mean square; null: a pass that is made again
  void* before;                      // what it was before the pass; exact: not used
  int64_t* steps;                    // so far; moved where running is
  int64_t warmup;                    // steps that divide by the mean square of the batch
  double alpha_fwd;
  // backward
  void* state;                       // the running gradient term / rate; exact: not used
  double rate;
  int batch;                         // divide by the mean square of the batch
  void *dweight, *dbias;             // may be null
};

// Online normalization of (steps, channels), one value a sample and channel, with its state.
struct Online {
  int dtype, wdtype;
  int64_t steps, channels, group;  // group: channels that layer scaling scales together; 0: none
  double alpha_fwd, alpha_bkw, eps, guard_eps;
  double limit;                    // clamp the output to [-limit, limit]; 0: do not
  const void* x;
  const void* dy;                  // backward
  void* out;                       // y; backward: dx, may be null
  const void *weight, *bias;       // [channels], may be null
  double* kept;                    // [2][channels]: mean and variance before the first step
  // forward
  void *mean, *var;                // moved past the last step; null: a pass that is made again
  void *mean_before, *var_before;  // what they were before the pass
  // backward
  void *u, *v;                     // moved past the last step
  void *dweight, *dbias;           // may be null
};

// The numbers of online normalization of several values a sample and channel: one of each kind a sample and channel,
// (steps, channels). With d the distance from the mean m of the sample, the output is gain*d + shift.
struct OnlineNumbers {
  int wdtype;
  int64_t steps, channels, positions, group;  // group as above
  double alpha_fwd, alpha_bkw, eps, guard_eps;
  const double *m, *s;                   // mean and variance over positions
  const void *weight, *bias;             // [channels], may be null
  double* out;                           // [5][steps][channels]: 1/scale, the mean of the unit value, gain, shift,
                                         // and the factor of layer scaling; control overwrites all but the gain
  double* kept;                          // [2][channels]: mean and variance before the first step
  // the statistics
  void *mean, *var;                      // moved past the last step; null: a pass that is made again
  void *mean_before, *var_before;        // what they were before the pass
  // control: out[0] and out[3] become slope and shift, with dx = gain*dy + slope*d + shift
  const double *total_g, *total_gd;      // sums of dy and of dy*d over positions
  void *u, *v;                           // moved past the last step
  void *dweight, *dbias;                 // may be null
};

struct Pieces {
  // g null: first = sum of x². Otherwise first = sum of g, second = sum of g*(x - m); m may be null.
  int (*sums)(const Block&, const void* x, const void* g, const double* m, double* first, double* second);
  // Of each row of n values: the sums of g*x, g² and x², into out[0], out[apart] and out[2*apart] at the row.
  int (*products)(int dtype, int64_t rows, int64_t n, const void* g, const void* x, double* out, int64_t apart);
  // x += g*gain + x*slope, with a slope for each row of n values.
  int (*advance)(int dtype, int64_t rows, int64_t n, const void* g, double gain, const double* slope, void* x);
  // y = g*gain + (x - m)*slope + shift; g, m and shift may be null.
  int (*combine)(const Block&, const void* x, const void* g, const double* gain, const double* m,
                 const double* slope, const double* shift, void* y);
  // With z = (x - m)*slope + shift: z clamped to [-limit, limit]; with g: g where z is inside, 0 elsewhere.
  int (*clip)(const Block&, const void* x, const void* g, const double* m, const double* slope, const double* shift,
              double limit, void* out);
  // s_t = a_t s_{t-1} + v_t: the state before each step, and the last. a null: the constant. float or double.
  int (*scan)(int dtype, int64_t steps, int64_t width, const void* a, double constant, const void* v,
              const void* start, void* before, void* last);
  int (*power_forward)(const Power&);
  int (*power_backward)(const Power&);
  int (*online_forward)(const Online&);
  int (*online_backward)(const Online&);
  int (*online_numbers)(const OnlineNumbers&);
  int (*online_control)(const OnlineNumbers&);
};
extern const Pieces pieces_portable;
#ifdef EVENLY_X86
extern const Pieces pieces_avx2;
extern const Pieces pieces_avx512;
#endif

}  // namespace evenly
