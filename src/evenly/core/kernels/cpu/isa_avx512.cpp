// The kernels, compiled for AVX-512 (F, BW, DQ, VL).
#define EVENLY_ISA avx512
#define EVENLY_TABLE kernels_avx512
#include "kernels.inl"
