// What the kernels share. They take one struct by value and use no feature beyond threadIdx, blockIdx, blockDim,
// __shared__, __syncthreads and __shfl_xor_sync of whole warps, so that tests/ops/emulator can run the very same sources
// on a CPU. Nor do they need a header of the system: a run-time compiler (pyro_ssm/ops/nvrtc.py) has none. What only the
// CPU does, launches above all, is hidden from it: `#if !defined(__CUDACC_RTC__)`.
#pragma once

#if !defined(__CUDACC_RTC__)
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#endif

#include "../library.h"

namespace {

#if defined(__CUDACC__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL
#endif

constexpr unsigned WHOLE_WARP = 0xffffffffu;

template <class T> __device__ __forceinline__ T* of(void* p, i64 offset) { return (T*)p + offset; }
template <class T> __device__ __forceinline__ const T* of(const void* p, i64 offset) { return (const T*)p + offset; }

// out[i] = the sum over p of in[p][i], in that order.
template <class From, class To> struct Parts { const From* in; To* out; i64 parts, size; };

template <class From, class To> __global__ void __launch_bounds__(128) add_parts(Parts<From, To> p) {
    const i64 i = (i64)blockIdx.x * 128 + threadIdx.x;
    if (i >= p.size) return;
    From sum = From(0);
    for (i64 k = 0; k < p.parts; ++k) sum += p.in[k * p.size + i];
    p.out[i] = (To)sum;
}

}  // namespace

#if !defined(__CUDACC_RTC__)
#include "launch.h"
#endif
