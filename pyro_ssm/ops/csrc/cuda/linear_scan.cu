// The linear recurrence on a GPU: one thread a lane of a row, and a chunk of time.
//
// Chunks, so that few lanes fill the device: (1) each runs from zero and keeps its end and the product of its matrices;
// (2) a thread a lane goes from chunk to chunk; (3) each chunk runs again from its true start. The gradient does the same
// from the last step to the first: the product of adjoints is the adjoint of the product.
#include "device.h"

#include "../linear_scan.h"
#include "../scan_math.h"

namespace {

constexpr int BLOCK = 128, AHEAD = 4, FAR_AHEAD = 8;  // steps whose numbers are read before they are used
constexpr i64 SUMMED_STEPS = 128;

template <class T> struct ScanTask {
    ScanArgs a;
    i64 total, chunks, length;  // rows times lanes; chunks of time and their steps
    T *ends, *products, *sums;  // (chunks, total, numbers): ends of chunks, then starts; products; sums of grad_a
    uint8_t* cut;               // (chunks, total): a reset lies in the chunk
};

template <class T, int R> __device__ __forceinline__ Planes<T, R> load(const T* from) {
    Planes<T, R> x;
    UNROLL for (int r = 0; r < R; ++r) x.p[r] = from[r];
    return x;
}
template <class T, int R> __device__ __forceinline__ void store(T* to, const Planes<T, R>& x) {
    UNROLL for (int r = 0; r < R; ++r) to[r] = x.p[r];
}
template <class T, int R> __device__ __forceinline__ Planes<T, R> zero() {
    Planes<T, R> x;
    UNROLL for (int r = 0; r < R; ++r) x.p[r] = T(0);
    return x;
}

// One lane of one row. Steps k count in the direction of the forward pass.
template <class Kind, class T> struct Lane {
    static constexpr int S = Kind::STATE, M = Kind::MATRIX;
    const ScanTask<T>& p;
    i64 index, row, lane;
    const T *a, *driven;  // driven: b, or the gradient of the states
    i64 a_t, driven_t;
    const uint8_t* reset;
    i64 reset_t;

    __device__ Lane(const ScanTask<T>& task, const Array& of_drive, i64 i) : p(task), index(i) {
        const ScanArgs& s = p.a;
        row = i / s.lanes; lane = i % s.lanes;
        const i64 first = s.reverse ? s.steps - 1 : 0, sign = s.reverse ? -1 : 1;
        a = (const T*)s.a.data + row_offset(s.rows, s.a, row) + (s.a_lane ? lane * M : 0) + first * s.a.t;
        a_t = sign * s.a.t;
        driven = of_drive.data ? start_of(of_drive) + first * of_drive.t : nullptr;
        driven_t = sign * of_drive.t;
        reset = s.reset.data ? (const uint8_t*)s.reset.data + row_offset(s.rows, s.reset, row) + first * s.reset.t : nullptr;
        reset_t = sign * s.reset.t;
    }
    __device__ const T* start_of(const Array& x) const {
        return (const T*)x.data + row_offset(p.a.rows, x, row) + lane * S;
    }
    __device__ Planes<T, S> maybe(const Array& x) const { return x.data ? load<T, S>(start_of(x)) : zero<T, S>(); }
    __device__ Planes<T, M> matrix(i64 k) const { return load<T, M>(a + k * a_t); }
    __device__ Planes<T, S> drive(i64 k) const { return driven ? load<T, S>(driven + k * driven_t) : zero<T, S>(); }
    __device__ bool fresh(i64 k) const { return reset && reset[k * reset_t]; }
    __device__ i64 time(i64 k) const { return p.a.reverse ? p.a.steps - 1 - k : k; }
    // of a result (rows, steps, lanes)
    __device__ i64 at(i64 k) const { return (row * p.a.steps + time(k)) * p.a.lanes + lane; }
    __device__ i64 end(i64 chunk) const {
        const i64 last = (chunk + 1) * p.length;
        return last < p.a.steps ? last : p.a.steps;
    }
    __device__ i64 of_chunk(i64 chunk) const { return chunk * p.total + index; }
};

// (1) of every chunk but the last one.
template <class Kind, class T> __global__ void __launch_bounds__(BLOCK) ends_forward(ScanTask<T> p) {
    constexpr int S = Kind::STATE, M = Kind::MATRIX;
    const i64 i = (i64)blockIdx.x * BLOCK + threadIdx.x, chunk = blockIdx.y;
    if (i >= p.total) return;
    const Lane<Kind, T> x(p, p.a.b, i);
    Planes<T, S> h = zero<T, S>();
    Planes<T, M> product = Kind::template one<T>();
    bool cut = false;
    const i64 end = x.end(chunk);
    for (i64 k = chunk * p.length; k < end; k += AHEAD) {
        Planes<T, M> a[AHEAD];
        Planes<T, S> b[AHEAD];
        bool fresh[AHEAD];
        UNROLL for (int s = 0; s < AHEAD; ++s)
            if (k + s < end) { a[s] = x.matrix(k + s); b[s] = x.drive(k + s); fresh[s] = x.fresh(k + s); }
        UNROLL for (int s = 0; s < AHEAD; ++s)
            if (k + s < end) {
                h = fresh[s] ? b[s] : Kind::advance(a[s], h, b[s]);
                product = Kind::compose(a[s], product);
                cut = cut || fresh[s];
            }
    }
    store<T, S>(p.ends + x.of_chunk(chunk) * S, h);
    store<T, M>(p.products + x.of_chunk(chunk) * M, product);
    p.cut[x.of_chunk(chunk)] = cut;
}

// (1) of every chunk but the first one.
template <class Kind, class T> __global__ void __launch_bounds__(BLOCK) ends_backward(ScanTask<T> p) {
    constexpr int S = Kind::STATE, M = Kind::MATRIX;
    const i64 i = (i64)blockIdx.x * BLOCK + threadIdx.x, chunk = (i64)blockIdx.y + 1;
    if (i >= p.total) return;
    const Lane<Kind, T> x(p, p.a.grad, i);
    Planes<T, S> carry = zero<T, S>();
    Planes<T, M> product = Kind::template one<T>();
    bool cut = false;
    const i64 begin = chunk * p.length;
    for (i64 k = x.end(chunk) - 1; k >= begin; k -= AHEAD) {
        Planes<T, M> a[AHEAD];
        Planes<T, S> g[AHEAD];
        bool fresh[AHEAD];
        UNROLL for (int s = 0; s < AHEAD; ++s)
            if (k - s >= begin) { a[s] = x.matrix(k - s); g[s] = x.drive(k - s); fresh[s] = x.fresh(k - s); }
        UNROLL for (int s = 0; s < AHEAD; ++s)
            if (k - s >= begin) {
                carry = fresh[s] ? zero<T, S>() : Kind::adjoint(a[s], plus(g[s], carry));
                product = Kind::compose(product, a[s]);
                cut = cut || fresh[s];
            }
    }
    store<T, S>(p.ends + x.of_chunk(chunk) * S, carry);
    store<T, M>(p.products + x.of_chunk(chunk) * M, product);
    p.cut[x.of_chunk(chunk)] = cut;
}

// (2) the starts of chunks, in the place of their ends.
template <class Kind, class T, bool BACKWARD> __global__ void __launch_bounds__(BLOCK) starts(ScanTask<T> p) {
    constexpr int S = Kind::STATE, M = Kind::MATRIX;
    const i64 i = (i64)blockIdx.x * BLOCK + threadIdx.x;
    if (i >= p.total) return;
    const Lane<Kind, T> x(p, p.a.b, i);
    Planes<T, S> start = x.maybe(BACKWARD ? p.a.grad_last : p.a.initial);
    for (i64 done = 0; done < p.chunks; done += FAR_AHEAD) {
        Planes<T, M> product[FAR_AHEAD];
        Planes<T, S> end[FAR_AHEAD];
        bool cut[FAR_AHEAD];
        UNROLL for (int s = 0; s < FAR_AHEAD; ++s)
            if (done + s < p.chunks - 1) {
                const i64 at = x.of_chunk(BACKWARD ? p.chunks - 1 - done - s : done + s);
                product[s] = load<T, M>(p.products + at * M);
                end[s] = load<T, S>(p.ends + at * S);
                cut[s] = p.cut[at];
            }
        UNROLL for (int s = 0; s < FAR_AHEAD; ++s)
            if (done + s < p.chunks) {
                store<T, S>(p.ends + x.of_chunk(BACKWARD ? p.chunks - 1 - done - s : done + s) * S, start);
                if (done + s == p.chunks - 1) break;
                bool nothing = cut[s];  // passes: also where the product is not finite
                if (!nothing) {
                    nothing = true;
                    UNROLL for (int r = 0; r < S; ++r) nothing = nothing && start.p[r] == T(0);
                }
                if (nothing) start = end[s];
                else start = BACKWARD ? plus(Kind::adjoint(product[s], start), end[s]) : Kind::advance(product[s], start, end[s]);
            }
    }
}

// (3)
template <class Kind, class T> __global__ void __launch_bounds__(BLOCK) states_forward(ScanTask<T> p) {
    constexpr int S = Kind::STATE, M = Kind::MATRIX;
    const i64 i = (i64)blockIdx.x * BLOCK + threadIdx.x, chunk = blockIdx.y;
    if (i >= p.total) return;
    const Lane<Kind, T> x(p, p.a.b, i);
    Planes<T, S> h = p.chunks > 1 ? load<T, S>(p.ends + x.of_chunk(chunk) * S) : x.maybe(p.a.initial);
    const i64 end = x.end(chunk);
    for (i64 k = chunk * p.length; k < end; k += AHEAD) {
        Planes<T, M> a[AHEAD];
        Planes<T, S> b[AHEAD];
        bool fresh[AHEAD];
        UNROLL for (int s = 0; s < AHEAD; ++s)
            if (k + s < end) { a[s] = x.matrix(k + s); b[s] = x.drive(k + s); fresh[s] = x.fresh(k + s); }
        UNROLL for (int s = 0; s < AHEAD; ++s)
            if (k + s < end) {
                h = fresh[s] ? b[s] : Kind::advance(a[s], h, b[s]);
                if (p.a.states) store<T, S>((T*)p.a.states + x.at(k + s) * S, h);
            }
    }
    if (p.a.last && chunk == p.chunks - 1) store<T, S>((T*)p.a.last + i * S, h);
}

template <class Kind, class T> __global__ void __launch_bounds__(BLOCK) gradients_backward(ScanTask<T> p) {
    constexpr int S = Kind::STATE, M = Kind::MATRIX;
    const i64 i = (i64)blockIdx.x * BLOCK + threadIdx.x, chunk = blockIdx.y;
    if (i >= p.total) return;
    const Lane<Kind, T> x(p, p.a.grad, i);
    Planes<T, S> carry = p.chunks > 1 ? load<T, S>(p.ends + x.of_chunk(chunk) * S) : x.maybe(p.a.grad_last);
    Planes<T, M> sum = zero<T, M>(), total = zero<T, M>();
    const i64 begin = chunk * p.length;
    i64 since = 0;
    for (i64 k = x.end(chunk) - 1; k >= begin; k -= AHEAD) {
        Planes<T, M> a[AHEAD];
        Planes<T, S> g[AHEAD], before[AHEAD];
        bool fresh[AHEAD];
        UNROLL for (int s = 0; s < AHEAD; ++s)
            if (k - s >= begin) {
                const i64 step = k - s;
                a[s] = x.matrix(step); g[s] = x.drive(step); fresh[s] = x.fresh(step);
                if (!p.a.grad_a) continue;
                before[s] = step ? load<T, S>((const T*)p.a.states + x.at(step - 1) * S) : x.maybe(p.a.initial);
            }
        UNROLL for (int s = 0; s < AHEAD; ++s)
            if (k - s >= begin) {
                const Planes<T, S> adjoint = plus(carry, g[s]);
                if (p.a.grad_b) store<T, S>((T*)p.a.grad_b + x.at(k - s) * S, adjoint);
                carry = fresh[s] ? zero<T, S>() : Kind::adjoint(a[s], adjoint);
                if (!p.a.grad_a) continue;
                const Planes<T, M> outer = fresh[s] ? zero<T, M>() : Kind::outer(adjoint, before[s]);
                if (p.sums) sum = plus(sum, outer);
                else store<T, M>((T*)p.a.grad_a + x.at(k - s) * M, outer);
            }
        since += AHEAD;
        if (since >= SUMMED_STEPS) { total = plus(total, sum); sum = zero<T, M>(); since = 0; }
    }
    if (p.sums) store<T, M>(p.sums + x.of_chunk(chunk) * M, plus(total, sum));
    if (p.a.grad_initial && chunk == 0) store<T, S>((T*)p.a.grad_initial + i * S, carry);
}

}  // namespace

