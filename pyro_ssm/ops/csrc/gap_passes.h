// A bank of diagonal systems whose steps differ: each step is discretised where it is taken, by e(x) = e^x - 1 (zero-order
// hold) or x / (1 - x / 2) (bilinear) of x = step a. With b divided by a beforehand,
//     h_t = h_{t-1} + e(x_t) (h_{t-1} + b u_t),
// which is exact to rounding for the shortest steps, and leaves a state as it is where the step is 0.

template <class T, int METHOD> struct Gaps {
    typedef Bank<T, GapArgs> B;
    typedef typename B::V V;
    typedef typename B::Z Z;
    enum { BLOCK = B::BLOCK, N = B::N };

    // e of some steps of one state, [step][re, im][lane of the register].
    static void grow(i64 count, int v, const Z& A, const T* step, T* out) {
        for (i64 q = 0; q < count; ++q) {
            const Z x = B::times(B::get(step + q * BLOCK + v * N), A);
            if (METHOD == BANK_ZOH) {
                typename Simd<T>::V e[2];
                ComplexExponential<T>::minus_one((typename Simd<T>::V)x.p[0], (typename Simd<T>::V)x.p[1], e);
                put(out, q, {{(V)e[0], (V)e[1]}});
            } else {
                const V half = T(1) - T(0.5) * x.p[0], square = x.p[0] * x.p[0] + x.p[1] * x.p[1];
                const V below = T(1) / (half * half + T(0.25) * (x.p[1] * x.p[1]));
                put(out, q, {{(x.p[0] - T(0.5) * square) * below, x.p[1] * below}});
            }
        }
    }
    // The derivative of e, from e.
    static PYRO_SSM_HD Z slope(const Z& e) {
        if (METHOD == BANK_ZOH) return {{e.p[0] + T(1), e.p[1]}};
        const Z d = {{T(0.5) * e.p[0] + T(1), T(0.5) * e.p[1]}};
        return ComplexKind::compose(d, d);
    }
    static PYRO_SSM_HD Z get(const T* from, i64 q) { return {{B::get(from + q * 2 * N), B::get(from + q * 2 * N + N)}}; }
    static PYRO_SSM_HD void put(T* to, i64 q, const Z& z) { B::put(to + q * 2 * N, z.p[0]); B::put(to + q * 2 * N + N, z.p[1]); }

    // Some steps of one state; y is added to. `past` takes the states before them where it is given.
    template <bool RESET>
    static void forward_steps(i64 count, int v, const T* b, const T* C, T* h, const T* u, const T* keep, const T* e, T* y,
                              T* past) {
        const Z gain = B::load(b, v), R = B::load(C, v);
        Z H = B::load(h, v);
        for (i64 q = 0; q < count; ++q) {
            const i64 at = q * BLOCK + v * N;
            if (past) put(past, q, H);
            if (RESET) H = B::times(B::get(keep + at), H);
            H = ComplexKind::advance(get(e, q), plus(H, B::times(B::get(u + at), gain)), H);
            if (y) B::put(y + at, (B::get(y + at) + R.p[0] * H.p[0]) - R.p[1] * H.p[1]);
        }
        B::store(h, v, H);
    }
    // Back over some steps of one state.
    template <bool RESET>
    static void backward_steps(i64 count, int v, const T* a, const T* b, const T* C, const T* last, T* carry, const T* u,
                               const T* keep, const T* step, const T* e, const T* past, const T* grad_y, T* grad_u,
                               T* grad_step, T* grad_a, T* grad_b, T* grad_C) {
        const Z A = B::load(a, v), gain = B::load(b, v), R = B::load(C, v), conj_R = {{R.p[0], -R.p[1]}};
        const Z zero = {{V{}, V{}}};
        Z h = B::load(last, v), x = B::load(carry, v), sum_a = zero, sum_b = zero, sum_C = zero;
        for (i64 q = count - 1; q >= 0; --q) {
            const i64 at = q * BLOCK + v * N;
            const V g = B::get(grad_y + at), in = B::get(u + at);
            const Z stood = get(past, q), before = RESET ? B::times(B::get(keep + at), stood) : stood, grown = get(e, q);
            x = plus(x, B::times(g, conj_R));
            sum_C = plus(sum_C, {{g * h.p[0], -(g * h.p[1])}});
            const Z of_e = ComplexKind::outer(x, plus(before, B::times(in, gain)));
            const Z of_x = ComplexKind::adjoint(slope(grown), of_e), of_sum = ComplexKind::adjoint(grown, x);
            B::put(grad_step + at, B::get(grad_step + at) + A.p[0] * of_x.p[0] + A.p[1] * of_x.p[1]);
            B::put(grad_u + at, B::get(grad_u + at) + gain.p[0] * of_sum.p[0] + gain.p[1] * of_sum.p[1]);
            sum_a = plus(sum_a, B::times(B::get(step + at), of_x));
            sum_b = plus(sum_b, B::times(in, of_sum));
            x = plus(x, of_sum);
            if (RESET) x = B::times(B::get(keep + at), x);
            h = stood;
        }
        B::store(carry, v, x);
        B::store(grad_a, v, plus(B::load(grad_a, v), sum_a));
        B::store(grad_b, v, plus(B::load(grad_b, v), sum_b));
        B::store(grad_C, v, plus(B::load(grad_C, v), sum_C));
    }
};

