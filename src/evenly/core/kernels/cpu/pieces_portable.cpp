// The pieces, compiled for the baseline of the platform.
#define EVENLY_ISA portable
#define EVENLY_TABLE pieces_portable
#include "pieces.inl"
