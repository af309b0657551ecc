// The way from Python to the kernels: launching, memory for intermediate results, the functions that are called. Where
// kernels are compiled at run time, pyro_ssm/ops/launches.py does the same; tests/ops/test_nvrtc.py holds the two together.
#pragma once

// Hands out pieces of one block of memory; of none, to find out how large it must be.
struct Workspace {
    char* base;
    i64 used = 0;
    explicit Workspace(void* memory) : base((char*)memory) {}
    template <class T> T* take(i64 count) {
        T* piece = base ? (T*)(base + used) : nullptr;
        used += (count * (i64)sizeof(T) + 255) / 256 * 256;
        return piece;
    }
};

namespace {

constexpr i64 MOST_CHUNKS = 512;  // of time: one thread walks over them

inline i64 ceil_div(i64 x, i64 y) { return (x + y - 1) / y; }

// Threads that keep the current device busy.
inline i64 device_threads(i64 of_multiprocessor) {
    int device = 0, count = 1;
    if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device)) {
        cudaGetLastError();
        count = 64;
    }
    return (count > 0 ? count : 1) * of_multiprocessor;
}

// How `steps` are cut: into one chunk if others fill the device already, else into enough of them, `least` steps or more.
struct Chunks { i64 count, length; };
inline Chunks chunks_of(i64 steps, i64 threads, i64 wanted, i64 least) {
    i64 count = threads > 0 ? wanted / threads : 1;
    if (count < 4) count = 1;  // several chunks run twice over their steps
    if (count > ceil_div(steps, least)) count = ceil_div(steps, least);
    if (count > MOST_CHUNKS) count = MOST_CHUNKS;
    if (count < 1) count = 1;
    const i64 length = steps > 0 ? ceil_div(steps, count) : 1;
    return {steps > 0 ? ceil_div(steps, length) : 1, length};
}

template <class Task>
int launch(void (*kernel)(Task), i64 blocks, i64 rows, int threads, const Task& task, void* stream) {
    if (blocks <= 0 || rows <= 0) return 0;
    if (blocks > 0x7fffffffLL || rows > 65535) return (int)cudaErrorInvalidConfiguration;
    void* arguments[] = {(void*)&task};
    const cudaError_t error = cudaLaunchKernel(kernel, dim3((unsigned)blocks, (unsigned)rows), dim3((unsigned)threads),
                                               arguments, 0, (cudaStream_t)stream);
    if (error) cudaGetLastError();  // or others would meet it
    return (int)error;
}

inline int begin_on(i64 device) {
    const cudaError_t error = cudaSetDevice((int)device);
    if (error) cudaGetLastError();
    return (int)error;
}

template <class From, class To> int sum_parts(const From* in, To* out, i64 parts, i64 size, void* stream) {
    const Parts<From, To> task = {in, out, parts, size};
    return launch(add_parts<From, To>, ceil_div(size, 128), 1, 128, task, stream);
}


}  // namespace

#define TRY(call)                      \
    do {                               \
        const int status_ = (call);    \
        if (status_) return status_;   \
    } while (0)

// The functions that Python calls: how many bytes of workspace a call wants (at least 1), and the calls themselves.
// `run(args, backward, workspace, stream)` does nothing but count where the workspace has no memory.
#define ENTRY(name, Args, run)                                                                                          \
    EXPORT i64 pyro_ssm_##name##_args_size() { return (i64)sizeof(Args); }                                              \
    EXPORT i64 pyro_ssm_##name##_workspace(const Args* args, i64 backward, i64 device) {                                \
        if (begin_on(device)) return -1;                                                                                \
        Workspace none(nullptr);                                                                                        \
        return run(*args, backward != 0, none, nullptr) ? -1 : none.used + 1;                                           \
    }                                                                                                                   \
    EXPORT int pyro_ssm_##name##_forward(const Args* args, void* memory, i64 device, void* stream) {                    \
        TRY(begin_on(device));                                                                                          \
        Workspace workspace(memory);                                                                                    \
        return run(*args, false, workspace, stream);                                                                    \
    }                                                                                                                   \
    EXPORT int pyro_ssm_##name##_backward(const Args* args, void* memory, i64 device, void* stream) {                   \
        TRY(begin_on(device));                                                                                          \
        Workspace workspace(memory);                                                                                    \
        return run(*args, true, workspace, stream);                                                                     \
    }
