// The recurrence for one instruction set. Each linear_scan_*.cpp defines PYRO_SSM_ISA (a namespace) and PYRO_SSM_WIDTH,
// includes the system headers below for any processor, switches its instructions on, and includes this file again.
#if !defined(PYRO_SSM_SYSTEM_HEADERS)
#define PYRO_SSM_SYSTEM_HEADERS
#include <cstdlib>
#include <cstring>

#include "isa.h"
#include "linear_scan.h"
#if PYRO_SSM_X86
#include <immintrin.h>
#endif
#else
namespace PYRO_SSM_ISA {
namespace {
#include "parallel.h"
#include "scan_math.h"
#include "lanes.h"
#include "scan_blocks.h"
#include "scan_passes.h"
#include "bank.h"
#include "bank_passes.h"
#include "low_rank_passes.h"
#define PYRO_SSM_BYTES (PYRO_SSM_WIDTH * 8)
#include "simd.h"
#include "elementary.h"
#include "complex_exponential.h"
#include "gap_passes.h"

template <class Kind, class T> int run(const ScanArgs& args, bool backward) {
    if (backward) backward_all<Kind, T>(args);
    else forward_all<Kind, T>(args);
    return SCAN_OK;
}
int dispatch(const ScanArgs& args, bool backward) {
    switch (args.kind) {
        case SCAN_F32: return run<RealKind, float>(args, backward);
        case SCAN_F64: return run<RealKind, double>(args, backward);
        case SCAN_C64: return run<ComplexKind, float>(args, backward);
        case SCAN_C128: return run<ComplexKind, double>(args, backward);
        case SCAN_PAIR_F32: return run<PairKind, float>(args, backward);
        case SCAN_PAIR_F64: return run<PairKind, double>(args, backward);
        default: return SCAN_UNKNOWN_KIND;
    }
}
int forward(const ScanArgs& args) { return dispatch(args, false); }
int backward(const ScanArgs& args) { return dispatch(args, true); }

// A bank of each kind.
template <class T> int run(const BankArgs& args, bool backward) {
    return bank_tasks<T>(args, backward ? diagonal_backward_one<T> : diagonal_forward_one<T>);
}
template <class T> int run(const LowRankArgs& args, bool backward) {
    switch (args.rank) {
        case 1: return bank_tasks<T>(args, backward ? low_rank_backward_one<T, 1> : low_rank_forward_one<T, 1>);
        case 2: return bank_tasks<T>(args, backward ? low_rank_backward_one<T, 2> : low_rank_forward_one<T, 2>);
        default: return SCAN_UNKNOWN_KIND;
    }
}
template <class T> int run(const GapArgs& args, bool backward) {
    if (args.method == BANK_ZOH)
        return bank_tasks<T>(args, backward ? gaps_backward_one<T, BANK_ZOH> : gaps_forward_one<T, BANK_ZOH>);
    return bank_tasks<T>(args, backward ? gaps_backward_one<T, BANK_BILINEAR> : gaps_forward_one<T, BANK_BILINEAR>);
}
template <class Args> int bank_forward(const Args& args) {
    return args.doubles ? run<double>(args, false) : run<float>(args, false);
}
template <class Args> int bank_backward(const Args& args) {
    return args.doubles ? run<double>(args, true) : run<float>(args, true);
}
}  // namespace
extern const ScanCode code = {
    forward, backward,
    bank_forward<BankArgs>, bank_backward<BankArgs>,
    bank_forward<LowRankArgs>, bank_backward<LowRankArgs>,
    bank_forward<GapArgs>, bank_backward<GapArgs>,
};
}  // namespace PYRO_SSM_ISA
#endif
