// The pieces, compiled for AVX2, FMA and F16C.
#define EVENLY_ISA avx2
#define EVENLY_TABLE pieces_avx2
#include "pieces.inl"
