// Diagonal systems coupled by a matrix of low rank: all states of a lane advance together, since each k_t needs them all.

template <class T, int R> struct LowRank {
    typedef Bank<T, LowRankArgs> B;
    typedef typename B::V V;
    typedef typename B::Z Z;
    enum { BLOCK = B::BLOCK, N = B::N, STATE = 2 * BLOCK };

    // Coefficients of one block of lanes, [rank][state][re, im][lane]; the number of states.
    struct Coefficients {
        const T *a, *b, *C, *W, *Q;
        i64 states;
    };
    static PYRO_SSM_HD V real_of(const Z& x, const Z& y) { return x.p[0] * y.p[0] - x.p[1] * y.p[1]; }     // Re x y
    static PYRO_SSM_HD V inner(const Z& x, const Z& y) { return x.p[0] * y.p[0] + x.p[1] * y.p[1]; }       // Re conj(x) y
    static PYRO_SSM_HD Z less(const Z& x, V s, const Z& y) { return {{x.p[0] - s * y.p[0], x.p[1] - s * y.p[1]}}; }
    static PYRO_SSM_HD Z plus_conj(const Z& x, V s, const Z& y) { return {{x.p[0] + s * y.p[0], x.p[1] - s * y.p[1]}}; }

    // k of the next step, of one register of lanes.
    static void couple(const Coefficients& m, int v, const T* h, V* k) {
        UNROLL for (int j = 0; j < R; ++j) {
            k[j] = V{};
            for (i64 n = 0; n < m.states; ++n)
                k[j] = k[j] + real_of(B::load(m.Q + (j * m.states + n) * STATE, v), B::load(h + n * STATE, v));
        }
    }
    // One step, from the states `h` to `next` (may be one); k becomes that of the step after. Returns y.
    template <bool RESET>
    static PYRO_SSM_HD V advance(const Coefficients& m, int v, V keep, V u, const T* h, T* next, V* k) {
        V real = V{}, imaginary = V{}, first[R], second[R];  // of sums: chains of additions run side by side
        UNROLL for (int j = 0; j < R; ++j) {
            if (RESET) k[j] = keep * k[j];
            first[j] = second[j] = V{};
        }
        for (i64 n = 0; n < m.states; ++n) {
            Z x = B::load(h + n * STATE, v);
            if (RESET) x = B::times(keep, x);
            x = ComplexKind::advance(B::load(m.a + n * STATE, v), x, B::times(u, B::load(m.b + n * STATE, v)));
            UNROLL for (int j = 0; j < R; ++j) x = less(x, k[j], B::load(m.W + (j * m.states + n) * STATE, v));
            B::store(next + n * STATE, v, x);
            const Z C = B::load(m.C + n * STATE, v);
            real = real + C.p[0] * x.p[0];
            imaginary = imaginary + C.p[1] * x.p[1];
            UNROLL for (int j = 0; j < R; ++j) {
                const Z Q = B::load(m.Q + (j * m.states + n) * STATE, v);
                first[j] = first[j] + Q.p[0] * x.p[0];
                second[j] = second[j] + Q.p[1] * x.p[1];
            }
        }
        UNROLL for (int j = 0; j < R; ++j) k[j] = first[j] - second[j];
        return real - imaginary;
    }

    // What the backward pass has of one segment: states [step][state], from the one before the first step to the last;
    // their adjoints; and of each step k and its adjoint, [step][rank].
    struct Segment { T *h, *x, *k, *grad_k; };

    // Adjoints x of the states after each step, from that after the last (`carry`) to that before the first.
    template <bool RESET>
    static void adjoints(const Coefficients& m, int v, i64 count, const T* keep, const T* grad_y, T* grad_u, T* carry,
                         const Segment& s) {
        const i64 step = m.states * STATE;
        V grad_k[R], next[R];
        UNROLL for (int j = 0; j < R; ++j) grad_k[j] = V{};
        for (i64 q = count - 1; q >= 0; --q) {
            const i64 at = q * BLOCK + v * N;
            const V g = B::get(grad_y + at);
            V into = V{};
            UNROLL for (int j = 0; j < R; ++j) next[j] = V{};
            for (i64 n = 0; n < m.states; ++n) {
                Z x;
                if (q == count - 1) x = B::load(carry + n * STATE, v);
                else x = before<RESET>(m, v, n, B::get(keep + at + BLOCK), s.x + (q + 1) * step, grad_k);
                x = plus_conj(x, g, B::load(m.C + n * STATE, v));
                B::store(s.x + q * step + n * STATE, v, x);
                into = into + inner(B::load(m.b + n * STATE, v), x);
                UNROLL for (int j = 0; j < R; ++j)
                    next[j] = next[j] - inner(B::load(m.W + (j * m.states + n) * STATE, v), x);
            }
            B::put(grad_u + at, into);
            UNROLL for (int j = 0; j < R; ++j) {
                grad_k[j] = next[j];
                B::put(s.grad_k + (q * R + j) * BLOCK + v * N, next[j]);
            }
        }
        for (i64 n = 0; n < m.states; ++n)
            B::store(carry + n * STATE, v, before<RESET>(m, v, n, B::get(keep + v * N), s.x, grad_k));
    }
    // The adjoint of a state before a step, from those after it.
    template <bool RESET>
    static PYRO_SSM_HD Z before(const Coefficients& m, int v, i64 n, V keep, const T* after, const V* grad_k) {
        Z x = ComplexKind::adjoint(B::load(m.a + n * STATE, v), B::load(after + n * STATE, v));
        UNROLL for (int j = 0; j < R; ++j) x = plus_conj(x, grad_k[j], B::load(m.Q + (j * m.states + n) * STATE, v));
        return RESET ? B::times(keep, x) : x;
    }
    // Gradients of the coefficients of one state: sums over steps, in registers.
    template <bool RESET>
    static void add_gradients(int v, i64 states, i64 n, i64 count, const T* keep, const T* u, const T* grad_y,
                              const Segment& s, T* const* grads) {
        const i64 step = states * STATE;
        const Z zero = {{V{}, V{}}};
        Z a = zero, b = zero, C = zero, W[R], Q[R];
        UNROLL for (int j = 0; j < R; ++j) W[j] = Q[j] = zero;
        Z h = B::load(s.h + n * STATE, v);
        for (i64 q = 0; q < count; ++q) {
            const i64 at = q * BLOCK + v * N;
            const Z x = B::load(s.x + q * step + n * STATE, v), after = B::load(s.h + (q + 1) * step + n * STATE, v);
            if (RESET) h = B::times(B::get(keep + at), h);
            a = plus(a, ComplexKind::outer(x, h));
            b = plus(b, B::times(B::get(u + at), x));
            C = plus_conj(C, B::get(grad_y + at), after);
            UNROLL for (int j = 0; j < R; ++j) {
                const i64 of = (q * R + j) * BLOCK + v * N;
                W[j] = less(W[j], B::get(s.k + of), x);
                Q[j] = plus_conj(Q[j], B::get(s.grad_k + of), h);
            }
            h = after;
        }
        auto add = [&](T* to, i64 i, const Z& z) { B::store(to + i * STATE, v, plus(B::load(to + i * STATE, v), z)); };
        add(grads[0], n, a);
        add(grads[1], n, b);
        add(grads[2], n, C);
        UNROLL for (int j = 0; j < R; ++j) { add(grads[3], j * states + n, W[j]); add(grads[4], j * states + n, Q[j]); }
    }

    template <bool RESET>
    static void forward_segment(const Coefficients& m, i64 count, const T* keep, const T* u, T* h, T* y) {
        for (int v = 0; v < B::NV; ++v) {
            V k[R];
            couple(m, v, h, k);
            for (i64 q = 0; q < count; ++q) {
                const i64 at = q * BLOCK + v * N;
                B::put(y + at, advance<RESET>(m, v, B::get(keep + at), B::get(u + at), h, h, k));
            }
        }
    }
    template <bool RESET>
    static void backward_segment(const Coefficients& m, i64 count, const T* keep, const T* u, const T* grad_y, T* grad_u,
                                 T* carry, const Segment& s, T* const* grads) {
        const i64 step = m.states * STATE;
        for (int v = 0; v < B::NV; ++v) {
            V k[R];
            couple(m, v, s.h, k);
            for (i64 q = 0; q < count; ++q) {
                const i64 at = q * BLOCK + v * N;
                const V kept = B::get(keep + at);
                UNROLL for (int j = 0; j < R; ++j) B::put(s.k + (q * R + j) * BLOCK + v * N, RESET ? kept * k[j] : k[j]);
                advance<RESET>(m, v, kept, B::get(u + at), s.h + q * step, s.h + (q + 1) * step, k);
            }
            adjoints<RESET>(m, v, count, keep, grad_y, grad_u, carry, s);
            for (i64 n = 0; n < m.states; ++n)
                add_gradients<RESET>(v, m.states, n, count, keep, u, grad_y, s, grads);
        }
    }
    static Coefficients gather(const B& bank, const typename B::Block& x, T* to) {
        const LowRankArgs& args = bank.args;
        const i64 size = args.n * STATE;
        T *a = to, *b = a + size, *C = b + size, *W = C + size, *Q = W + R * size;
        bank.gather(args.a, args.a_b, x, a);
        bank.gather(args.b, args.b_b, x, b);
        bank.gather(args.C, args.C_b, x, C);
        bank.gather(args.W, args.W_b, x, W, R);
        bank.gather(args.Q, args.Q_b, x, Q, R);
        return {a, b, C, W, Q, args.n};
    }
};

