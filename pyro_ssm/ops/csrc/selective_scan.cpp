// The functions of the selective scan, the short convolution, elementwise functions and networks of coordinates that
// Python calls.
#include "selective_scan.h"
#include "causal_conv1d.h"
#include "coordinate.h"
#include "elementwise.h"
#include "isa.h"

#define DECLARE(isa)                                  \
    namespace isa {                                   \
    extern const SelectiveCode code;                  \
    extern const ConvolveCode convolve_code;          \
    extern const ElementwiseCode elementwise_code;    \
    extern const CoordinateCode coordinate_code;      \
    }
DECLARE(selective_base)
DECLARE(selective_avx2)
DECLARE(selective_avx512)

#if PYRO_SSM_X86
#define CHOOSE(name) \
    (isa_level() == ISA_AVX512 ? selective_avx512::name \
     : isa_level() == ISA_AVX2 ? selective_avx2::name   \
                               : selective_base::name)
#else
#define CHOOSE(name) selective_base::name
#endif

EXPORT i64 pyro_ssm_selective_args_size() { return (i64)sizeof(SelectiveArgs); }
EXPORT i64 pyro_ssm_convolve_args_size() { return (i64)sizeof(ConvolveArgs); }
EXPORT int pyro_ssm_selective_forward(const SelectiveArgs* args) { return CHOOSE(code).forward(*args); }
EXPORT int pyro_ssm_selective_backward(const SelectiveArgs* args) { return CHOOSE(code).backward(*args); }
EXPORT int pyro_ssm_convolve_forward(const ConvolveArgs* args) { return CHOOSE(convolve_code).forward(*args); }
EXPORT int pyro_ssm_convolve_backward(const ConvolveArgs* args) { return CHOOSE(convolve_code).backward(*args); }
EXPORT i64 pyro_ssm_elementwise_args_size() { return (i64)sizeof(ElementwiseArgs); }
EXPORT int pyro_ssm_elementwise(const ElementwiseArgs* args) { return CHOOSE(elementwise_code).apply(*args); }
EXPORT i64 pyro_ssm_coordinate_args_size() { return (i64)sizeof(CoordinateArgs); }
EXPORT int pyro_ssm_coordinate_forward(const CoordinateArgs* args) { return CHOOSE(coordinate_code).forward(*args); }
EXPORT int pyro_ssm_coordinate_backward(const CoordinateArgs* args) { return CHOOSE(coordinate_code).backward(*args); }
