// The convolution: a window of pointers to the rows that count, moved on by one at each step; all channels of a row at
// once.

constexpr i64 MAX_TAPS = 64;    // pointers of the window on the stack
constexpr i64 SUMMED = 64;      // steps whose part of the gradient of the weights is summed in singles first

// Which channels of which row of the batch.
struct Strip {
    i64 b, first, width;
    static i64 parts(const ConvolveArgs& a) {
        const i64 wanted = a.batch >= 8 ? 1 : (8 + a.batch - 1) / a.batch, most = (a.channels + 63) / 64;
        return wanted < most ? wanted : most;
    }
    Strip(const ConvolveArgs& a, i64 item) {
        const i64 n = parts(a), part = item % n;
        b = item / n;
        first = a.channels * part / n;
        width = a.channels * (part + 1) / n - first;
    }
};

template <class T> struct Window {
    const ConvolveArgs& a;
    const Strip s;
    const i64 K;
    const T* past[MAX_TAPS];  // the oldest first, the present last
    T *none, *weight;         // zeros; (taps, width)

    static i64 scratch(const ConvolveArgs& a) { return (a.taps + 1) * a.channels; }
    Window(const ConvolveArgs& args, i64 item, Scratch<T>& memory) : a(args), s(args, item), K(args.taps) {
        none = memory.take(s.width);
        weight = memory.take(K * s.width);
        const T* w = at<T>(a.weight, s.b * a.weight_b + s.first * K);
        for (i64 c = 0; c < s.width; ++c)
            for (i64 k = 0; k < K; ++k) weight[k * s.width + c] = w[c * K + k];
        for (i64 k = 0; k + 1 < K; ++k)
            past[k] = a.initial ? at<T>(a.initial, s.b * a.initial_b + k * a.channels + s.first) : none;
    }
    bool live(i64 t) const { return !a.mask || a.mask[s.b * a.mask_b + t]; }
    bool fresh(i64 t) const { return a.reset && a.reset[s.b * a.reset_b + t]; }
    // Brings in the step; whether it counts.
    bool see(i64 t) {
        if (fresh(t)) for (i64 k = 0; k + 1 < K; ++k) past[k] = none;
        past[K - 1] = at<T>(a.x, s.b * a.x_b + t * a.x_t + s.first);
        return live(t);
    }
    void move_on() { for (i64 k = 0; k + 1 < K; ++k) past[k] = past[k + 1]; }
};

template <class T, int TAPS>  // TAPS: their number, or 0 for any
static inline void weigh(T* __restrict y, const T* __restrict bias, const Window<T>& w) {
    const i64 n = w.s.width;
    if (TAPS == 4) {
        const T *__restrict a = w.past[0], *__restrict b = w.past[1];
        const T *__restrict c = w.past[2], *__restrict d = w.past[3];
        const T* __restrict v = w.weight;
        for (i64 i = 0; i < n; ++i)
            y[i] = bias[i] + a[i] * v[i] + b[i] * v[n + i] + c[i] * v[2 * n + i] + d[i] * v[3 * n + i];
        return;
    }
    for (i64 i = 0; i < n; ++i) y[i] = bias[i];
    for (i64 k = 0; k < w.K; ++k) {
        const T *__restrict x = w.past[k], *__restrict v = w.weight + k * n;
        for (i64 i = 0; i < n; ++i) y[i] += x[i] * v[i];
    }
}

template <class T> static int convolve_forward_of(const ConvolveArgs& a) {
    auto piece = [&](i64 begin, i64 end) {
        Scratch<T> memory(Window<T>::scratch(a));
        if (!memory.data) return false;
        for (i64 item = begin; item < end; ++item) {
            if (item > begin) memory.clear();
            Window<T> w(a, item, memory);
            const T* bias = a.bias ? at<T>(a.bias, w.s.b * a.bias_b + w.s.first) : w.none;
            for (i64 t = 0; t < a.times; ++t) {
                T* y = at<T>(a.y, (w.s.b * a.times + t) * a.channels + w.s.first);
                if (!w.see(t)) { for (i64 i = 0; i < w.s.width; ++i) y[i] = T(0); continue; }
                if (w.K == 4) weigh<T, 4>(y, bias, w);
                else weigh<T, 0>(y, bias, w);
                w.move_on();
            }
            for (i64 k = 0; k + 1 < w.K; ++k) {
                T* out = at<T>(a.final, (w.s.b * (w.K - 1) + k) * a.channels + w.s.first);
                for (i64 i = 0; i < w.s.width; ++i) out[i] = w.past[k][i];
            }
        }
        return true;
    };
    return in_parallel(a.parallel_for, a.batch * Strip::parts(a), piece);
}

