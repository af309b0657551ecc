// Diagonal systems with one step for all times: some states at once, over all steps of a segment.

template <class T> struct Diagonal : Bank<T, BankArgs> {
    typedef Bank<T, BankArgs> Base;
    typedef typename Base::V V;
    typedef typename Base::Z Z;
    using Base::load; using Base::store; using Base::get; using Base::put; using Base::times;
    enum { BLOCK = Base::BLOCK, N = Base::N, NV = Base::NV };

    // Some steps of K states of one register of lanes; y is added to.
    template <int K, bool RESET>
    static void forward_steps(i64 count, int v, const T* a, const T* b, const T* C, T* h, const T* u, const T* keep, T* y) {
        Z A[K], B[K], R[K], H[K];
        UNROLL for (int k = 0; k < K; ++k) {
            const i64 at = (i64)k * 2 * BLOCK;
            A[k] = load(a + at, v); B[k] = load(b + at, v); R[k] = load(C + at, v); H[k] = load(h + at, v);
        }
        for (i64 q = 0; q < count; ++q) {
            const i64 at = q * BLOCK + v * N;
            const V in = get(u + at);
            V out = get(y + at);
            UNROLL for (int k = 0; k < K; ++k) {
                if (RESET) H[k] = times(get(keep + at), H[k]);
                H[k] = ComplexKind::advance(A[k], H[k], times(in, B[k]));
                out = (out + R[k].p[0] * H[k].p[0]) - R[k].p[1] * H[k].p[1];
            }
            put(y + at, out);
        }
        UNROLL for (int k = 0; k < K; ++k) store(h + (i64)k * 2 * BLOCK, v, H[k]);
    }
    template <bool RESET>
    static void forward_block(i64 count, i64 states, const T* a, const T* b, const T* C, T* h, const T* u, const T* keep, T* y) {
        std::memset(y, 0, sizeof(T) * (size_t)(count * BLOCK));
        for (int v = 0; v < NV; ++v) {
            i64 n = 0;
            for (; n + 2 <= states; n += 2) {
                const i64 at = n * 2 * BLOCK;
                forward_steps<2, RESET>(count, v, a + at, b + at, C + at, h + at, u, keep, y);
            }
            if (n < states) {
                const i64 at = n * 2 * BLOCK;
                forward_steps<1, RESET>(count, v, a + at, b + at, C + at, h + at, u, keep, y);
            }
        }
    }

    // Back over some steps of one state; `past` has room for its states.
    template <bool RESET>
    static void backward_steps(i64 count, int v, const T* a, const T* b, const T* C, const T* start, T* carry, const T* u,
                               const T* keep, const T* grad_y, T* grad_u, T* grad_a, T* grad_b, T* grad_C, T* past) {
        const Z A = load(a, v), B = load(b, v), R = load(C, v), conj_R = {{R.p[0], -R.p[1]}};
        Z h = load(start, v);
        for (i64 q = 0; q < count; ++q) {
            const i64 at = q * BLOCK + v * N;
            put(past + q * 2 * N, h.p[0]);
            put(past + q * 2 * N + N, h.p[1]);
            if (RESET) h = times(get(keep + at), h);
            h = ComplexKind::advance(A, h, times(get(u + at), B));
        }
        const Z zero = {{V{}, V{}}};
        Z x = load(carry, v), sum_a = zero, sum_b = zero, sum_C = zero;  // of these steps: rounding grows slowly
        for (i64 q = count - 1; q >= 0; --q) {
            const i64 at = q * BLOCK + v * N;
            const V g = get(grad_y + at), in = get(u + at);
            const Z before = {{get(past + q * 2 * N), get(past + q * 2 * N + N)}};
            x = plus(x, times(g, conj_R));
            sum_C = plus(sum_C, {{g * h.p[0], -(g * h.p[1])}});
            sum_b = plus(sum_b, times(in, x));
            sum_a = plus(sum_a, ComplexKind::outer(x, RESET ? times(get(keep + at), before) : before));
            put(grad_u + at, get(grad_u + at) + B.p[0] * x.p[0] + B.p[1] * x.p[1]);
            x = ComplexKind::adjoint(A, x);
            if (RESET) x = times(get(keep + at), x);
            h = before;
        }
        store(carry, v, x);
        store(grad_a, v, plus(load(grad_a, v), sum_a));
        store(grad_b, v, plus(load(grad_b, v), sum_b));
        store(grad_C, v, plus(load(grad_C, v), sum_C));
    }
};