template <class T, int METHOD> static void gaps_forward_one(const Bank<T, GapArgs>& bank, i64 index) {
    typedef Gaps<T, METHOD> G;
    constexpr i64 BLOCK = G::BLOCK, STEPS = G::B::STEPS, N = G::N;
    const GapArgs& args = bank.args;
    const auto x = bank.block(index);
    const i64 size = args.n * 2 * BLOCK;
    Scratch<T> scratch(4 * size);
    if (!scratch.at) { bank.failed = true; return; }
    T *a = scratch.at, *b = a + size, *C = b + size, *h = C + size;
    alignas(64) T u[STEPS * BLOCK], y[STEPS * BLOCK], keep[STEPS * BLOCK], step[STEPS * BLOCK], e[STEPS * 2 * N];
    bank.gather(args.a, args.a_b, x, a);
    bank.gather(args.b, args.b_b, x, b);
    bank.gather(args.C, args.C_b, x, C);
    bank.gather(args.initial, args.initial_b, x, h);
    for (i64 segment = 0; segment < bank.segments; ++segment) {
        const i64 start = segment * STEPS, count = bank.count(segment);
        if (args.kept) std::memcpy((T*)args.kept + (index * bank.segments + segment) * size, h, sizeof(T) * (size_t)size);
        bank.gather_steps(args.u, args.u_b, args.u_t, x, start, count, u);
        bank.gather_steps(args.step, args.step_b, args.step_t, x, start, count, step);
        if (args.reset) bank.gather_keep(x, start, count, keep);
        std::memset(y, 0, sizeof(T) * (size_t)(count * BLOCK));
        for (int v = 0; v < G::B::NV; ++v)
            for (i64 n = 0; n < args.n; ++n) {
                const i64 at = n * 2 * BLOCK;
                G::grow(count, v, G::B::load(a + at, v), step, e);
                (args.reset ? G::template forward_steps<true> : G::template forward_steps<false>)(
                    count, v, b + at, C + at, h + at, u, keep, e, y, nullptr);
            }
        bank.scatter_steps(args.y, x, start, count, y);
    }
    bank.scatter(args.final, x, h);
}

template <class T, int METHOD> static void gaps_backward_one(const Bank<T, GapArgs>& bank, i64 index) {
    typedef Gaps<T, METHOD> G;
    constexpr i64 BLOCK = G::BLOCK, STEPS = G::B::STEPS, N = G::N;
    const GapArgs& args = bank.args;
    const auto x = bank.block(index);
    const i64 size = args.n * 2 * BLOCK;
    Scratch<T> scratch(8 * size);
    if (!scratch.at) { bank.failed = true; return; }
    T *a = scratch.at, *b = a + size, *C = b + size, *carry = C + size, *h = carry + size;
    T *grad_a = h + size, *grad_b = grad_a + size, *grad_C = grad_b + size;
    alignas(64) T u[STEPS * BLOCK], grad_y[STEPS * BLOCK], grad_u[STEPS * BLOCK], keep[STEPS * BLOCK];
    alignas(64) T step[STEPS * BLOCK], grad_step[STEPS * BLOCK], past[STEPS * 2 * N], e[STEPS * 2 * N];
    bank.gather(args.a, args.a_b, x, a);
    bank.gather(args.b, args.b_b, x, b);
    bank.gather(args.C, args.C_b, x, C);
    bank.gather(args.grad_final, args.channels * args.n * 2, x, carry);
    std::memset(grad_a, 0, sizeof(T) * (size_t)(3 * size));
    for (i64 segment = bank.segments - 1; segment >= 0; --segment) {
        const i64 start = segment * STEPS, count = bank.count(segment);
        std::memcpy(h, (const T*)args.kept + (index * bank.segments + segment) * size, sizeof(T) * (size_t)size);
        bank.gather_steps(args.u, args.u_b, args.u_t, x, start, count, u);
        bank.gather_steps(args.step, args.step_b, args.step_t, x, start, count, step);
        bank.gather_steps(args.grad_y, args.times * args.channels, args.channels, x, start, count, grad_y);
        std::memset(grad_u, 0, sizeof(T) * (size_t)(count * BLOCK));
        std::memset(grad_step, 0, sizeof(T) * (size_t)(count * BLOCK));
        if (args.reset) bank.gather_keep(x, start, count, keep);
        for (int v = 0; v < G::B::NV; ++v)
            for (i64 n = 0; n < args.n; ++n) {
                const i64 at = n * 2 * BLOCK;
                G::grow(count, v, G::B::load(a + at, v), step, e);
                (args.reset ? G::template forward_steps<true> : G::template forward_steps<false>)(
                    count, v, b + at, C + at, h + at, u, keep, e, nullptr, past);
                (args.reset ? G::template backward_steps<true> : G::template backward_steps<false>)(
                    count, v, a + at, b + at, C + at, h + at, carry + at, u, keep, step, e, past, grad_y, grad_u, grad_step,
                    grad_a + at, grad_b + at, grad_C + at);
            }
        bank.scatter_steps(args.grad_u, x, start, count, grad_u);
        bank.scatter_steps(args.grad_step, x, start, count, grad_step);
    }
    bank.scatter(args.grad_a, x, grad_a);
    bank.scatter(args.grad_b, x, grad_b);
    bank.scatter(args.grad_C, x, grad_C);
    bank.scatter(args.grad_initial, x, carry);
}
