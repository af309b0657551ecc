// The short convolution on a GPU. A thread finds the steps that its window holds itself, by going over the mask: forward
// in time for gradients, backward for values. Nothing is carried, so every step is a thread of its own.
#include "device.h"

#include "../causal_conv1d.h"

namespace {

constexpr int BLOCK = 128;
constexpr i64 CHUNK = 256, SUMMED = 64;  // steps of a share of the gradient of the weights; summed before they are doubles

template <class T> struct ConvolveTask {
    ConvolveArgs a;
    i64 tiles, chunks;         // blocks of channels; chunks of steps
    double *weight, *bias;     // (chunks, batch, channels, taps), (chunks, batch, channels)
};

// One channel of one row of the batch.
template <class T> struct Series {
    const ConvolveArgs& a;
    i64 b, c;
    bool active;
    __device__ Series(const ConvolveTask<T>& p, i64 block) : a(p.a) {
        b = block / p.tiles;
        const i64 channel = block % p.tiles * BLOCK + threadIdx.x;
        active = channel < a.channels;
        c = active ? channel : 0;
    }
    __device__ bool live(i64 t) const { return !a.mask || a.mask[b * a.mask_b + t]; }
    __device__ bool fresh(i64 t) const { return a.reset && a.reset[b * a.reset_b + t]; }
    __device__ T x(i64 t) const { return *of<T>(a.x, b * a.x_b + t * a.x_t + c); }
    __device__ T weight(i64 k) const { return *of<T>(a.weight, b * a.weight_b + c * a.taps + k); }
    __device__ T initial(i64 k) const { return a.initial ? *of<T>(a.initial, b * a.initial_b + k * a.channels + c) : T(0); }
    __device__ i64 step(i64 t) const { return (b * a.times + t) * a.channels + c; }
    __device__ i64 kept(i64 k) const { return (b * (a.taps - 1) + k) * a.channels + c; }
    // fn(j, value): the inputs before step t, the latest (j = 0) first, `count` of them or up to a reset. `cut`: a reset at
    // step t itself.
    template <class Fn> __device__ void before(i64 t, i64 count, bool cut, Fn fn) const {
        if (cut) return;
        i64 j = 0;
        for (i64 s = t - 1; s >= 0 && j < count; --s) {
            if (live(s)) fn(j++, x(s));
            if (fresh(s)) return;
        }
        for (i64 k = a.taps - 2; k >= 0 && j < count; --k) fn(j++, initial(k));
    }
    // The gradient of an input that the window has held since before step t, at `place` from its end (0: the latest).
    __device__ T later(i64 t, i64 place) const {
        T sum = T(0);
        for (; t < a.times && place < a.taps - 1; ++t) {
            if (fresh(t)) return sum;
            if (!live(t)) continue;
            ++place;
            if (a.grad_y) sum += *of<T>(a.grad_y, step(t)) * weight(a.taps - 1 - place);
        }
        // as long as it is still there at the end
        if (place < a.taps - 1 && a.grad_final) sum += *of<T>(a.grad_final, kept(a.taps - 2 - place));
        return sum;
    }
};

// Steps 0 to times - 1: outputs; one more: the final window.
template <class T> __global__ void __launch_bounds__(BLOCK) outputs(ConvolveTask<T> p) {
    const i64 t = (i64)blockIdx.x % (p.a.times + 1);
    const Series<T> s(p, (i64)blockIdx.x / (p.a.times + 1));
    const ConvolveArgs& a = p.a;
    if (!s.active) return;
    if (t == a.times) {
        for (i64 k = 0; k + 1 < a.taps; ++k) *of<T>(a.final, s.kept(k)) = T(0);
        s.before(t, a.taps - 1, false, [&](i64 j, T x) { *of<T>(a.final, s.kept(a.taps - 2 - j)) = x; });
        return;
    }
    T y = T(0);
    if (s.live(t)) {
        y = (a.bias ? *of<T>(a.bias, s.b * a.bias_b + s.c) : T(0)) + s.x(t) * s.weight(a.taps - 1);
        s.before(t, a.taps - 1, s.fresh(t), [&](i64 j, T x) { y += x * s.weight(a.taps - 2 - j); });
    }
    *of<T>(a.y, s.step(t)) = y;
}

// Steps 0 to times - 1: gradients of inputs; one more: of the initial window.
template <class T> __global__ void __launch_bounds__(BLOCK) of_inputs(ConvolveTask<T> p) {
    const i64 t = (i64)blockIdx.x % (p.a.times + 1);
    const Series<T> s(p, (i64)blockIdx.x / (p.a.times + 1));
    const ConvolveArgs& a = p.a;
    if (!s.active) return;
    if (t == a.times) {
        if (!a.grad_initial) return;
        for (i64 k = 0; k + 1 < a.taps; ++k) *of<T>(a.grad_initial, s.kept(k)) = s.later(0, a.taps - 2 - k);
        return;
    }
    if (!a.grad_x) return;
    T sum = T(0);
    if (s.live(t)) {
        if (a.grad_y) sum = *of<T>(a.grad_y, s.step(t)) * s.weight(a.taps - 1);
        sum += s.later(t + 1, 0);
    }
    *of<T>(a.grad_x, s.step(t)) = sum;
}

// Shares of the gradients of the weights, one tap (or the bias, the last one) a block.
template <class T> __global__ void __launch_bounds__(BLOCK) of_weights(ConvolveTask<T> p) {
    const i64 taps = p.a.taps, place = (i64)blockIdx.x % (taps + 1), chunk = blockIdx.y;  // place: from the window's end
    const Series<T> s(p, (i64)blockIdx.x / (taps + 1));
    const ConvolveArgs& a = p.a;
    if (!s.active) return;
    const i64 end = (chunk + 1) * CHUNK < a.times ? (chunk + 1) * CHUNK : a.times;
    double total = 0;
    T sum = T(0);
    i64 since = 0;
    for (i64 t = chunk * CHUNK; t < end && a.grad_y; ++t) {
        if (s.live(t)) {
            T x = T(1);
            if (place < taps) {
                x = place == 0 ? s.x(t) : T(0);
                if (place) s.before(t, place, s.fresh(t), [&](i64 j, T value) { if (j == place - 1) x = value; });
            }
            sum += *of<T>(a.grad_y, s.step(t)) * x;
        }
        if (++since == SUMMED) { total += (double)sum; sum = T(0); since = 0; }
    }
    total += (double)sum;
    const i64 channel = (chunk * a.batch + s.b) * a.channels + s.c;
    if (place == taps) p.bias[channel] = total;
    else p.weight[channel * taps + taps - 1 - place] = total;
}

}  // namespace

