// The selective scan on a GPU, forward: (1) every chunk of time but the last from zero, for its end; (2) the starts of
// chunks; (3) all of them from there, with outputs. One chunk where the channels of all rows fill the device.
#include "selective.h"

namespace {

constexpr int WARPS = 4, BLOCKS = 4;  // warps a block; blocks that a multiprocessor holds at least

template <class T, bool SHARED, bool ENDS>  // SHARED: one decay for all states of a channel; ENDS: (1), else (3)
__global__ void __launch_bounds__(WARPS * 32, BLOCKS) selective_states(SelectiveTask<T> p) {
    typedef Split<T> P;
    typedef Place<T, WARPS> Here;
    __shared__ T B[Q][ROUND], C[Q][ROUND], delta[Q][Here::CHANNELS], drive[Q][Here::CHANNELS];
    __shared__ T decay[SHARED ? Q : 1][Here::CHANNELS], out[Q][Here::CHANNELS];
    __shared__ bool fresh[Q];
    const Here x(p, blockIdx.y);
    const SelectiveArgs& a = p.a;
    const i64 rounds = (a.n + ROUND - 1) / ROUND;
    const T D = x.of_head(a.D, a.D_b);
    T h[P::NS], rate[P::NS], passed = T(0);
    bool cut = false;
    UNROLL for (int j = 0; j < P::NS; ++j) h[j] = rate[j] = T(0);
    for (i64 tile = x.first_tile; tile < x.end_tile; ++tile) {
        const i64 t0 = tile * Q;
        const int steps = x.steps(tile);
        __syncthreads();  // all have done with the tile before
        if (threadIdx.x < Q) fresh[threadIdx.x] = (int)threadIdx.x < steps && x.fresh(t0 + threadIdx.x);
        for (int q = x.slice; q < Q; q += P::SLICES) {
            T step = T(0), u = T(0), slope;
            if (x.active && q < steps && x.live(t0 + q)) {
                step = x.soft(t0 + q, &slope) * x.gap(t0 + q);
                u = x.input(t0 + q);
            }
            delta[q][x.local] = step;
            drive[q][x.local] = step * u;
            out[q][x.local] = D * u;
            if (SHARED) decay[q][x.local] = Elementary<T>::exp(step * x.rate(0));
        }
        for (i64 round = 0; round < rounds; ++round) {
            const i64 k = round * ROUND + x.slice * P::NS;
            if (round) __syncthreads();
            x.load(B, a.B, a.B_b, a.B_t, tile, round * ROUND);
            if (!ENDS) x.load(C, a.C, a.C_b, a.C_t, tile, round * ROUND);
            __syncthreads();
            if (rounds > 1 || tile == x.first_tile)
                UNROLL for (int j = 0; j < P::NS; ++j) {
                    const bool there = x.has(k + j);
                    rate[j] = there ? x.rate(k + j) : T(0);
                    h[j] = there && !(ENDS && tile == x.first_tile) ? p.state[x.state(k + j)] : T(0);
                }
            if (!ENDS && a.kept && tile)
                UNROLL for (int j = 0; j < P::NS; ++j)
                    if (x.has(k + j)) *of<T>(a.kept, x.kept(tile, k + j)) = h[j];
            for (int q = 0; q < steps; ++q) {
                const T step = delta[q][x.local], v = drive[q][x.local];
                const bool anew = fresh[q];
                T y = T(0);
                UNROLL for (int j = 0; j < P::NS; ++j) {
                    const T f = SHARED ? decay[q][x.local] : Elementary<T>::exp(step * rate[j]);
                    h[j] = (anew ? T(0) : f * h[j]) + v * B[q][x.slice * P::NS + j];
                    if (!ENDS) y += h[j] * C[q][x.slice * P::NS + j];
                }
                if (ENDS) continue;
                y = over_slices(y);
                if (q % P::SLICES == x.slice) out[q][x.local] += y;
            }
            if (rounds > 1 || tile == x.end_tile - 1)
                UNROLL for (int j = 0; j < P::NS; ++j)
                    if (x.has(k + j)) p.state[x.state(k + j)] = h[j];
        }
        if constexpr (ENDS) {
            for (int q = 0; q < steps; ++q) { passed += delta[q][x.local]; cut = cut || fresh[q]; }
        } else {
            for (int q = x.slice; q < steps; q += P::SLICES) {
                if (!x.active) continue;
                T y = T(0);
                if (x.live(t0 + q)) {
                    y = out[q][x.local];
                    if (a.z) {
                        const T z = x.z(t0 + q);
                        y *= z * Elementary<T>::logistic(z);
                    }
                }
                *of<T>(a.y, (x.b * a.times + t0 + q) * a.channels + x.channel) = y;
            }
        }
    }
    if constexpr (ENDS) {
        if (x.slice == 0 && x.active) p.passed[x.of_chunk()] = passed;
        if (threadIdx.x == 0 && x.block == 0 && x.group == 0) p.cut[x.chunk * a.batch + x.b] = cut;
    } else {
        if (x.chunk < p.chunks - 1) return;
        for (i64 k = x.slice * P::NS; k < a.n; k += ROUND)
            UNROLL for (int j = 0; j < P::NS; ++j)
                if (x.has(k + j)) *of<T>(a.final, (x.b * a.channels + x.channel) * a.n + k + j) = p.state[x.state(k + j)];
    }
}

}  // namespace

#if !defined(__CUDACC_RTC__)
namespace {

template <class T, bool SHARED> int forward(const SelectiveArgs& a, Workspace& memory, void* stream) {
    SelectiveTask<T> p = {};
    fill(p, a, WARPS, memory);
    if (!memory.base) return 0;
    const i64 blocks = p.blocks * a.groups * a.batch;
    TRY(launch(selective_states<T, SHARED, true>, blocks, p.chunks - 1, WARPS * 32, p, stream));
    TRY(launch(selective_starts<T, false>, ceil_div(a.batch * a.n * a.channels, 128), 1, 128, p, stream));
    return launch(selective_states<T, SHARED, false>, blocks, p.chunks, WARPS * 32, p, stream);
}

}  // namespace

int selective_forward(const SelectiveArgs& a, Workspace& memory, void* stream) {
    if (a.decays == 1 && a.n > 1)
        return a.doubles ? forward<double, true>(a, memory, stream) : forward<float, true>(a, memory, stream);
    return a.doubles ? forward<double, false>(a, memory, stream) : forward<float, false>(a, memory, stream);
}
#endif
