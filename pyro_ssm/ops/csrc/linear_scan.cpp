// The functions of the linear recurrence that Python calls.
#include "linear_scan.h"
#include "isa.h"

namespace linear_scan_base { extern const ScanCode code; }
namespace linear_scan_avx2 { extern const ScanCode code; }
namespace linear_scan_avx512 { extern const ScanCode code; }

static const ScanCode& code() {
#if PYRO_SSM_X86
    if (isa_level() == ISA_AVX512) return linear_scan_avx512::code;
    if (isa_level() == ISA_AVX2) return linear_scan_avx2::code;
#endif
    return linear_scan_base::code;
}

EXPORT i64 pyro_ssm_linear_scan_args_size() { return (i64)sizeof(ScanArgs); }
EXPORT int pyro_ssm_linear_scan_forward(const ScanArgs* args) { return code().forward(*args); }
EXPORT int pyro_ssm_linear_scan_backward(const ScanArgs* args) { return code().backward(*args); }

EXPORT i64 pyro_ssm_diag_lti_args_size() { return (i64)sizeof(BankArgs); }
EXPORT int pyro_ssm_diag_lti_forward(const BankArgs* args) { return code().bank_forward(*args); }
EXPORT int pyro_ssm_diag_lti_backward(const BankArgs* args) { return code().bank_backward(*args); }

EXPORT i64 pyro_ssm_low_rank_bank_args_size() { return (i64)sizeof(LowRankArgs); }
EXPORT int pyro_ssm_low_rank_bank_forward(const LowRankArgs* args) { return code().low_rank_forward(*args); }
EXPORT int pyro_ssm_low_rank_bank_backward(const LowRankArgs* args) { return code().low_rank_backward(*args); }

EXPORT i64 pyro_ssm_gap_bank_args_size() { return (i64)sizeof(GapArgs); }
EXPORT int pyro_ssm_gap_bank_forward(const GapArgs* args) { return code().gap_forward(*args); }
EXPORT int pyro_ssm_gap_bank_backward(const GapArgs* args) { return code().gap_backward(*args); }
