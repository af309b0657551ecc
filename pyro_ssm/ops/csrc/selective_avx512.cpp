// For x86-64 processors with AVX-512 (foundation, double-word and vector-length extensions).
#include "selective_code.h"
#include "isa.h"
#if PYRO_SSM_X86
BEGIN_ISA("avx2,fma,avx512f,avx512dq,avx512vl")
#define PYRO_SSM_ISA selective_avx512
#define PYRO_SSM_BYTES 64
#include "selective_code.h"
END_ISA
#endif
