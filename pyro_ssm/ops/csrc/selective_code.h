// The selective scan, the short convolution, elementwise functions and networks of coordinates for one instruction set.
// Each selective_*.cpp defines PYRO_SSM_ISA (a namespace) and PYRO_SSM_BYTES (of a register), includes the system headers
// below for any processor, switches its instructions on, and includes this file again.
#if !defined(PYRO_SSM_SYSTEM_HEADERS)
#define PYRO_SSM_SYSTEM_HEADERS
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "causal_conv1d.h"
#include "coordinate.h"
#include "elementwise.h"
#include "isa.h"
#include "selective_scan.h"
#if PYRO_SSM_X86
#include <immintrin.h>
#endif
#else
namespace PYRO_SSM_ISA {
namespace {
#include "parallel.h"
#include "simd.h"
#include "elementary.h"
#include "selective_core.h"
#include "selective_rule.h"
#include "selective_steps.h"
#include "selective_forward.h"
#include "selective_backward.h"
#include "convolve.h"
#include "elementwise_passes.h"
#include "coordinate_passes.h"

template <class Args> int run(int (*floats)(const Args&), int (*doubles)(const Args&), const Args& a) {
    return a.doubles ? doubles(a) : floats(a);
}
int forward(const SelectiveArgs& a) { return run(selective_forward_of<float>, selective_forward_of<double>, a); }
int backward(const SelectiveArgs& a) { return run(selective_backward_of<float>, selective_backward_of<double>, a); }
int convolve(const ConvolveArgs& a) { return run(convolve_forward_of<float>, convolve_forward_of<double>, a); }
int convolve_back(const ConvolveArgs& a) { return run(convolve_backward_of<float>, convolve_backward_of<double>, a); }

int apply(const ElementwiseArgs& a) { return run(elementwise_of<float>, elementwise_of<double>, a); }

int coordinate(const CoordinateArgs& a, bool back) {
    return a.doubles ? coordinate_of<double>(a, back) : coordinate_of<float>(a, back);
}
int coordinate_forward(const CoordinateArgs& a) { return coordinate(a, false); }
int coordinate_backward(const CoordinateArgs& a) { return coordinate(a, true); }
}  // namespace
extern const SelectiveCode code = {forward, backward};
extern const ElementwiseCode elementwise_code = {apply};
extern const CoordinateCode coordinate_code = {coordinate_forward, coordinate_backward};
extern const ConvolveCode convolve_code = {convolve, convolve_back};
}  // namespace PYRO_SSM_ISA
#endif
