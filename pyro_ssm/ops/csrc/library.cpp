// The version of the library, and the choice of code for this processor.
#include "library.h"
#include "isa.h"

#include <cstdlib>
#include <cstring>

static IsaLevel processor() {
    const char* wanted = std::getenv("PYRO_SSM_ISA");  // base, avx2: never above what the processor has
    const bool base = wanted && !std::strcmp(wanted, "base"), no_512 = base || (wanted && !std::strcmp(wanted, "avx2"));
#if PYRO_SSM_X86
    __builtin_cpu_init();
    const bool avx2 = !base && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx2 && !no_512 && avx512) return ISA_AVX512;
    if (avx2) return ISA_AVX2;
#endif
    (void)no_512;
    return ISA_BASE;
}

IsaLevel isa_level() {
    static const IsaLevel chosen = processor();
    return chosen;
}

// The version of this interface: Python refuses a library of another.
EXPORT i64 pyro_ssm_abi() { return 60; }
EXPORT const char* pyro_ssm_isa() {
    static const char* const names[] = {"base", "avx2", "avx512"};
    return names[isa_level()];
}
