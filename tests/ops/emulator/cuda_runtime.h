// CUDA on a CPU, for tests: what pyro_ssm/ops/csrc/cuda uses of it, and no more.
//
// The threads of a block are contexts of their own (made by ucontext, switched by jumps) that run one after the other, each until it reaches a
// barrier. Between barriers they run in an order that changes from one barrier to the next and with `emulated_order`: a
// result that depends on it is a race. A block whose threads disagree about a barrier stops the process, as does a warp
// shuffle that not all its threads reach; on a GPU both would be undefined.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

typedef int cudaError_t;
typedef void* cudaStream_t;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorNoKernelImageForDevice = 209 };
enum { cudaDevAttrMultiProcessorCount = 16 };
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct cudaFuncAttributes { int numRegs; };

namespace emulated {
struct State {
    int multiprocessors = 132;
    unsigned order = 0;
    long launches = 0, blocks = 0;
};
inline State state;

enum Waiting { RUNS, AT_BLOCK, AT_WARP, DONE };
struct Thread {
    ucontext_t context;
    jmp_buf at;
    bool begun;
    std::vector<char> stack;
    Waiting waiting;
    double given, taken;  // of a shuffle
    unsigned mask;
};
struct Block {
    std::vector<Thread> threads;
    jmp_buf home;
    int current = 0;
    void (*call)(void*) = nullptr;
    void* what = nullptr;
};
inline Block block;
inline dim3 thread_at, block_at, block_size, grid_size;

[[noreturn]] inline void stop(const char* why) {
    std::fprintf(stderr, "emulated GPU: %s\n", why);
    std::abort();
}
inline void body() {
    block.call(block.what);
    block.threads[(size_t)block.current].waiting = DONE;
    _longjmp(block.home, 1);
}
inline void go_on(Thread& x) {
    if (_setjmp(block.home)) return;
    if (x.begun) _longjmp(x.at, 1);
    x.begun = true;
    setcontext(&x.context);
}
inline void wait(Waiting at) {
    Thread& me = block.threads[(size_t)block.current];
    me.waiting = at;
    if (!_setjmp(me.at)) _longjmp(block.home, 1);
}
// Runs every thread that can go on; in a new order each time.
inline void run_some(size_t count, unsigned& seed) {
    seed = seed * 1664525u + 1013904223u;
    const size_t start = seed / 7 % count;
    const bool down = seed & 0x10000u;
    for (size_t i = 0; i < count; ++i) {
        const size_t t = (start + (down ? count - i : i)) % count;
        if (block.threads[t].waiting != RUNS) continue;
        block.current = (int)t;
        thread_at = dim3((unsigned)t);
        go_on(block.threads[t]);
    }
}
inline void shuffle_warps(size_t count) {
    for (size_t first = 0; first < count; first += 32) {
        int at_warp = 0;
        for (size_t t = first; t < first + 32 && t < count; ++t) at_warp += block.threads[t].waiting == AT_WARP;
        if (!at_warp) continue;
        if (at_warp != 32) stop("a shuffle that not all threads of its warp reach");
        for (size_t t = first; t < first + 32; ++t)
            block.threads[t].taken = block.threads[first + ((t - first) ^ block.threads[t].mask)].given;
        for (size_t t = first; t < first + 32; ++t) block.threads[t].waiting = RUNS;
    }
}
inline void run_block(size_t count, void (*call)(void*), void* what) {
    block.call = call;
    block.what = what;
    if (block.threads.size() < count) block.threads.resize(count);
    for (size_t t = 0; t < count; ++t) {
        Thread& x = block.threads[t];
        if (x.stack.empty()) x.stack.resize(1 << 17);
        getcontext(&x.context);
        x.context.uc_stack.ss_sp = x.stack.data();
        x.context.uc_stack.ss_size = x.stack.size();
        x.context.uc_link = nullptr;
        x.begun = false;
        x.waiting = RUNS;
        makecontext(&x.context, body, 0);
    }
    unsigned seed = state.order * 2654435761u + (unsigned)state.blocks++;
    for (;;) {
        run_some(count, seed);
        size_t waits = 0, done = 0, shuffles = 0;
        for (size_t t = 0; t < count; ++t) {
            waits += block.threads[t].waiting == AT_BLOCK;
            done += block.threads[t].waiting == DONE;
            shuffles += block.threads[t].waiting == AT_WARP;
        }
        if (done == count) return;
        if (shuffles) { shuffle_warps(count); continue; }
        if (waits != count) stop("a barrier that not all threads of the block reach");
        for (size_t t = 0; t < count; ++t) block.threads[t].waiting = RUNS;
    }
}
}  // namespace emulated

#define threadIdx (::emulated::thread_at)
#define blockIdx (::emulated::block_at)
#define blockDim (::emulated::block_size)
#define gridDim (::emulated::grid_size)

inline void __syncthreads() { emulated::wait(emulated::AT_BLOCK); }
template <class T> inline T __shfl_xor_sync(unsigned, T value, int mask) {
    emulated::Thread& me = emulated::block.threads[(size_t)emulated::block.current];
    me.given = (double)value;
    me.mask = (unsigned)mask;
    emulated::wait(emulated::AT_WARP);
    return (T)me.taken;
}

inline cudaError_t cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : 101; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) { return error ? "an emulated error" : "no error"; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) { *value = emulated::state.multiprocessors; return cudaSuccess; }
template <class Task> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, void (*)(Task)) {
    found->numRegs = 0;
    return cudaSuccess;
}

namespace emulated {
// Kernels by name, for the driver (driver.cpp): each source tells its own.
struct Kernel {
    std::string name;
    void* address;
    void (*run)(void* address, dim3 grid, dim3 threads, const void* task);
    size_t size;  // of the task
};
inline std::vector<Kernel>& kernels() {
    static std::vector<Kernel> all;
    return all;
}
// What was launched, a line each: the kernel, blocks, rows, threads, the task in numbers of eight bytes.
inline std::string log;

template <class Task> void run_kernel(void* address, dim3 grid, dim3 threads, const void* task) {
    struct Call { void (*kernel)(Task); Task task; } call = {(void (*)(Task))address, *(const Task*)task};
    for (const Kernel& x : kernels()) {
        if (x.address != address) continue;
        log += x.name + " " + std::to_string(grid.x) + " " + std::to_string(grid.y) + " " + std::to_string(threads.x);
        for (size_t i = 0; i + 8 <= sizeof(Task); i += 8) {
            int64_t number;
            std::memcpy(&number, (const char*)task + i, 8);
            log += " " + std::to_string(number);
        }
        log += "\n";
        break;
    }
    ++state.launches;
    block_size = threads;
    grid_size = grid;
    for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
            block_at = dim3(x, y);
            run_block(threads.x, [](void* what) { ((Call*)what)->kernel(((Call*)what)->task); }, &call);
        }
}
template <class Task> bool known(const char* name, void (*kernel)(Task)) {
    // two sources may have one of the same name each; they do the same
    kernels().push_back({name, (void*)kernel, run_kernel<Task>, sizeof(Task)});
    return true;
}
}  // namespace emulated

template <class Task>
cudaError_t cudaLaunchKernel(void (*kernel)(Task), dim3 grid, dim3 threads, void** arguments, size_t, cudaStream_t) {
    emulated::run_kernel<Task>((void*)kernel, grid, threads, arguments[0]);
    return cudaSuccess;
}