template <class T, int R> static void low_rank_forward_one(const Bank<T, LowRankArgs>& bank, i64 index) {
    typedef LowRank<T, R> L;
    constexpr i64 BLOCK = L::BLOCK, STEPS = L::B::STEPS;
    const LowRankArgs& args = bank.args;
    const auto x = bank.block(index);
    const i64 size = args.n * 2 * BLOCK;
    Scratch<T> scratch((4 + 2 * R) * size);
    if (!scratch.at) { bank.failed = true; return; }
    T* h = scratch.at + (3 + 2 * R) * size;
    alignas(64) T u[STEPS * BLOCK], y[STEPS * BLOCK], keep[STEPS * BLOCK] = {};
    const auto m = L::gather(bank, x, scratch.at);
    bank.gather(args.initial, args.initial_b, x, h);
    for (i64 segment = 0; segment < bank.segments; ++segment) {
        const i64 start = segment * STEPS, count = bank.count(segment);
        if (args.kept) std::memcpy((T*)args.kept + (index * bank.segments + segment) * size, h, sizeof(T) * (size_t)size);
        bank.gather_steps(args.u, args.u_b, args.u_t, x, start, count, u);
        if (args.reset) bank.gather_keep(x, start, count, keep);
        (args.reset ? L::template forward_segment<true> : L::template forward_segment<false>)(m, count, keep, u, h, y);
        bank.scatter_steps(args.y, x, start, count, y);
    }
    bank.scatter(args.final, x, h);
}

