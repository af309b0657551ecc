// The version of the CUDA library, and whether it can run here.
#include "device.h"

namespace {
struct Nothing { i64 x; };
__global__ void nothing(Nothing) {}
}  // namespace

#if !defined(__CUDACC_RTC__)
// Of the interface: Python refuses a library of another version.
EXPORT i64 pyro_ssm_cuda_abi() { return 31; }
// 0, or the error that says why kernels cannot run on a device: no code for its architecture, a driver that is too old.
EXPORT int pyro_ssm_cuda_usable(i64 device) {
    TRY(begin_on(device));
    cudaFuncAttributes found;
    const cudaError_t error = cudaFuncGetAttributes(&found, nothing);
    if (error) cudaGetLastError();
    return (int)error;
}
EXPORT const char* pyro_ssm_cuda_error(int error) { return cudaGetErrorString((cudaError_t)error); }
#endif
