// A bank of diagonal systems on a GPU: a thread has one state of a channel at a time, the 16 threads of a channel take its
// states in rounds. Chunks of time as in linear_scan.cu, where few channels fill the device; a matrix that does not change
// is its own power over a chunk. Steps are taken in tiles of BANK_STEPS, before each of which the states are kept.
#include "device.h"

#include "../diag_lti.h"
#include "../scan_math.h"

namespace {

constexpr int BLOCK = 128, ROUND = 16, CHANNELS = BLOCK / ROUND;  // threads a block; states a round; channels a block
constexpr int SOME = 16;  // steps whose states are held at a time by the gradient

template <class T> struct BankTask {
    BankArgs a;
    i64 blocks;                  // of channels, a row of the batch
    i64 tiles, chunks, length;   // of time: tiles of BANK_STEPS; chunks, and their tiles
    T* state;                    // (chunks, batch, channels, n, 2): ends of chunks, then starts; in use between rounds
    uint8_t* cut;                // (chunks, batch): a reset lies in the chunk
    double *of_a, *of_b, *of_C;  // (chunks, batch, channels, n, 2): shares of gradients
};

// Where a thread stands.
template <class T> struct Here {
    typedef Planes<T, 2> Z;
    const BankArgs& a;
    i64 b, chunk, channel, k, per_row;
    i64 first_tile, end_tile, batch_chunk;
    int slice, local;
    bool active;  // there is such a channel
    __device__ Here(const BankTask<T>& p, i64 chunk_index) : a(p.a), chunk(chunk_index), k(0) {
        slice = (int)threadIdx.x % ROUND; local = (int)threadIdx.x / ROUND;
        b = (i64)blockIdx.x / p.blocks;
        const i64 c = (i64)blockIdx.x % p.blocks * CHANNELS + local;
        active = c < a.channels;
        channel = active ? c : 0;
        per_row = a.channels * a.n;
        first_tile = chunk * p.length;
        end_tile = first_tile + p.length < p.tiles ? first_tile + p.length : p.tiles;
        batch_chunk = chunk * a.batch + b;
    }
    __device__ bool has() const { return active && k < a.n; }
    __device__ int steps(i64 tile) const {
        const i64 left = a.times - tile * BANK_STEPS;
        return left < BANK_STEPS ? (int)left : (int)BANK_STEPS;
    }
    __device__ Z zero() const { return {{T(0), T(0)}}; }
    __device__ Z load(const T* from) const { return {{from[0], from[1]}}; }
    __device__ void store(T* to, const Z& z) const { to[0] = z.p[0]; to[1] = z.p[1]; }
    __device__ i64 place() const { return channel * a.n + k; }  // of a state in its row
    __device__ Z of_state(const void* x, i64 stride) const {
        return x && has() ? load(of<T>(x, b * stride + place() * 2)) : zero();
    }
    __device__ T* in(T* x) const { return x + (batch_chunk * per_row + place()) * 2; }  // (chunks, batch, channels, n, 2)
    __device__ T* result(void* x) const { return of<T>(x, (b * per_row + place()) * 2); }
    __device__ T* kept(i64 tile) const { return of<T>(a.kept, ((tile * a.batch + b) * per_row + place()) * 2); }
    __device__ T input(i64 t) const { return active ? *of<T>(a.u, b * a.u_b + t * a.u_t + channel) : T(0); }
    __device__ i64 at(i64 t) const { return (b * a.times + t) * a.channels + channel; }
    __device__ T outer(i64 t) const { return active && a.grad_y ? *of<T>(a.grad_y, at(t)) : T(0); }
    __device__ bool fresh(i64 t) const { return a.reset && a.reset[b * a.reset_b + t]; }
};

template <class T> __device__ __forceinline__ Planes<T, 2> times(T s, const Planes<T, 2>& z) {
    return {{s * z.p[0], s * z.p[1]}};
}
// The sum over the threads of a channel, in each of them.
template <class T> __device__ __forceinline__ T over_states(T x) {
    UNROLL for (int d = 1; d < ROUND; d *= 2) x += __shfl_xor_sync(WHOLE_WARP, x, d);
    return x;
}
__device__ __forceinline__ i64 rounds_of(i64 n) { return (n + ROUND - 1) / ROUND; }

template <class T> __device__ __forceinline__ Planes<T, 2> power_of(Planes<T, 2> a, i64 exponent) {
    Planes<T, 2> power = ComplexKind::one<T>();
    for (; exponent; exponent /= 2) {
        if (exponent % 2) power = ComplexKind::compose(a, power);
        a = ComplexKind::compose(a, a);
    }
    return power;
}

// The end of every chunk but the last, from zero.
template <class T> __global__ void __launch_bounds__(BLOCK) bank_ends(BankTask<T> p) {
    Here<T> x(p, blockIdx.y);
    typedef Planes<T, 2> Z;
    const i64 begin = x.first_tile * BANK_STEPS, end = x.end_tile * BANK_STEPS;
    for (i64 round = 0; round < rounds_of(p.a.n); ++round) {
        x.k = round * ROUND + x.slice;
        const Z a = x.of_state(p.a.a, p.a.a_b), b = x.of_state(p.a.b, p.a.b_b);
        Z h = x.zero();
        bool cut = false;
        for (i64 t = begin; t < end; ++t) {
            const bool fresh = x.fresh(t);
            const Z drive = times(x.input(t), b);
            h = fresh ? drive : ComplexKind::advance(a, h, drive);
            cut = cut || fresh;
        }
        if (x.has()) x.store(x.in(p.state), h);
        if (round == 0 && threadIdx.x == 0 && (i64)blockIdx.x % p.blocks == 0) p.cut[x.batch_chunk] = cut;
    }
}

// The adjoint of the state before every chunk but the first, from zero at its end.
template <class T> __global__ void __launch_bounds__(BLOCK) bank_adjoint_ends(BankTask<T> p) {
    Here<T> x(p, (i64)blockIdx.y + 1);
    typedef Planes<T, 2> Z;
    const i64 begin = x.first_tile * BANK_STEPS;
    const i64 end = x.end_tile * BANK_STEPS < p.a.times ? x.end_tile * BANK_STEPS : p.a.times;
    for (i64 round = 0; round < rounds_of(p.a.n); ++round) {
        x.k = round * ROUND + x.slice;
        const Z a = x.of_state(p.a.a, p.a.a_b), C = x.of_state(p.a.C, p.a.C_b), conj_C = {{C.p[0], -C.p[1]}};
        Z carry = x.zero();
        bool cut = false;
        for (i64 t = end - 1; t >= begin; --t) {
            const bool fresh = x.fresh(t);
            carry = fresh ? x.zero() : ComplexKind::adjoint(a, plus(carry, times(x.outer(t), conj_C)));
            cut = cut || fresh;
        }
        if (x.has()) x.store(x.in(p.state), carry);
        if (round == 0 && threadIdx.x == 0 && (i64)blockIdx.x % p.blocks == 0) p.cut[x.batch_chunk] = cut;
    }
}

// The starts of chunks in the place of their ends, one thread a state; from the last chunk for the gradient.
template <class T, bool BACKWARD> __global__ void __launch_bounds__(128) bank_starts(BankTask<T> p) {
    typedef Planes<T, 2> Z;
    const i64 i = (i64)blockIdx.x * 128 + threadIdx.x, per_row = p.a.channels * p.a.n, all = p.a.batch * per_row;
    if (i >= all) return;
    const i64 b = i / per_row, place = i % per_row * 2;
    const T* matrix = of<T>(p.a.a, b * p.a.a_b + place);
    const Z a = {{matrix[0], matrix[1]}}, power = power_of(a, p.length * BANK_STEPS);
    const Z last = BACKWARD ? power_of(a, p.a.times - (p.chunks - 1) * p.length * BANK_STEPS) : power;
    const void* first = BACKWARD ? p.a.grad_final : p.a.initial;
    const T* from = first ? of<T>(first, b * (BACKWARD ? per_row * 2 : p.a.initial_b) + place) : nullptr;
    Z start = {{from ? from[0] : T(0), from ? from[1] : T(0)}};
    for (i64 done = 0; done < p.chunks; ++done) {
        const i64 chunk = BACKWARD ? p.chunks - 1 - done : done;
        T* here = p.state + (chunk * all + i) * 2;
        const Z end = {{here[0], here[1]}};
        here[0] = start.p[0]; here[1] = start.p[1];
        if (done == p.chunks - 1) break;
        const Z passed = {{BACKWARD && !done ? last.p[0] : power.p[0], BACKWARD && !done ? last.p[1] : power.p[1]}};
        // nothing passes: also where the power is not finite
        const bool nothing = p.cut[chunk * p.a.batch + b] || (start.p[0] == T(0) && start.p[1] == T(0));
        if (nothing) start = end;
        else if (BACKWARD) start = plus(ComplexKind::adjoint(passed, start), end);
        else start = ComplexKind::advance(passed, start, end);
    }
}

// Every chunk from its start, with outputs.
template <class T> __global__ void __launch_bounds__(BLOCK) bank_states(BankTask<T> p) {
    Here<T> x(p, blockIdx.y);
    typedef Planes<T, 2> Z;
    for (i64 round = 0; round < rounds_of(p.a.n); ++round) {
        x.k = round * ROUND + x.slice;
        const Z a = x.of_state(p.a.a, p.a.a_b), b = x.of_state(p.a.b, p.a.b_b), C = x.of_state(p.a.C, p.a.C_b);
        Z h = x.of_state(p.a.initial, p.a.initial_b);
        if (p.chunks > 1) h = x.has() ? x.load(x.in(p.state)) : x.zero();
        for (i64 tile = x.first_tile; tile < x.end_tile; ++tile) {
            if (p.a.kept && x.has()) x.store(x.kept(tile), h);
            const int steps = x.steps(tile);
            for (int q = 0; q < steps; ++q) {
                const i64 t = tile * BANK_STEPS + q;
                const Z drive = times(x.input(t), b);
                h = x.fresh(t) ? drive : ComplexKind::advance(a, h, drive);
                const T y = over_states(C.p[0] * h.p[0] - C.p[1] * h.p[1]);
                if (!x.active || q % ROUND != x.slice) continue;
                T* to = of<T>(p.a.y, x.at(t));  // of one step, the same thread in every round
                *to = round ? *to + y : y;
            }
        }
        if (x.chunk == p.chunks - 1 && x.has()) x.store(x.result(p.a.final), h);
    }
}

// Every chunk backwards from the adjoint at its end. The states of a tile are run through once for those before each SOME
// of its steps, then again for these.
template <class T> __global__ void __launch_bounds__(BLOCK, 4) bank_gradients(BankTask<T> p) {
    constexpr int PARTS = BANK_STEPS / SOME;
    __shared__ T trail[SOME][2][BLOCK];
    Here<T> x(p, blockIdx.y);
    typedef Planes<T, 2> Z;
    const int me = (int)threadIdx.x;
    for (i64 round = 0; round < rounds_of(p.a.n); ++round) {
        x.k = round * ROUND + x.slice;
        const Z a = x.of_state(p.a.a, p.a.a_b), b = x.of_state(p.a.b, p.a.b_b), C = x.of_state(p.a.C, p.a.C_b);
        const Z conj_C = {{C.p[0], -C.p[1]}};
        Z carry = x.of_state(p.a.grad_final, x.per_row * 2);
        if (p.chunks > 1) carry = x.has() ? x.load(x.in(p.state)) : x.zero();
        double of_a[2] = {0, 0}, of_b[2] = {0, 0}, of_C[2] = {0, 0};
        for (i64 tile = x.end_tile - 1; tile >= x.first_tile; --tile) {
            const int steps = x.steps(tile);
            const i64 t0 = tile * BANK_STEPS;
            Z corner[PARTS], sum_a = x.zero(), sum_b = x.zero(), sum_C = x.zero();
            Z h = x.has() ? x.load(x.kept(tile)) : x.zero();
            UNROLL for (int part = 0; part < PARTS; ++part) {
                corner[part] = h;
                if (part == PARTS - 1) break;
                for (int q = part * SOME; q < (part + 1) * SOME && q < steps; ++q) {
                    const Z drive = times(x.input(t0 + q), b);
                    h = x.fresh(t0 + q) ? drive : ComplexKind::advance(a, h, drive);
                }
            }
            UNROLL for (int part = PARTS - 1; part >= 0; --part) {
                const int count = steps - part * SOME < SOME ? steps - part * SOME : SOME;
                const i64 first = t0 + part * SOME;
                h = corner[part];
                for (int q = 0; q < count; ++q) {
                    trail[q][0][me] = h.p[0]; trail[q][1][me] = h.p[1];
                    const Z drive = times(x.input(first + q), b);
                    h = x.fresh(first + q) ? drive : ComplexKind::advance(a, h, drive);
                }
                for (int q = count - 1; q >= 0; --q) {
                    const i64 t = first + q;
                    const T g = x.outer(t);
                    const bool fresh = x.fresh(t);
                    const Z before = {{trail[q][0][me], trail[q][1][me]}};
                    carry = plus(carry, times(g, conj_C));
                    sum_C = plus(sum_C, {{g * h.p[0], -(g * h.p[1])}});
                    sum_b = plus(sum_b, times(x.input(t), carry));
                    if (!fresh) sum_a = plus(sum_a, ComplexKind::outer(carry, before));
                    const T of_u = over_states(b.p[0] * carry.p[0] + b.p[1] * carry.p[1]);
                    if (p.a.grad_u && x.active && q % ROUND == x.slice) {
                        T* to = of<T>(p.a.grad_u, x.at(t));
                        *to = round ? *to + of_u : of_u;
                    }
                    carry = fresh ? x.zero() : ComplexKind::adjoint(a, carry);
                    h = before;
                }
            }
            UNROLL for (int r = 0; r < 2; ++r) {
                of_a[r] += (double)sum_a.p[r]; of_b[r] += (double)sum_b.p[r]; of_C[r] += (double)sum_C.p[r];
            }
        }
        if (!x.has()) continue;
        if (p.a.grad_initial && x.chunk == 0) x.store(x.result(p.a.grad_initial), carry);
        const i64 to = (x.batch_chunk * x.per_row + x.place()) * 2;
        UNROLL for (int r = 0; r < 2; ++r) { p.of_a[to + r] = of_a[r]; p.of_b[to + r] = of_b[r]; p.of_C[to + r] = of_C[r]; }
    }
}

}  // namespace

