// What the forward and the backward selective scan on a GPU share.
//
// A warp holds WIDTH channels side by side, each in SLICES threads of NS states: ROUND states at once, in rounds where a
// channel has more. Steps are taken Q at a time; the steps of such a tile are dealt out among the slices of a channel.
#pragma once

#include "device.h"

#include "../selective_scan.h"

namespace {

#define PYRO_SSM_BYTES 8
#include "../simd.h"
#include "../elementary.h"

constexpr int Q = SELECTIVE_CHUNK, ROUND = 16;

template <class T> struct Split {
    static constexpr int NS = 16 / (int)sizeof(T), SLICES = ROUND / NS, WIDTH = 32 / SLICES;
};

template <class T> struct SelectiveTask {
    SelectiveArgs a;
    i64 of_group, share, blocks;  // channels a group, a head; blocks of channels a group
    i64 tiles, chunks, length;    // of time: tiles of Q steps; chunks, and their tiles
    T* state;                     // (chunks, batch, n, channels): of ends of chunks, then of starts; in use between rounds
    T* passed;                    // (chunks, batch, channels): the sum of the steps of a chunk
    uint8_t* cut;                 // (chunks, batch): a reset lies in the chunk
    // of the gradient: shares that are summed at last
    T *B, *C;                     // (blocks, batch, times, groups, n)
    T* gap;                       // (blocks * groups, batch, times)
    T* step;                      // (batch, times, channels)
    double* A;                    // (chunks, batch, decays, channels)
    double *D, *bias;             // (chunks, batch, channels)
};

#if !defined(__CUDACC_RTC__)
constexpr i64 LEAST_TILES = 2;  // of a chunk

template <class T> int fill(SelectiveTask<T>& p, const SelectiveArgs& a, int warps, Workspace& memory) {
    p.a = a;
    p.of_group = a.channels / a.groups; p.share = a.channels / a.heads;
    p.blocks = ceil_div(p.of_group, warps * Split<T>::WIDTH);
    p.tiles = ceil_div(a.times, Q);
    const Chunks cut = chunks_of(p.tiles, a.batch * a.groups * p.blocks * warps * 32, device_threads(1024), LEAST_TILES);
    p.chunks = cut.count; p.length = cut.length;
    p.state = memory.take<T>(p.chunks * a.batch * a.n * a.channels);
    p.passed = memory.take<T>(p.chunks * a.batch * a.channels);
    p.cut = memory.take<uint8_t>(p.chunks * a.batch);
    return 0;
}
#endif

// Where a thread stands.
template <class T, int WARPS> struct Place {
    typedef Split<T> P;
    static constexpr int CHANNELS = WARPS * P::WIDTH, THREADS = WARPS * 32;
    const SelectiveTask<T>& p;
    int warp, slice, in_warp, local;  // local: the channel in the block
    i64 block, group, b, chunk, channel, head, first_tile, end_tile;
    bool active;  // there is such a channel
    __device__ explicit Place(const SelectiveTask<T>& task, i64 chunk_index) : p(task), chunk(chunk_index) {
        const int thread = (int)threadIdx.x;
        warp = thread / 32; slice = thread % 32 / P::WIDTH; in_warp = thread % P::WIDTH;
        local = warp * P::WIDTH + in_warp;
        const i64 index = blockIdx.x;
        block = index % p.blocks; group = index / p.blocks % p.a.groups; b = index / p.blocks / p.a.groups;
        const i64 c = block * CHANNELS + local;
        active = c < p.of_group;
        channel = group * p.of_group + (active ? c : 0);
        head = channel / p.share;
        first_tile = chunk * p.length;
        end_tile = first_tile + p.length < p.tiles ? first_tile + p.length : p.tiles;
    }
    __device__ int steps(i64 tile) const {
        const i64 left = p.a.times - tile * Q;
        return left < Q ? (int)left : Q;
    }
    __device__ bool live(i64 t) const { return !p.a.mask || p.a.mask[b * p.a.mask_b + t]; }
    __device__ bool fresh(i64 t) const { return p.a.reset && p.a.reset[b * p.a.reset_b + t]; }
    __device__ bool has(i64 k) const { return active && k < p.a.n; }  // a state of this thread
    __device__ i64 state(i64 k) const { return ((chunk * p.a.batch + b) * p.a.n + k) * p.a.channels + channel; }
    __device__ i64 kept(i64 tile, i64 k) const {  // of tiles 1, 2, ...
        return ((b * (p.tiles - 1) + tile - 1) * p.a.n + k) * p.a.channels + channel;
    }
    __device__ i64 of_chunk() const { return (chunk * p.a.batch + b) * p.a.channels + channel; }
    __device__ T rate(i64 k) const {
        return *of<T>(p.a.A, b * p.a.A_b + head * p.a.decays + (p.a.decays == 1 ? 0 : k));
    }
    __device__ T of_head(const void* x, i64 stride) const { return x ? *of<T>(x, b * stride + head) : T(0); }
    __device__ T timed(const void* x, i64 stride_b, i64 stride_t, i64 t, i64 c) const {
        return *of<T>(x, b * stride_b + t * stride_t + c);
    }
    // The step before its gap, and the slope of softplus.
    __device__ T soft(i64 t, T* slope) const {
        const T x = timed(p.a.dt, p.a.dt_b, p.a.dt_t, t, head) + of_head(p.a.bias, p.a.bias_b);
        *slope = T(1);
        return p.a.softplus ? Elementary<T>::softplus(x, slope) : x;
    }
    __device__ T gap(i64 t) const { return p.a.gap ? timed(p.a.gap, p.a.gap_b, p.a.gap_t, t, 0) : T(1); }
    __device__ T input(i64 t) const { return timed(p.a.u, p.a.u_b, p.a.u_t, t, channel); }
    __device__ T z(i64 t) const { return timed(p.a.z, p.a.z_b, p.a.z_t, t, channel); }
    // The gradient of C h + D u.
    __device__ T output(i64 t) const {
        if (!p.a.grad_y) return T(0);
        const T g = *of<T>(p.a.grad_y, (b * p.a.times + t) * p.a.channels + channel);
        if (!p.a.z) return g;
        const T gate = z(t);
        return g * (gate * Elementary<T>::logistic(gate));
    }
    // B or C of a tile, ROUND states from `k`; 0 where there is none, and at steps that are skipped.
    __device__ void load(T (*to)[ROUND], const void* x, i64 stride_b, i64 stride_t, i64 tile, i64 k) const {
        const int count = steps(tile);
        for (int i = (int)threadIdx.x; i < Q * ROUND; i += THREADS) {
            const int q = i / ROUND;
            const i64 state = k + i % ROUND, t = tile * Q + q;
            const bool there = q < count && state < p.a.n && live(t);
            to[q][i % ROUND] = there ? timed(x, stride_b, stride_t, t, group * p.a.n + state) : T(0);
        }
    }
};

// The sum over the slices of a channel, in each of them.
template <class T> __device__ __forceinline__ T over_slices(T x) {
    UNROLL for (int d = Split<T>::WIDTH; d < 32; d *= 2) x += __shfl_xor_sync(WHOLE_WARP, x, d);
    return x;
}
template <class T> __device__ __forceinline__ double doubles_over_slices(double x) {
    UNROLL for (int d = Split<T>::WIDTH; d < 32; d *= 2) x += __shfl_xor_sync(WHOLE_WARP, x, d);
    return x;
}
// Of WIDTH numbers in each thread, the sums over the channels of a warp: number c in the threads of channel c. x is used up.
template <class T> __device__ __forceinline__ T over_channels(T* x, int in_warp) {
    UNROLL for (int d = Split<T>::WIDTH / 2; d > 0; d /= 2) {
        const bool upper = in_warp & d;
        UNROLL for (int i = 0; i < d; ++i) {
            const T mine = upper ? x[i + d] : x[i], other = upper ? x[i] : x[i + d];
            x[i] = mine + __shfl_xor_sync(WHOLE_WARP, other, d);
        }
    }
    return x[0];
}

// The starts of chunks in the place of their ends, one thread a state of a channel; from the last chunk for the gradient.
template <class T, bool BACKWARD> __global__ void __launch_bounds__(128) selective_starts(SelectiveTask<T> p) {
    const i64 i = (i64)blockIdx.x * 128 + threadIdx.x, per_row = p.a.n * p.a.channels, all = p.a.batch * per_row;
    if (i >= all) return;
    const i64 b = i / per_row, k = i % per_row / p.a.channels, channel = i % p.a.channels;
    const void* first = BACKWARD ? p.a.grad_final : p.a.initial;
    const i64 first_b = BACKWARD ? p.a.channels * p.a.n : p.a.initial_b;
    const T rate = *of<T>(p.a.A, b * p.a.A_b + channel / p.share * p.a.decays + (p.a.decays == 1 ? 0 : k));
    T start = first ? *of<T>(first, b * first_b + channel * p.a.n + k) : T(0);
    constexpr int AHEAD = 8;
    for (i64 done = 0; done < p.chunks; done += AHEAD) {
        T end[AHEAD], passed[AHEAD];
        bool cut[AHEAD];
        UNROLL for (int s = 0; s < AHEAD; ++s)
            if (done + s < p.chunks - 1) {
                const i64 chunk = BACKWARD ? p.chunks - 1 - done - s : done + s;
                end[s] = p.state[chunk * all + i];
                passed[s] = p.passed[(chunk * p.a.batch + b) * p.a.channels + channel];
                cut[s] = p.cut[chunk * p.a.batch + b];
            }
        UNROLL for (int s = 0; s < AHEAD; ++s)
            if (done + s < p.chunks) {
                p.state[(BACKWARD ? p.chunks - 1 - done - s : done + s) * all + i] = start;
                if (done + s == p.chunks - 1) break;
                // nothing passes: also where the factor is not finite
                start = cut[s] || start == T(0) ? end[s] : Elementary<T>::exp(rate * passed[s]) * start + end[s];
            }
    }
}

}  // namespace
