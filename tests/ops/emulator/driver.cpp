// The driver of the emulated GPU: what pyro_ssm/ops/cuda_driver.py calls. A module has every kernel of every source.
#include "cuda_runtime.h"

#include "../../../pyro_ssm/ops/csrc/library.h"

namespace {
int context;
bool current = false;
}  // namespace

EXPORT int cuInit(unsigned) { return 0; }
EXPORT int cuDeviceGet(int* device, int index) {
    *device = 40 + index;
    return index == 0 ? 0 : 101;
}
EXPORT int cuDeviceGetAttribute(int* value, int which, int device) {
    if (device != 40) return 101;
    *value = which == 16 ? emulated::state.multiprocessors : which == 75 ? 9 : which == 76 ? 0 : -1;
    return 0;
}
EXPORT int cuDevicePrimaryCtxRetain(void** found, int device) {
    *found = &context;
    return device == 40 ? 0 : 101;
}
EXPORT int cuCtxSetCurrent(void* wanted) {
    current = wanted == &context;
    return current ? 0 : 201;
}
EXPORT int cuModuleLoadData(void** module, const char* image) {
    *module = &context;
    return !current ? 201 : std::strncmp(image, "emulated", 8) ? 200 : 0;
}
EXPORT int cuModuleGetFunction(void** kernel, void* module, const char* name) {
    if (module != &context) return 400;
    for (auto& x : emulated::kernels())
        if (x.name == name) { *kernel = &x; return 0; }
    return 500;
}
EXPORT int cuLaunchKernel(void* kernel, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                          unsigned threads_z, unsigned shared, void* stream, void** arguments, void** extra) {
    if (!current) return 201;
    if (!x || !y || z != 1 || threads_y != 1 || threads_z != 1 || shared || stream || extra) return 1;
    const auto& found = *(const emulated::Kernel*)kernel;
    found.run(found.address, dim3(x, y), dim3(threads), arguments[0]);
    return 0;
}
EXPORT int cuGetErrorString(int error, const char** text) {
    *text = error == 200 ? "device kernel image is invalid" : "an emulated error";
    return 0;
}
EXPORT const char* emulated_log() { return emulated::log.c_str(); }
EXPORT void emulated_forget() { emulated::log.clear(); }