#if !defined(__CUDACC_RTC__)
namespace {

template <class T> int run_of(const BankArgs& a, bool back, Workspace& memory, void* stream) {
    BankTask<T> p = {};
    p.a = a;
    p.blocks = ceil_div(a.channels, CHANNELS);
    p.tiles = ceil_div(a.times, BANK_STEPS);
    const i64 blocks = a.batch * p.blocks, states = a.batch * a.channels * a.n;
    const Chunks cut = chunks_of(p.tiles, blocks * BLOCK, device_threads(1024), 1);
    p.chunks = cut.count; p.length = cut.length;
    if (p.chunks > 1) { p.state = memory.take<T>(p.chunks * states * 2); p.cut = memory.take<uint8_t>(p.chunks * a.batch); }
    const i64 shares = p.chunks * states * 2;
    if (back) { p.of_a = memory.take<double>(shares); p.of_b = memory.take<double>(shares); p.of_C = memory.take<double>(shares); }
    if (!memory.base) return 0;
    if (p.chunks > 1) {
        TRY(launch(back ? bank_adjoint_ends<T> : bank_ends<T>, blocks, p.chunks - 1, BLOCK, p, stream));
        TRY(launch(back ? bank_starts<T, true> : bank_starts<T, false>, ceil_div(states, 128), 1, 128, p, stream));
    }
    if (!back) return launch(bank_states<T>, blocks, p.chunks, BLOCK, p, stream);
    TRY(launch(bank_gradients<T>, blocks, p.chunks, BLOCK, p, stream));
    if (a.grad_a) TRY(sum_parts(p.of_a, (T*)a.grad_a, p.chunks, states * 2, stream));
    if (a.grad_b) TRY(sum_parts(p.of_b, (T*)a.grad_b, p.chunks, states * 2, stream));
    if (a.grad_C) TRY(sum_parts(p.of_C, (T*)a.grad_C, p.chunks, states * 2, stream));
    return 0;
}
int run(const BankArgs& a, bool back, Workspace& memory, void* stream) {
    return a.doubles ? run_of<double>(a, back, memory, stream) : run_of<float>(a, back, memory, stream);
}

}  // namespace

ENTRY(diag_lti, BankArgs, run)
#endif
