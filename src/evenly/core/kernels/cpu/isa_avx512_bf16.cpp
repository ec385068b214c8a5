// The kernels of bfloat16, compiled for AVX-512 with its conversions to bfloat16 (AVX512_BF16: Cooper Lake, Sapphire
// Rapids, Zen 4 and later). They round to nearest even as the others do, but a subnormal result is zero.
#define EVENLY_ISA avx512_bf16
#define EVENLY_TABLE kernels_avx512_bf16
#define EVENLY_OTHERS kernels_avx512
#include "kernels.inl"
