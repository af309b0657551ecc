// The filter for one instruction set. Each kalman_*.cpp defines PYRO_SSM_ISA (a namespace) and PYRO_SSM_WIDTH, includes
// the system headers below for any processor, switches its instructions on, and includes this file again.
#if !defined(PYRO_SSM_SYSTEM_HEADERS)
#define PYRO_SSM_SYSTEM_HEADERS
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"
#include "kalman.h"
#if PYRO_SSM_X86
#include <immintrin.h>
#endif
#else
#define PYRO_SSM_BYTES (8 * PYRO_SSM_WIDTH)
namespace PYRO_SSM_ISA {
namespace {
#include "simd.h"
#include "matrix.h"
#include "parallel.h"
#include "context.h"
#include "covariance.h"
#include "forward.h"
#include "backward.h"
#include "gradient.h"
#include "smoother.h"

// A mask that hides nothing is none.
void drop(const uint8_t*& mask, i64 size) {
    if (mask && !std::memchr(mask, 0, (size_t)size)) mask = nullptr;
}
int dispatch(int (*pass)(const Context&), KalmanArgs args) {
    drop(args.mask, (args.mask_g ? args.groups : 1) * args.seen * args.p);
    drop(args.move, (args.move_g ? args.groups : 1) * args.times);
    try {
        return pass(Context(args));
    } catch (const std::bad_alloc&) { return KALMAN_NO_MEMORY; }
}
int forward(const KalmanArgs& a) { return dispatch(forward_all, a); }
int backward(const KalmanArgs& a) { return dispatch(backward_all, a); }
i64 tape_size(const KalmanArgs& a) { return Context(a).tape_size(); }
}  // namespace
extern const KalmanCode code = {forward, backward, tape_size, backwards};
}  // namespace PYRO_SSM_ISA
#endif