template <class T> static void diagonal_forward_one(const Bank<T, BankArgs>& bank, i64 index) {
    constexpr i64 BLOCK = Diagonal<T>::BLOCK, STEPS = Diagonal<T>::STEPS;
    const BankArgs& args = bank.args;
    const auto x = bank.block(index);
    const i64 size = args.n * 2 * BLOCK;
    Scratch<T> scratch(4 * size);
    if (!scratch.at) { bank.failed = true; return; }
    T *a = scratch.at, *b = a + size, *C = b + size, *h = C + size;
    alignas(64) T u[STEPS * BLOCK], y[STEPS * BLOCK], keep[STEPS * BLOCK];
    bank.gather(args.a, args.a_b, x, a);
    bank.gather(args.b, args.b_b, x, b);
    bank.gather(args.C, args.C_b, x, C);
    bank.gather(args.initial, args.initial_b, x, h);
    for (i64 segment = 0; segment < bank.segments; ++segment) {
        const i64 start = segment * STEPS, count = bank.count(segment);
        if (args.kept) std::memcpy((T*)args.kept + (index * bank.segments + segment) * size, h, sizeof(T) * (size_t)size);
        bank.gather_steps(args.u, args.u_b, args.u_t, x, start, count, u);
        if (args.reset) {
            bank.gather_keep(x, start, count, keep);
            Diagonal<T>::template forward_block<true>(count, args.n, a, b, C, h, u, keep, y);
        } else {
            Diagonal<T>::template forward_block<false>(count, args.n, a, b, C, h, u, keep, y);
        }
        bank.scatter_steps(args.y, x, start, count, y);
    }
    bank.scatter(args.final, x, h);
}

template <class T> static void diagonal_backward_one(const Bank<T, BankArgs>& bank, i64 index) {
    constexpr i64 BLOCK = Diagonal<T>::BLOCK, STEPS = Diagonal<T>::STEPS, N = Diagonal<T>::N;
    const BankArgs& args = bank.args;
    const auto x = bank.block(index);
    const i64 size = args.n * 2 * BLOCK;
    Scratch<T> scratch(7 * size);
    if (!scratch.at) { bank.failed = true; return; }
    T *a = scratch.at, *b = a + size, *C = b + size, *carry = C + size;
    T *grad_a = carry + size, *grad_b = grad_a + size, *grad_C = grad_b + size;
    alignas(64) T u[STEPS * BLOCK], grad_y[STEPS * BLOCK], grad_u[STEPS * BLOCK], keep[STEPS * BLOCK], past[STEPS * 2 * N];
    bank.gather(args.a, args.a_b, x, a);
    bank.gather(args.b, args.b_b, x, b);
    bank.gather(args.C, args.C_b, x, C);
    bank.gather(args.grad_final, args.channels * args.n * 2, x, carry);
    std::memset(grad_a, 0, sizeof(T) * (size_t)(3 * size));
    for (i64 segment = bank.segments - 1; segment >= 0; --segment) {
        const i64 start = segment * STEPS, count = bank.count(segment);
        const T* before = (const T*)args.kept + (index * bank.segments + segment) * size;
        bank.gather_steps(args.u, args.u_b, args.u_t, x, start, count, u);
        bank.gather_steps(args.grad_y, args.times * args.channels, args.channels, x, start, count, grad_y);
        std::memset(grad_u, 0, sizeof(T) * (size_t)(count * BLOCK));
        if (args.reset) bank.gather_keep(x, start, count, keep);
        for (int v = 0; v < Diagonal<T>::NV; ++v)
            for (i64 n = 0; n < args.n; ++n) {
                const i64 at = n * 2 * BLOCK;
                (args.reset ? Diagonal<T>::template backward_steps<true> : Diagonal<T>::template backward_steps<false>)(
                    count, v, a + at, b + at, C + at, before + at, carry + at, u, keep, grad_y, grad_u, grad_a + at,
                    grad_b + at, grad_C + at, past);
            }
        bank.scatter_steps(args.grad_u, x, start, count, grad_u);
    }
    bank.scatter(args.grad_a, x, grad_a);
    bank.scatter(args.grad_b, x, grad_b);
    bank.scatter(args.grad_C, x, grad_C);
    bank.scatter(args.grad_initial, x, carry);
}
