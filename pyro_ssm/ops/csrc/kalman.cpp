// The Kalman functions that Python calls.
#include "kalman.h"
#include "isa.h"

namespace kalman_base { extern const KalmanCode code; }
namespace kalman_avx2 { extern const KalmanCode code; }
namespace kalman_avx512 { extern const KalmanCode code; }

static const KalmanCode& code() {
#if PYRO_SSM_X86
    if (isa_level() == ISA_AVX512) return kalman_avx512::code;
    if (isa_level() == ISA_AVX2) return kalman_avx2::code;
#endif
    return kalman_base::code;
}

EXPORT i64 pyro_ssm_kalman_args_size() { return (i64)sizeof(KalmanArgs); }
EXPORT int pyro_ssm_kalman_forward(const KalmanArgs* args) { return code().forward(*args); }
EXPORT int pyro_ssm_kalman_backward(const KalmanArgs* args) { return code().backward(*args); }
EXPORT int pyro_ssm_kalman_backwards(const BackwardArgs* args) { return code().backwards(*args); }
EXPORT i64 pyro_ssm_kalman_tape_size(const KalmanArgs* args) { return code().tape_size(*args); }