// The same walk; beside each row of the window stands the row of its gradient (or one that nobody reads).
template <class T> struct WindowGradient {
    Window<T> w;
    const ConvolveArgs& a;
    T *to[MAX_TAPS], *nobody;
    T *of_weight, *of_bias;             // of some steps: (taps, width), (width)
    double *sum_weight, *sum_bias;

    static i64 scratch(const ConvolveArgs& a) { return Window<T>::scratch(a) + (a.taps + 2) * a.channels; }
    static i64 totals(const ConvolveArgs& a) { return (a.taps + 1) * a.channels; }
    WindowGradient(const ConvolveArgs& args, i64 item, Scratch<T>& memory, Scratch<double>& total)
        : w(args, item, memory), a(args) {
        const i64 n = w.s.width, K = w.K;
        nobody = memory.take(n); of_weight = memory.take(K * n); of_bias = memory.take(n);
        sum_weight = total.take(K * n); sum_bias = total.take(n);
        for (i64 k = 0; k + 1 < K; ++k) {
            to[k] = a.grad_initial ? at<T>(a.grad_initial, (w.s.b * (K - 1) + k) * a.channels + w.s.first) : nobody;
            for (i64 i = 0; i < n; ++i) to[k][i] = T(0);
        }
    }
    void run() {
        const i64 n = w.s.width, K = w.K;
        for (i64 t = 0; t < a.times; ++t) {
            if (w.fresh(t)) for (i64 k = 0; k + 1 < K; ++k) to[k] = nobody;
            const bool counts = w.see(t);
            const i64 offset = (w.s.b * a.times + t) * a.channels + w.s.first;
            to[K - 1] = a.grad_x ? at<T>(a.grad_x, offset) : nobody;
            for (i64 i = 0; i < n; ++i) to[K - 1][i] = T(0);
            if (!counts) continue;
            if (a.grad_y) step(at<T>(a.grad_y, offset));
            w.move_on();
            for (i64 k = 0; k + 1 < K; ++k) to[k] = to[k + 1];
            if (t % SUMMED == SUMMED - 1) flush();
        }
        flush();
        if (a.grad_final)
            for (i64 k = 0; k + 1 < K; ++k) {
                const T* g = at<T>(a.grad_final, (w.s.b * (K - 1) + k) * a.channels + w.s.first);
                for (i64 i = 0; i < n; ++i) to[k][i] += g[i];
            }
        if (a.grad_weight)
            for (i64 i = 0; i < n; ++i)
                for (i64 k = 0; k < K; ++k)
                    *at<T>(a.grad_weight, (w.s.b * a.channels + w.s.first + i) * K + k) = (T)sum_weight[k * n + i];
        if (a.grad_bias)
            for (i64 i = 0; i < n; ++i) *at<T>(a.grad_bias, w.s.b * a.channels + w.s.first + i) = (T)sum_bias[i];
    }
    void step(const T* __restrict g) {
        const i64 n = w.s.width;
        for (i64 k = 0; k < w.K; ++k) {
            const T *__restrict x = w.past[k], *__restrict v = w.weight + k * n;
            T *__restrict of_x = to[k], *__restrict of_v = of_weight + k * n;
            for (i64 i = 0; i < n; ++i) { of_x[i] += g[i] * v[i]; of_v[i] += g[i] * x[i]; }
        }
        for (i64 i = 0; i < n; ++i) of_bias[i] += g[i];
    }
    void flush() {
        for (i64 i = 0; i < w.K * w.s.width; ++i) { sum_weight[i] += of_weight[i]; of_weight[i] = T(0); }
        for (i64 i = 0; i < w.s.width; ++i) { sum_bias[i] += of_bias[i]; of_bias[i] = T(0); }
    }
};

template <class T> static int convolve_backward_of(const ConvolveArgs& a) {
    auto piece = [&](i64 begin, i64 end) {
        Scratch<T> memory(WindowGradient<T>::scratch(a));
        Scratch<double> total(WindowGradient<T>::totals(a));
        if (!memory.data || !total.data) return false;
        for (i64 item = begin; item < end; ++item) {
            if (item > begin) { memory.clear(); total.clear(); }
            WindowGradient<T> pass(a, item, memory, total);
            pass.run();
        }
        return true;
    };
    return in_parallel(a.parallel_for, a.batch * Strip::parts(a), piece);
}
