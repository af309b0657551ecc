// For x86-64 processors with AVX2 and FMA (2013 on).
#include "linear_scan_code.h"
#include "isa.h"
#if PYRO_SSM_X86
BEGIN_ISA("avx2,fma")
#define PYRO_SSM_ISA linear_scan_avx2
#define PYRO_SSM_WIDTH 4
#include "linear_scan_code.h"
END_ISA
#endif
