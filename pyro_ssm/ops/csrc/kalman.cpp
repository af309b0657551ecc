// The functions that Python calls, and the choice of code for this processor.
#include "kalman.h"
#include "isa.h"

#include <cstdlib>
#include <cstring>

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace kalman_base { extern const KalmanCode code; }
namespace kalman_avx2 { extern const KalmanCode code; }
namespace kalman_avx512 { extern const KalmanCode code; }

static const char* processor() {
    const char* wanted = std::getenv("PYRO_SSM_ISA");  // base, avx2: never above what the processor has
    const bool base = wanted && !std::strcmp(wanted, "base"), no_512 = base || (wanted && !std::strcmp(wanted, "avx2"));
#if PYRO_SSM_X86
    __builtin_cpu_init();
    const bool avx2 = !base && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx2 && !no_512 && avx512) return "avx512";
    if (avx2) return "avx2";
#endif
    (void)no_512;
    return "base";
}
static const char* name() {
    static const char* const chosen = processor();
    return chosen;
}
static const KalmanCode& code() {
#if PYRO_SSM_X86
    if (!std::strcmp(name(), "avx512")) return kalman_avx512::code;
    if (!std::strcmp(name(), "avx2")) return kalman_avx2::code;
#endif
    return kalman_base::code;
}

// The version of this interface: Python refuses a library of another.
EXPORT i64 pyro_ssm_abi() { return 3; }
EXPORT i64 pyro_ssm_kalman_args_size() { return (i64)sizeof(KalmanArgs); }
EXPORT const char* pyro_ssm_isa() { return name(); }
EXPORT int pyro_ssm_kalman_forward(const KalmanArgs* args) { return code().forward(*args); }
EXPORT int pyro_ssm_kalman_backward(const KalmanArgs* args) { return code().backward(*args); }
EXPORT int pyro_ssm_kalman_backwards(const BackwardArgs* args) { return code().backwards(*args); }
EXPORT i64 pyro_ssm_kalman_tape_size(const KalmanArgs* args) { return code().tape_size(*args); }
