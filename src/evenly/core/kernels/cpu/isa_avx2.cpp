// The kernels, compiled for AVX2, FMA and F16C.
#define EVENLY_ISA avx2
#define EVENLY_TABLE kernels_avx2
#include "kernels.inl"
