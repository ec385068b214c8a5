// What crosses from Python to the kernels: raw pointers, sizes and a few choices. No PyTorch header is used.
//
// The input is a contiguous block of shape (K0, R0, K1, R1): K axes keep a statistic of their own, R axes are
// reduced over. Element (k0, r0, k1, r1) lies at ((k0*R0 + r0)*K1 + k1)*R1 + r1. The weight of the element at
// offset o is weight[(o / wdiv) % wsize]; whether it counts is mask[(o / mouter) * msize + (o / mdiv) % msize].
#pragma once

#include <cstdint>

namespace evenly {

enum Dtype : int { F32 = 0, F64 = 1, BF16 = 2, F16 = 3 };
enum Act : int { ACT_NONE = 0, ACT_RELU = 1, ACT_SILU = 2, ACT_GELU = 3 };
enum Scale : int { SCALE_NONE = 0, SCALE_STD = 1, SCALE_RMS = 2, SCALE_L2 = 3, SCALE_L1 = 4, SCALE_MAX = 5 };

enum Status : int { OK = 0, UNSUPPORTED = 1, NO_MEMORY = 2 };

struct Problem {
  int64_t K0, R0, K1, R1;
  int64_t wdiv, wsize;  // wsize = 0: neither weight nor bias
  int64_t mouter, mdiv, msize;
  int dtype;            // of x, y, residual and their gradients
  int wdtype;           // of weight, bias and their gradients
  int sdtype;           // of the statistics that are given, and of running ones
  int act, scale;
  int center;
  int given;   // statistics are given, not measured
  int ready;   // forward: `stats` is filled already, by an earlier pass
  int relu_bits;  // relu: write (forward) or read (backward) one sign bit an element
  double eps, correction;
  int64_t far;  // outputs are written past the caches if a pass touches as many bytes

  const void* x;
  const void* residual;  // may be null
  const void* weight;    // may be null
  const void* bias;      // may be null
  const uint8_t* mask;   // may be null; zero: does not count

  // Statistics in the accumulation type (float; double for double): [3][K0*K1], the mean rounded, the reciprocal
  // of the scale, and what rounding took from the mean. Five rows with a mask or a norm of its own (masked.inl).
  void* stats;
  uint8_t* bits;

  // forward
  void* y;         // null: moments only
  void* mean_out;  // [K], may be null
  void* var_out;   // [K], may be null
  const void* mean_in;
  const void* var_in;
  void* running_mean;  // [K1], K0 = 1, may be null
  void* running_var;
  double momentum;

  // backward
  const void* dy;
  void* dx;   // may be null
  void* dresidual;  // may be null
  void* dweight;    // may be null
  void* dbias;      // may be null
  const void* dmean;  // [K], gradient of mean_out, may be null
  const void* dvar;   // [K], gradient of var_out, may be null
};

// One table of entry points for each instruction set.
struct Kernels {
  int (*forward)(const Problem&);
  int (*backward)(const Problem&);
  int64_t (*bits_bytes)(const Problem&);  // of the sign bits; negative: these sizes are not supported
  int64_t (*bits_row)(const Problem&);    // values after which the sign bits start a new byte
};
extern const Kernels kernels_portable;
#ifdef EVENLY_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;  // bfloat16; hands the other types on
#endif

// Threads: tasks 0..n-1 in any order, on PyTorch's own pool. backwards: each thread starts with its last ones, which
// read what an earlier loop left in its cache.
using Task = void (*)(void* context, int64_t task);
void run_tasks(int64_t n, Task task, void* context, bool backwards);
int thread_count();
void set_serial(bool serial);
const char* pool_name();

}  // namespace evenly