template <class T, int R> static void low_rank_backward_one(const Bank<T, LowRankArgs>& bank, i64 index) {
    typedef LowRank<T, R> L;
    constexpr i64 BLOCK = L::BLOCK, STEPS = L::B::STEPS;
    const LowRankArgs& args = bank.args;
    const auto x = bank.block(index);
    const i64 size = args.n * 2 * BLOCK, sums = (3 + 2 * R) * size;
    Scratch<T> scratch(2 * sums + size + (2 * STEPS + 1) * size);
    if (!scratch.at) { bank.failed = true; return; }
    T *to = scratch.at + sums, *carry = to + sums, *h = carry + size;
    T* const grads[] = {to, to + size, to + 2 * size, to + 3 * size, to + (3 + R) * size};
    alignas(64) T u[STEPS * BLOCK], grad_y[STEPS * BLOCK], grad_u[STEPS * BLOCK], keep[STEPS * BLOCK] = {};
    alignas(64) T k[STEPS * R * BLOCK], grad_k[STEPS * R * BLOCK];
    const typename L::Segment s = {h, h + (STEPS + 1) * size, k, grad_k};
    const auto m = L::gather(bank, x, scratch.at);
    bank.gather(args.grad_final, args.channels * args.n * 2, x, carry);
    std::memset(to, 0, sizeof(T) * (size_t)sums);
    for (i64 segment = bank.segments - 1; segment >= 0; --segment) {
        const i64 start = segment * STEPS, count = bank.count(segment);
        std::memcpy(h, (const T*)args.kept + (index * bank.segments + segment) * size, sizeof(T) * (size_t)size);
        bank.gather_steps(args.u, args.u_b, args.u_t, x, start, count, u);
        bank.gather_steps(args.grad_y, args.times * args.channels, args.channels, x, start, count, grad_y);
        if (args.reset) bank.gather_keep(x, start, count, keep);
        (args.reset ? L::template backward_segment<true> : L::template backward_segment<false>)(
            m, count, keep, u, grad_y, grad_u, carry, s, grads);
        bank.scatter_steps(args.grad_u, x, start, count, grad_u);
    }
    bank.scatter(args.grad_a, x, grads[0]);
    bank.scatter(args.grad_b, x, grads[1]);
    bank.scatter(args.grad_C, x, grads[2]);
    bank.scatter(args.grad_W, x, grads[3], R);
    bank.scatter(args.grad_Q, x, grads[4], R);
    bank.scatter(args.grad_initial, x, carry);
}
