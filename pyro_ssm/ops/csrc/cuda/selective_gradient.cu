// The gradient of the selective scan on a GPU: chunks of time as forward, from the last one; each tile of steps is first
// run forward again from the state that was kept. Sums over channels and chunks are taken in a fixed order.
#include "selective.h"

namespace {

constexpr int WARPS = 2, BLOCKS = 5;  // warps a block; blocks that a multiprocessor holds at least

// The adjoint of the state at the begin of every chunk but the first, from zero at its end.
template <class T, bool SHARED> __global__ void __launch_bounds__(WARPS * 32, BLOCKS) adjoint_ends(SelectiveTask<T> p) {
    typedef Split<T> P;
    typedef Place<T, WARPS> Here;
    __shared__ T C[Q][ROUND], delta[Q][Here::CHANNELS], out[Q][Here::CHANNELS], decay[SHARED ? Q : 1][Here::CHANNELS];
    __shared__ bool fresh[Q];
    const Here x(p, (i64)blockIdx.y + 1);
    const SelectiveArgs& a = p.a;
    const i64 rounds = (a.n + ROUND - 1) / ROUND;
    T g[P::NS], rate[P::NS], passed = T(0);
    bool cut = false;
    UNROLL for (int j = 0; j < P::NS; ++j) g[j] = rate[j] = T(0);
    for (i64 tile = x.end_tile - 1; tile >= x.first_tile; --tile) {
        const i64 t0 = tile * Q;
        const int steps = x.steps(tile);
        __syncthreads();
        if (threadIdx.x < Q) fresh[threadIdx.x] = (int)threadIdx.x < steps && x.fresh(t0 + threadIdx.x);
        for (int q = x.slice; q < Q; q += P::SLICES) {
            T step = T(0), of_y = T(0), slope;
            if (x.active && q < steps && x.live(t0 + q)) {
                step = x.soft(t0 + q, &slope) * x.gap(t0 + q);
                of_y = x.output(t0 + q);
            }
            delta[q][x.local] = step;
            out[q][x.local] = of_y;
            if (SHARED) decay[q][x.local] = Elementary<T>::exp(step * x.rate(0));
        }
        for (i64 round = 0; round < rounds; ++round) {
            const i64 k = round * ROUND + x.slice * P::NS;
            if (round) __syncthreads();
            x.load(C, a.C, a.C_b, a.C_t, tile, round * ROUND);
            __syncthreads();
            if (rounds > 1 || tile == x.end_tile - 1)
                UNROLL for (int j = 0; j < P::NS; ++j) {
                    const bool there = x.has(k + j);
                    rate[j] = there ? x.rate(k + j) : T(0);
                    g[j] = there && tile < x.end_tile - 1 ? p.state[x.state(k + j)] : T(0);
                }
            for (int q = steps - 1; q >= 0; --q) {
                const T step = delta[q][x.local], of_y = out[q][x.local];
                const bool anew = fresh[q];
                UNROLL for (int j = 0; j < P::NS; ++j) {
                    const T f = SHARED ? decay[q][x.local] : Elementary<T>::exp(step * rate[j]);
                    g[j] = anew ? T(0) : f * (g[j] + of_y * C[q][x.slice * P::NS + j]);
                }
            }
            if (rounds > 1 || tile == x.first_tile)
                UNROLL for (int j = 0; j < P::NS; ++j)
                    if (x.has(k + j)) p.state[x.state(k + j)] = g[j];
        }
        for (int q = 0; q < steps; ++q) { passed += delta[q][x.local]; cut = cut || fresh[q]; }
    }
    if (x.slice == 0 && x.active) p.passed[x.of_chunk()] = passed;
    if (threadIdx.x == 0 && x.block == 0 && x.group == 0) p.cut[x.chunk * a.batch + x.b] = cut;
}

template <class T, bool SHARED> __global__ void __launch_bounds__(WARPS * 32, BLOCKS) selective_gradients(SelectiveTask<T> p) {
    typedef Split<T> P;
    typedef Place<T, WARPS> Here;
    constexpr int THREADS = WARPS * 32, CHANNELS = Here::CHANNELS;
    __shared__ T B[Q][ROUND], C[Q][ROUND], delta[Q][CHANNELS], drive[Q][CHANNELS], out[Q][CHANNELS];
    __shared__ T decay[SHARED ? Q : 1][CHANNELS], value[Q][CHANNELS], of_drive[Q][CHANNELS], of_delta[Q][CHANNELS];
    __shared__ T trail[Q][P::NS][THREADS], part[Q][WARPS][32];
    __shared__ bool fresh[Q];
    const Here x(p, blockIdx.y);
    const SelectiveArgs& a = p.a;
    const i64 rounds = (a.n + ROUND - 1) / ROUND, sums = a.batch * a.times * a.groups * a.n;
    const int me = (int)threadIdx.x;
    const T D = x.of_head(a.D, a.D_b);
    const bool gated = a.z && a.grad_z;
    T g[P::NS], rate[P::NS];
    double of_A[P::NS], of_D = 0, of_bias = 0;
    UNROLL for (int j = 0; j < P::NS; ++j) { g[j] = rate[j] = T(0); of_A[j] = 0; }
    for (i64 tile = x.end_tile - 1; tile >= x.first_tile; --tile) {
        const i64 t0 = tile * Q;
        const int steps = x.steps(tile);
        __syncthreads();
        if (me < Q) fresh[me] = me < steps && x.fresh(t0 + me);
        for (int q = x.slice; q < Q; q += P::SLICES) {
            T step = T(0), u = T(0), of_y = T(0), slope;
            if (x.active && q < steps && x.live(t0 + q)) {
                step = x.soft(t0 + q, &slope) * x.gap(t0 + q);
                u = x.input(t0 + q);
                of_y = x.output(t0 + q);
            }
            delta[q][x.local] = step;
            drive[q][x.local] = step * u;
            out[q][x.local] = of_y;
            value[q][x.local] = D * u;
            of_drive[q][x.local] = of_delta[q][x.local] = T(0);
            if (SHARED) decay[q][x.local] = Elementary<T>::exp(step * x.rate(0));
        }
        for (i64 round = 0; round < rounds; ++round) {
            const i64 k = round * ROUND + x.slice * P::NS;
            if (round) __syncthreads();
            x.load(B, a.B, a.B_b, a.B_t, tile, round * ROUND);
            x.load(C, a.C, a.C_b, a.C_t, tile, round * ROUND);
            __syncthreads();
            const bool last_tile = tile == x.end_tile - 1;
            if (rounds > 1 || last_tile)
                UNROLL for (int j = 0; j < P::NS; ++j) {
                    const bool there = x.has(k + j);
                    rate[j] = there ? x.rate(k + j) : T(0);
                    g[j] = there ? p.state[x.state(k + j)] : T(0);
                    if (!SHARED && rounds > 1) of_A[j] = there && !last_tile ? p.A[x.state(k + j)] : 0.0;
                }
            T after[P::NS], rate_sum[P::NS];
            UNROLL for (int j = 0; j < P::NS; ++j) {
                after[j] = T(0);
                if (x.has(k + j) && tile) after[j] = *of<T>(a.kept, x.kept(tile, k + j));
                else if (x.has(k + j) && a.initial) after[j] = *of<T>(a.initial, x.b * a.initial_b + x.channel * a.n + k + j);
                rate_sum[j] = T(0);
            }
            for (int q = 0; q < steps; ++q) {
                const T step = delta[q][x.local], v = drive[q][x.local];
                const bool anew = fresh[q];
                T y = T(0);
                UNROLL for (int j = 0; j < P::NS; ++j) {
                    trail[q][j][me] = after[j];
                    const T f = SHARED ? decay[q][x.local] : Elementary<T>::exp(step * rate[j]);
                    after[j] = (anew ? T(0) : f * after[j]) + v * B[q][x.slice * P::NS + j];
                    y += after[j] * C[q][x.slice * P::NS + j];
                }
                if (!gated) continue;
                y = over_slices(y);
                if (q % P::SLICES == x.slice) value[q][x.local] += y;
            }
            for (int q = steps - 1; q >= 0; --q) {
                const T step = delta[q][x.local], v = drive[q][x.local], of_y = out[q][x.local];
                const bool anew = fresh[q];
                T to_drive = T(0), to_delta = T(0), of_B_C[P::WIDTH];  // those of B, then those of C: WIDTH = 2 NS
                UNROLL for (int j = 0; j < P::NS; ++j) {
                    const T before = trail[q][j][me];
                    g[j] += of_y * C[q][x.slice * P::NS + j];
                    to_drive += g[j] * B[q][x.slice * P::NS + j];
                    of_B_C[j] = g[j] * v;
                    of_B_C[P::NS + j] = of_y * after[j];
                    const T f = SHARED ? decay[q][x.local] : Elementary<T>::exp(step * rate[j]);
                    g[j] = anew ? T(0) : f * g[j];
                    const T of_exponent = anew ? T(0) : g[j] * before;
                    to_delta += of_exponent * rate[j];
                    rate_sum[j] += of_exponent * step;
                    after[j] = before;
                }
                to_drive = over_slices(to_drive);
                to_delta = over_slices(to_delta);
                if (q % P::SLICES == x.slice) {
                    of_drive[q][x.local] += to_drive;
                    of_delta[q][x.local] += to_delta;
                }
                part[q][x.warp][me % 32] = over_channels(of_B_C, x.in_warp);
            }
            UNROLL for (int j = 0; j < P::NS; ++j) {
                of_A[SHARED ? 0 : j] += (double)rate_sum[j];
                if (!x.has(k + j)) continue;
                if (rounds > 1 || tile == x.first_tile) p.state[x.state(k + j)] = g[j];
                if (!SHARED && (rounds > 1 || tile == x.first_tile)) p.A[x.state(k + j)] = of_A[j];
            }
            __syncthreads();
            // of the sums over channels: thread (slice, c) of each warp holds state slice * NS + c of B, or c - NS of C
            for (int i = me; i < steps * 32; i += THREADS) {
                const int q = i / 32, c = i % P::WIDTH, within = i % 32 / P::WIDTH * P::NS + c % P::NS;
                const i64 state = round * ROUND + within;
                T sum = T(0);
                UNROLL for (int w = 0; w < WARPS; ++w) sum += part[q][w][i % 32];
                T* to = c < P::NS ? p.B : p.C;
                if (!to || state >= a.n) continue;
                to[x.block * sums + ((x.b * a.times + t0 + q) * a.groups + x.group) * a.n + state] = x.live(t0 + q) ? sum : T(0);
            }
        }
        // from the gradients of step, drive and output to those of the arguments
        for (int q = x.slice; q < steps; q += P::SLICES) {
            const i64 t = t0 + q, row = x.b * a.times + t, to = row * a.channels + x.channel;
            T of_gap = T(0), of_step = T(0), of_u = T(0), of_z = T(0);
            if (x.active && x.live(t)) {
                T slope;
                const T soft = x.soft(t, &slope), u = x.input(t), of_y = out[q][x.local];
                const T of_whole = of_delta[q][x.local] + of_drive[q][x.local] * u;
                of_u = of_drive[q][x.local] * delta[q][x.local] + of_y * D;
                of_step = of_whole * x.gap(t) * slope;
                of_gap = of_whole * soft;
                if (gated && a.grad_y) {
                    const T z = x.z(t), s = Elementary<T>::logistic(z);
                    of_z = *of<T>(a.grad_y, to) * value[q][x.local] * s * (T(1) + z * (T(1) - s));
                }
                of_bias += (double)of_step;
                of_D += (double)(of_y * u);
            }
            value[q][x.local] = of_gap;
            if (!x.active) continue;
            if (a.grad_u) *of<T>(a.grad_u, to) = of_u;
            if (a.grad_z) *of<T>(a.grad_z, to) = of_z;
            if (p.step) p.step[to] = of_step;
        }
        if (!p.gap) continue;
        __syncthreads();
        if (me >= steps) continue;
        T sum = T(0);
        for (int c = 0; c < CHANNELS; ++c) sum += value[me][c];
        p.gap[((x.block * a.groups + x.group) * a.batch + x.b) * a.times + t0 + me] = sum;
    }
    if (a.grad_initial && x.chunk == 0)
        for (i64 k = x.slice * P::NS; k < a.n; k += ROUND)
            UNROLL for (int j = 0; j < P::NS; ++j)
                if (x.has(k + j))
                    *of<T>(a.grad_initial, (x.b * a.channels + x.channel) * a.n + k + j) = p.state[x.state(k + j)];
    if (!SHARED && x.first_tile >= x.end_tile)  // no steps
        for (i64 k = x.slice * P::NS; k < a.n; k += ROUND)
            UNROLL for (int j = 0; j < P::NS; ++j)
                if (x.has(k + j)) p.A[x.state(k + j)] = 0;
    of_D = doubles_over_slices<T>(of_D);
    of_bias = doubles_over_slices<T>(of_bias);
    const double of_rate = SHARED ? doubles_over_slices<T>(of_A[0]) : 0.0;
    if (x.slice || !x.active) return;
    if (SHARED) p.A[x.of_chunk()] = of_rate;
    p.D[x.of_chunk()] = of_D;
    p.bias[x.of_chunk()] = of_bias;
}

// out (batch, heads, size) = sums of in (chunks, batch, size, channels) over chunks and the channels of a head.
template <class T> struct Heads { const double* in; T* out; i64 chunks, batch, heads, share, size; };

template <class T> __global__ void __launch_bounds__(128) to_heads(Heads<T> p) {
    __shared__ double sums[128];
    const i64 i = blockIdx.x, k = i % p.size, head = i / p.size % p.heads, b = i / p.size / p.heads;
    const i64 channels = p.heads * p.share;
    const int me = (int)threadIdx.x;
    double sum = 0;
    for (i64 item = me; item < p.chunks * p.share; item += 128)
        sum += p.in[((item / p.share * p.batch + b) * p.size + k) * channels + head * p.share + item % p.share];
    sums[me] = sum;
    for (int half = 64; half > 0; half /= 2) {
        __syncthreads();
        if (me < half) sums[me] += sums[me + half];
    }
    if (me == 0) p.out[i] = (T)sums[0];
}
// out (rows, heads) = sums of in (rows, heads, share) over the last.
template <class T> struct StepsOfHeads { const T* in; T* out; i64 size, share; };

template <class T> __global__ void __launch_bounds__(128) steps_to_heads(StepsOfHeads<T> p) {
    const i64 i = (i64)blockIdx.x * 128 + threadIdx.x;
    if (i >= p.size) return;
    T sum = T(0);
    for (i64 c = 0; c < p.share; ++c) sum += p.in[i * p.share + c];
    p.out[i] = sum;
}

}  // namespace

