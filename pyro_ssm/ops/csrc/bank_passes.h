// Lanes are pairs (row, channel). A block of them, over all steps, is one task; its states stay in the first cache.

// Memory of one task, on a line.
template <class T> struct Scratch {
    void* block;
    T* at;
    explicit Scratch(i64 count) {
        block = std::malloc(sizeof(T) * (size_t)count + 64);
        at = block ? (T*)(((uintptr_t)block + 63) & ~(uintptr_t)63) : nullptr;
    }
    Scratch(const Scratch&) = delete;
    ~Scratch() { std::free(block); }
};

template <class T> struct Bank {
    enum { BLOCK = BANK_BYTES / (int)sizeof(T), N = Full<T>::value, NV = BLOCK / N };
    typedef typename Register<T, N>::type V;
    typedef Planes<V, 2> Z;

    const BankArgs& args;
    i64 lanes, blocks, segments;
    mutable bool failed = false;  // no memory: an exception must not pass through the threads of others
    explicit Bank(const BankArgs& a) : args(a) {
        lanes = a.batch * a.channels;
        blocks = (lanes + BLOCK - 1) / BLOCK;
        segments = (a.times + BANK_STEPS - 1) / BANK_STEPS;
    }
    static PYRO_SSM_HD V get(const T* from) { V x; std::memcpy(&x, from, sizeof(x)); return x; }
    static PYRO_SSM_HD void put(T* to, V x) { std::memcpy(to, &x, sizeof(x)); }

    // The lanes of one block.
    struct Lane { i64 row, channel; };
    struct Block {
        i64 first, count;
        bool whole;  // all in one row, side by side
        Lane lane[BLOCK];
    };
    Block block(i64 index) const {
        Block x;
        x.first = index * BLOCK;
        x.count = lanes - x.first < BLOCK ? lanes - x.first : (i64)BLOCK;
        for (i64 l = 0; l < x.count; ++l) x.lane[l] = {(x.first + l) / args.channels, (x.first + l) % args.channels};
        x.whole = x.count == BLOCK && x.lane[0].row == x.lane[BLOCK - 1].row;
        return x;
    }
    // Complex coefficients of all states as [state][re, im][lane]; zero where there is no lane.
    void gather(const void* from, i64 of_row, const Block& x, T* to) const {
        std::memset(to, 0, sizeof(T) * (size_t)(args.n * 2 * BLOCK));
        if (!from) return;
        for (i64 l = 0; l < x.count; ++l) {
            const T* z = (const T*)from + x.lane[l].row * of_row + x.lane[l].channel * args.n * 2;
            for (i64 k = 0; k < args.n * 2; ++k) to[k * BLOCK + l] = z[k];
        }
    }
    void scatter(void* to, const Block& x, const T* from) const {
        if (!to) return;
        for (i64 l = 0; l < x.count; ++l)
            for (i64 k = 0; k < args.n * 2; ++k)
                ((T*)to)[(x.first + l) * args.n * 2 + k] = from[k * BLOCK + l];
    }
    // Numbers of (batch, times, channels) as [step][lane].
    void gather_steps(const void* from, i64 of_row, i64 of_step, const Block& x, i64 start, i64 count, T* to) const {
        if (!from) { std::memset(to, 0, sizeof(T) * (size_t)(count * BLOCK)); return; }
        if (x.whole) {
            const T* z = (const T*)from + x.lane[0].row * of_row + start * of_step + x.lane[0].channel;
            for (i64 q = 0; q < count; ++q) std::memcpy(to + q * BLOCK, z + q * of_step, sizeof(T) * BLOCK);
            return;
        }
        if (x.count < BLOCK) std::memset(to, 0, sizeof(T) * (size_t)(count * BLOCK));
        for (i64 l = 0; l < x.count; ++l) {
            const T* z = (const T*)from + x.lane[l].row * of_row + start * of_step + x.lane[l].channel;
            for (i64 q = 0; q < count; ++q) to[q * BLOCK + l] = z[q * of_step];
        }
    }
    void scatter_steps(void* to, const Block& x, i64 start, i64 count, const T* from) const {
        if (!to) return;
        for (i64 q = 0; q < count; ++q) {
            T* row = (T*)to + (x.lane[0].row * args.times + start + q) * args.channels + x.lane[0].channel;
            if (x.whole) { std::memcpy(row, from + q * BLOCK, sizeof(T) * BLOCK); continue; }
            for (i64 l = 0; l < x.count; ++l)
                ((T*)to)[(x.lane[l].row * args.times + start + q) * args.channels + x.lane[l].channel] = from[q * BLOCK + l];
        }
    }
    // 1 where the state is kept, 0 where it is reset.
    void gather_keep(const Block& x, i64 start, i64 count, T* to) const {
        for (i64 l = 0; l < BLOCK; ++l) {
            const uint8_t* z = l < x.count ? args.reset + x.lane[l].row * args.reset_b + start : nullptr;
            for (i64 q = 0; q < count; ++q) to[q * BLOCK + l] = z && z[q] ? T(0) : T(1);
        }
    }

    static PYRO_SSM_HD Z load(const T* from, int v) { return {{get(from + v * N), get(from + BLOCK + v * N)}}; }
    static PYRO_SSM_HD void store(T* to, int v, const Z& z) { put(to + v * N, z.p[0]); put(to + BLOCK + v * N, z.p[1]); }
    static PYRO_SSM_HD Z times(V s, const Z& z) { return {{s * z.p[0], s * z.p[1]}}; }

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

template <class T> static int bank_tasks(const BankArgs& a, void (*one)(const Bank<T>&, i64)) {
    const Bank<T> bank(a);
    auto some = [&](i64 begin, i64 end) {
        for (i64 i = begin; i < end; ++i) one(bank, i);
    };
    const i64 work = a.times * a.n + 1;
    parallel(a.parallel_for, bank.blocks, work > 4096 ? 1 : 4096 / work, some);
    return bank.failed ? SCAN_NO_MEMORY : SCAN_OK;
}

template <class T> static void bank_forward_one(const Bank<T>& bank, i64 index) {
    constexpr i64 BLOCK = Bank<T>::BLOCK, STEPS = BANK_STEPS;
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
        const i64 start = segment * STEPS, count = start + STEPS <= args.times ? STEPS : args.times - start;
        if (args.kept) std::memcpy((T*)args.kept + (index * bank.segments + segment) * size, h, sizeof(T) * (size_t)size);
        bank.gather_steps(args.u, args.u_b, args.u_t, x, start, count, u);
        if (args.reset) {
            bank.gather_keep(x, start, count, keep);
            Bank<T>::template forward_block<true>(count, args.n, a, b, C, h, u, keep, y);
        } else {
            Bank<T>::template forward_block<false>(count, args.n, a, b, C, h, u, keep, y);
        }
        bank.scatter_steps(args.y, x, start, count, y);
    }
    bank.scatter(args.final, x, h);
}

template <class T> static void bank_backward_one(const Bank<T>& bank, i64 index) {
    constexpr i64 BLOCK = Bank<T>::BLOCK, STEPS = BANK_STEPS, N = Bank<T>::N;
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
        const i64 start = segment * STEPS, count = start + STEPS <= args.times ? STEPS : args.times - start;
        const T* before = (const T*)args.kept + (index * bank.segments + segment) * size;
        bank.gather_steps(args.u, args.u_b, args.u_t, x, start, count, u);
        bank.gather_steps(args.grad_y, args.times * args.channels, args.channels, x, start, count, grad_y);
        std::memset(grad_u, 0, sizeof(T) * (size_t)(count * BLOCK));
        if (args.reset) bank.gather_keep(x, start, count, keep);
        for (int v = 0; v < Bank<T>::NV; ++v)
            for (i64 n = 0; n < args.n; ++n) {
                const i64 at = n * 2 * BLOCK;
                (args.reset ? Bank<T>::template backward_steps<true> : Bank<T>::template backward_steps<false>)(
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
