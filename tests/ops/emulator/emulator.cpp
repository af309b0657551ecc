// The knobs of the emulated GPU: tests/ops/emulated_cuda.py.
#include "cuda_runtime.h"

#include "../../../pyro_ssm/ops/csrc/library.h"

EXPORT void emulate(i64 multiprocessors, i64 order) {
    emulated::state.multiprocessors = (int)multiprocessors;
    emulated::state.order = (unsigned)order;
}
EXPORT i64 emulated_launches() { return (i64)emulated::state.launches; }