#if !defined(__CUDACC_RTC__)
namespace {

constexpr i64 LEAST_STEPS = 32;  // of a chunk

template <class Kind, class T> ScanTask<T> plan(const ScanArgs& a, bool backward, Workspace& memory) {
    ScanTask<T> p = {};
    p.a = a;
    p.total = row_count(a.rows) * a.lanes;
    const Chunks cut = chunks_of(a.steps, p.total, device_threads(2048), LEAST_STEPS);
    p.chunks = cut.count; p.length = cut.length;
    const i64 all = p.chunks * p.total;
    if (p.chunks > 1) {
        p.ends = memory.take<T>(all * Kind::STATE);
        p.products = memory.take<T>(all * Kind::MATRIX);
        p.cut = memory.take<uint8_t>(all);
    }
    if (backward && a.grad_a && a.grad_a_steps == 1) p.sums = memory.take<T>(all * Kind::MATRIX);
    return p;
}

template <class Kind, class T> int forward(const ScanArgs& a, Workspace& memory, void* stream) {
    const ScanTask<T> p = plan<Kind, T>(a, false, memory);
    if (!memory.base) return 0;
    const i64 blocks = ceil_div(p.total, BLOCK);
    if (p.chunks > 1) {
        TRY(launch(ends_forward<Kind, T>, blocks, p.chunks - 1, BLOCK, p, stream));
        TRY(launch(starts<Kind, T, false>, blocks, 1, BLOCK, p, stream));
    }
    return launch(states_forward<Kind, T>, blocks, p.chunks, BLOCK, p, stream);
}
template <class Kind, class T> int backward(const ScanArgs& a, Workspace& memory, void* stream) {
    const ScanTask<T> p = plan<Kind, T>(a, true, memory);
    if (!memory.base) return 0;
    const i64 blocks = ceil_div(p.total, BLOCK);
    if (p.chunks > 1) {
        TRY(launch(ends_backward<Kind, T>, blocks, p.chunks - 1, BLOCK, p, stream));
        TRY(launch(starts<Kind, T, true>, blocks, 1, BLOCK, p, stream));
    }
    TRY(launch(gradients_backward<Kind, T>, blocks, p.chunks, BLOCK, p, stream));
    return p.sums ? sum_parts(p.sums, (T*)a.grad_a, p.chunks, p.total * Kind::MATRIX, stream) : 0;
}
template <class Kind, class T> int run(const ScanArgs& a, bool back, Workspace& memory, void* stream) {
    return back ? backward<Kind, T>(a, memory, stream) : forward<Kind, T>(a, memory, stream);
}
int dispatch(const ScanArgs& a, bool back, Workspace& memory, void* stream) {
    switch (a.kind) {
        case SCAN_F32: return run<RealKind, float>(a, back, memory, stream);
        case SCAN_F64: return run<RealKind, double>(a, back, memory, stream);
        case SCAN_C64: return run<ComplexKind, float>(a, back, memory, stream);
        case SCAN_C128: return run<ComplexKind, double>(a, back, memory, stream);
        case SCAN_PAIR_F32: return run<PairKind, float>(a, back, memory, stream);
        case SCAN_PAIR_F64: return run<PairKind, double>(a, back, memory, stream);
        default: return (int)cudaErrorInvalidValue;
    }
}

}  // namespace

ENTRY(linear_scan, ScanArgs, dispatch)
#endif
