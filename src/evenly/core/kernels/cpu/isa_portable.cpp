// The kernels, compiled for the baseline of the platform.
#define EVENLY_ISA portable
#define EVENLY_TABLE kernels_portable
#include "kernels.inl"