#if !defined(__CUDACC_RTC__)
namespace {

template <class T> int run_of(const ConvolveArgs& a, bool back, Workspace& memory, void* stream) {
    ConvolveTask<T> p = {};
    p.a = a;
    p.tiles = ceil_div(a.channels, BLOCK);
    p.chunks = a.times > 0 ? ceil_div(a.times, CHUNK) : 1;
    const i64 blocks = a.batch * p.tiles, size = a.batch * a.channels;
    if (back) { p.weight = memory.take<double>(p.chunks * size * a.taps); p.bias = memory.take<double>(p.chunks * size); }
    if (!memory.base) return 0;
    if (!back) return launch(outputs<T>, blocks * (a.times + 1), 1, BLOCK, p, stream);
    if (a.grad_x || a.grad_initial) TRY(launch(of_inputs<T>, blocks * (a.times + 1), 1, BLOCK, p, stream));
    if (!a.grad_weight && !a.grad_bias) return 0;
    TRY(launch(of_weights<T>, blocks * (a.taps + 1), p.chunks, BLOCK, p, stream));
    if (a.grad_weight) TRY(sum_parts(p.weight, (T*)a.grad_weight, p.chunks, size * a.taps, stream));
    if (a.grad_bias) TRY(sum_parts(p.bias, (T*)a.grad_bias, p.chunks, size, stream));
    return 0;
}
int run(const ConvolveArgs& a, bool back, Workspace& memory, void* stream) {
    return a.doubles ? run_of<double>(a, back, memory, stream) : run_of<float>(a, back, memory, stream);
}

}  // namespace

ENTRY(convolve, ConvolveArgs, run)
#endif
