// For x86-64 processors with AVX-512 (foundation, double-word and vector-length extensions).
#include "particles_code.h"
#include "isa.h"
#if PYRO_SSM_X86
BEGIN_ISA("avx2,fma,avx512f,avx512dq,avx512vl")
#define PYRO_SSM_ISA particles_avx512
#include "particles_code.h"
END_ISA
#endif
