// For x86-64 processors with AVX2 and FMA (2013 on).
#include "particles_code.h"
#include "isa.h"
#if PYRO_SSM_X86
BEGIN_ISA("avx2,fma")
#define PYRO_SSM_ISA particles_avx2
#include "particles_code.h"
END_ISA
#endif