#if !defined(__CUDACC_RTC__)
int selective_forward(const SelectiveArgs& a, Workspace& memory, void* stream);

namespace {

template <class T, bool SHARED> int backward(const SelectiveArgs& a, Workspace& memory, void* stream) {
    SelectiveTask<T> p = {};
    fill(p, a, WARPS, memory);
    const i64 rows = a.batch * a.times, sums = rows * a.groups * a.n, per_channel = p.chunks * a.batch * a.channels;
    p.B = a.grad_B && p.blocks > 1 ? memory.take<T>(p.blocks * sums) : (T*)a.grad_B;
    p.C = a.grad_C && p.blocks > 1 ? memory.take<T>(p.blocks * sums) : (T*)a.grad_C;
    const i64 gaps = p.blocks * a.groups;
    p.gap = a.grad_gap && gaps > 1 ? memory.take<T>(gaps * rows) : (T*)a.grad_gap;
    p.step = a.grad_dt && p.share > 1 ? memory.take<T>(rows * a.channels) : (T*)a.grad_dt;
    const i64 size = SHARED ? 1 : a.n;  // rates that have sums of their own
    p.A = memory.take<double>(per_channel * size);
    p.D = memory.take<double>(per_channel);
    p.bias = memory.take<double>(per_channel);
    if (!memory.base) return 0;
    const i64 blocks = p.blocks * a.groups * a.batch;
    TRY(launch(adjoint_ends<T, SHARED>, blocks, p.chunks - 1, WARPS * 32, p, stream));
    TRY(launch(selective_starts<T, true>, ceil_div(a.batch * a.n * a.channels, 128), 1, 128, p, stream));
    TRY(launch(selective_gradients<T, SHARED>, blocks, p.chunks, WARPS * 32, p, stream));
    if (a.grad_B && p.blocks > 1) TRY(sum_parts(p.B, (T*)a.grad_B, p.blocks, sums, stream));
    if (a.grad_C && p.blocks > 1) TRY(sum_parts(p.C, (T*)a.grad_C, p.blocks, sums, stream));
    if (a.grad_gap && gaps > 1) TRY(sum_parts(p.gap, (T*)a.grad_gap, gaps, rows, stream));
    if (a.grad_dt && p.share > 1) {
        const StepsOfHeads<T> task = {p.step, (T*)a.grad_dt, rows * a.heads, p.share};
        TRY(launch(steps_to_heads<T>, ceil_div(task.size, 128), 1, 128, task, stream));
    }
    const double* const in[] = {p.A, p.D, p.bias};
    void* const out[] = {a.grad_A, a.grad_D, a.grad_bias};
    for (int i = 0; i < 3; ++i) {
        if (!out[i]) continue;
        const Heads<T> task = {in[i], (T*)out[i], p.chunks, a.batch, a.heads, p.share, i ? 1 : size};
        TRY(launch(to_heads<T>, a.batch * a.heads * task.size, 1, 128, task, stream));
    }
    return 0;
}
int run(const SelectiveArgs& a, bool back, Workspace& memory, void* stream) {
    if (!back) return selective_forward(a, memory, stream);
    if (a.decays == 1 && a.n > 1)
        return a.doubles ? backward<double, true>(a, memory, stream) : backward<float, true>(a, memory, stream);
    return a.doubles ? backward<double, false>(a, memory, stream) : backward<float, false>(a, memory, stream);
}

}  // namespace

ENTRY(selective, SelectiveArgs, run)
#endif
