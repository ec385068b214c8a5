// The pieces, compiled for AVX-512 (F, BW, DQ, VL).
#define EVENLY_ISA avx512
#define EVENLY_TABLE pieces_avx512
#include "pieces.inl"
