// The gradient of the scan: chunk by chunk from the last, each first run forward again from the state that was kept.

// Of one tile and chunk.
template <class T> struct Local : Steps<T> {
    typedef typename Simd<T>::V V;
    V out[Q], value[Q];         // the gradient of C h + D u, and that sum itself
    V of_delta[Q], of_drive[Q];
    V decay[Q], of_decay[Q];    // SHARED: the decay and its gradient
    V soft[Q], slope[Q];        // of the step before its gap; the slope of softplus
    V gate[Q];                  // logistic(z)
};

// Of one step, NB states of a tile on their way back. In one struct: arrays whose distance is a multiple of 4096 bytes
// would be taken for each other by processors that compare twelve bits of an address.
template <class T, int NB, bool WEIGHTED> struct Trail {
    typedef typename Simd<T>::V V;
    alignas(64) V before[NB];      // the state before the step
    V decay[NB];                   // a
    V weight[WEIGHTED ? NB : 1];   // w
    V B[NB], C[NB];                // what the tiles so far add to their gradients
};

// Where the states before a chunk stand: k + 1 follows k by `next` numbers; the first `count` lanes.
template <class T> struct Start { const T* from; i64 next, count; };

// A block of NB states: forward again from the start of the chunk, then back.
template <class T, int RULE, int NB>
static inline void retreat(const Row<T>& r, i64 k, const T* A, const Start<T>& start, T* adjoint, double* of_A,
                           Local<T>& g, Trail<T, NB, Rule<T, RULE>::weighted>* trail, bool first) {
    typedef Simd<T> S;
    typedef Rule<T, RULE> R;
    typedef typename S::V V;
    constexpr i64 W = S::W;
    const V none[NB] = {};
    V h[NB], rate[NB];
    for (int j = 0; j < NB; ++j) {
        h[j] = S::load(start.from + (k + j) * start.next, start.count);
        rate[j] = RULE == SHARED ? V{} : S::load(A + (k + j) * W);
    }
    for (i64 q = 0; q < r.steps; ++q) {
        const T *B = r.B + q * r.n + k, *C = r.C + q * r.n + k;
        auto& row = trail[q];
        const V delta = g.delta[q], drive = g.drive[q], shared = RULE == SHARED ? g.decay[q] : V{};
        for (int j = 0; j < NB; ++j) row.before[j] = h[j];
        if (r.fresh[q]) for (int j = 0; j < NB; ++j) h[j] = V{};
        for (int j = 0; j < NB; ++j) {
            V w;
            const V a = RULE == SHARED ? shared : R::decay(delta * rate[j], &w);
            if (RULE != SHARED) row.decay[j] = a;
            if (R::weighted) row.weight[j] = w;
            h[j] = a * h[j] + (R::weighted ? drive * w : drive) * B[j];
        }
        if (!r.a.grad_z) continue;
        V y = g.value[q];
        for (int j = 0; j < NB; ++j) y += h[j] * C[j];
        g.value[q] = y;
    }
    V x[NB], rate_sum[NB];
    for (int j = 0; j < NB; ++j) { x[j] = S::load(adjoint + (k + j) * W); rate_sum[j] = V{}; }
    for (i64 q = r.steps - 1; q >= 0; --q) {
        const T *B = r.B + q * r.n + k, *C = r.C + q * r.n + k;
        auto& row = trail[q];
        const V out = g.out[q], delta = g.delta[q], drive = g.drive[q], shared = RULE == SHARED ? g.decay[q] : V{};
        const V *sum_B = first ? none : row.B, *sum_C = first ? none : row.C;
        V of_delta = V{}, of_drive = V{};
        for (int j = 0; j < NB; ++j) {
            x[j] += out * C[j];
            const V w = R::weighted ? row.weight[j] : V{}, a = RULE == SHARED ? shared : row.decay[j];
            const V to_B = R::weighted ? x[j] * w : x[j];
            of_drive += to_B * B[j];
            row.B[j] = sum_B[j] + to_B * drive;
            row.C[j] = sum_C[j] + out * h[j];
            h[j] = row.before[j];
            const V past = r.fresh[q] ? V{} : h[j];
            if (RULE == SHARED) {
                of_delta += x[j] * past;
            } else {
                const V of_w = R::weighted ? x[j] * drive * B[j] : V{};
                const V of_exponent = R::exponent(delta * rate[j], a, w, x[j], past, of_w);
                of_delta += of_exponent * rate[j];
                rate_sum[j] += of_exponent * delta;
            }
            x[j] = x[j] * a;
        }
        if (r.fresh[q]) for (int j = 0; j < NB; ++j) x[j] = V{};
        g.of_drive[q] += of_drive;
        (RULE == SHARED ? g.of_decay : g.of_delta)[q] += of_delta;
    }
    for (int j = 0; j < NB; ++j) {
        S::store(adjoint + (k + j) * W, x[j]);
        if (RULE != SHARED) S::add_to(of_A + (k + j) * W, rate_sum[j]);
    }
}

// sums (Q, NB) += the sums over channels of what `field` holds for each of the steps.
template <class T, int NB, class Row, class Field>
static inline void fold(T* sums, const Row* trail, i64 steps, Field field) {
    typedef Simd<T> S;
    constexpr i64 W = S::W;
    for (i64 row = 0; row < steps * NB; row += W) {
        typename S::V x[W];
        for (i64 i = 0; i < W; ++i) x[i] = field(trail[(row + i) / NB])[(row + i) % NB];
        S::store(sums + row, S::load(sums + row) + S::totals(x));
    }
}

template <class T, int RULE> struct Backward {
    typedef Simd<T> S;
    typedef Elementary<T> E;
    typedef Rule<T, RULE> R;
    typedef typename S::V V;
    static constexpr i64 W = S::W, TOGETHER = 4;  // tiles whose sums over channels are taken together
    static constexpr int NB = 4;
    const SelectiveArgs& a;
    Row<T> r;
    Local<T> local[TOGETHER];
    T *adjoint, *sum_B, *sum_C, *sum_gap;  // sums over the channels of a part: (Q, n) in blocks of NB states, (Q)
    double *of_A, *of_D, *of_bias;

    static i64 scratch(const SelectiveArgs& a, const Cut<T>& cut) {
        return Row<T>::scratch(a, cut) + cut.tiles * a.n * W + (2 * a.n + 1) * Q;
    }
    static i64 totals(const SelectiveArgs& a, const Cut<T>& cut) { return cut.tiles * (a.decays + 2) * W; }

    Backward(const SelectiveArgs& args, const Cut<T>& cut, i64 item, Scratch<T>& memory, Scratch<double>& total)
        : a(args), r(args, cut, item, memory, R::unit) {
        adjoint = memory.take(cut.tiles * a.n * W);
        sum_B = memory.take(Q * a.n); sum_C = memory.take(Q * a.n); sum_gap = memory.take(Q);
        of_A = total.take(cut.tiles * a.decays * W);
        of_D = total.take(cut.tiles * W); of_bias = total.take(cut.tiles * W);
        if (a.grad_final) r.transpose(adjoint, at<T>(a.grad_final, (r.b * a.channels + r.first) * r.n));
    }
    void run(T* to_B, T* to_C, T* to_gap) {
        for (i64 t = (a.times - 1) / Q * Q; t >= 0; t -= Q) {
            r.begin_chunk(t);
            if (a.grad_dt && r.share > 1)
                for (i64 q = 0; q < r.steps; ++q)
                    zero(at<T>(a.grad_dt, (r.b * a.times + t + q) * a.heads + r.first / r.share), r.width / r.share);
            zero(sum_B, Q * r.n); zero(sum_C, Q * r.n); zero(sum_gap, Q);
            for (i64 i = 0; i < r.tiles(); i += TOGETHER)
                tiles(i, r.tiles() - i < TOGETHER ? r.tiles() - i : TOGETHER);
            for (i64 q = 0; q < r.steps; ++q) {
                const i64 row = r.b * a.times + t + q, to = (row * a.groups + r.group) * r.n;
                if (to_B) write(to_B + to, sum_B, q);
                if (to_C) write(to_C + to, sum_C, q);
                if (to_gap) to_gap[row] = sum_gap[q];
            }
        }
        if (a.grad_initial) r.transpose_back(at<T>(a.grad_initial, (r.b * a.channels + r.first) * r.n), adjoint);
        if (a.grad_A) to_heads(at<T>(a.grad_A, r.b * a.heads * a.decays), of_A, a.decays);
        if (a.grad_D) to_heads(at<T>(a.grad_D, r.b * a.heads), of_D, 1);
        if (a.grad_bias) to_heads(at<T>(a.grad_bias, r.b * a.heads), of_bias, 1);
    }
    // One step of the sums over channels, which are in blocks of NB states and then one by one.
    void write(T* out, const T* sum, i64 q) const {
        i64 k = 0;
        for (; k + NB <= r.n; k += NB)
            for (i64 j = 0; j < NB; ++j) out[k + j] = sum[k * Q + q * NB + j];
        for (; k < r.n; ++k) out[k] = sum[k * Q + q];
    }
    static void zero(T* p, i64 count) { for (i64 i = 0; i < count; ++i) p[i] = T(0); }
    // (tiles, k, W), summed over the channels of each head, to (heads, k)
    void to_heads(T* out, const double* in, i64 size) const {
        for (i64 j = r.first / r.share; j < (r.first + r.width) / r.share; ++j)
            for (i64 k = 0; k < size; ++k) {
                double sum = 0;
                for (i64 i = j * r.share - r.first; i < (j + 1) * r.share - r.first; ++i)
                    sum += in[(i / W * size + k) * W + i % W];
                out[j * size + k] = (T)sum;
            }
    }
    void tiles(i64 first, i64 count) {
        for (i64 i = 0; i < count; ++i) prepare(first + i, local[i]);
        i64 k = 0;
        for (; k + NB <= r.n; k += NB) block<NB>(k, first, count);
        for (; k < r.n; ++k) block<1>(k, first, count);
        for (i64 i = 0; i < count; ++i) finish(first + i, local[i]);
    }
    template <int N> void block(i64 k, i64 first, i64 count) {
        Trail<T, N, R::weighted> trail[Q];
        const i64 chunk = r.t0 / Q;
        for (i64 i = first; i < first + count; ++i) {
            Start<T> start = {r.state + i * r.n * W, W, W};
            if (chunk) {
                r.begin_tile(i);
                start = {r.kept(chunk, 0), a.channels, r.count};
            }
            retreat<T, RULE, N>(r, k, r.A + i * a.decays * W, start, adjoint + i * r.n * W, of_A + i * a.decays * W,
                                local[i - first], trail, i == first);
        }
        for (i64 q = r.steps; q < Q; ++q)  // as many as make the sums whole
            for (int j = 0; j < N; ++j) trail[q].B[j] = trail[q].C[j] = V{};
        fold<T, N>(sum_B + k * Q, trail, Q, [](const Trail<T, N, R::weighted>& row) { return row.B; });
        fold<T, N>(sum_C + k * Q, trail, Q, [](const Trail<T, N, R::weighted>& row) { return row.C; });
    }
    void prepare(i64 i, Local<T>& g) {
        r.begin_tile(i);
        fetch_before();
        r.read_steps(g, g.soft, g.slope);
        const T* A = r.A + i * a.decays * W;
        const V D = r.direct();
        for (i64 q = 0; q < r.steps; ++q) {
            V out = V{};
            if (r.live[q] && a.grad_y) {
                out = S::load(r.result((void*)a.grad_y, q), r.count);
                if (a.z) {
                    const V z = S::load(r.of_channels(a.z, a.z_b, a.z_t, q), r.count);
                    g.gate[q] = E::logistic(z);
                    out *= z * g.gate[q];
                }
            }
            g.out[q] = out;
            g.value[q] = D * g.input[q];
            g.of_delta[q] = g.of_drive[q] = g.of_decay[q] = V{};
            if (RULE == SHARED) g.decay[q] = R::decay(g.delta[q] * S::load(A), nullptr);
        }
    }
    // Asks for what the tile needs of the chunk before, which comes next.
    void fetch_before() const {
        if (r.t0 == 0) return;
        r.fetch_steps(-Q);
        if (r.t0 > Q) for (i64 k = 0; k < r.n; ++k) fetch(r.kept(r.t0 / Q - 1, k));
        void* const results[] = {a.grad_u, a.grad_z, r.share == 1 ? a.grad_dt : nullptr};
        for (i64 q = -Q; q < 0; ++q) {
            if (a.grad_y) fetch(r.result((void*)a.grad_y, q));
            for (void* p : results) if (p) fetch<true>(r.result(p, q));
        }
    }
    // From the gradients of step, drive and output to those of the arguments.
    void finish(i64 i, Local<T>& g) {
        r.begin_tile(i);
        const V D = r.direct();
        V rate_sum = V{}, D_sum = V{}, bias_sum = V{};
        for (i64 q = 0; q < r.steps; ++q) {
            if (RULE == SHARED) {
                const V of_exponent = g.of_decay[q] * g.decay[q];
                g.of_delta[q] += of_exponent * S::load(r.A + i * a.decays * W);
                rate_sum += of_exponent * g.delta[q];
            }
            const i64 row = r.b * a.times + r.t0 + q;
            V of_gap = V{}, of_step = V{}, of_u = V{}, of_z = V{};
            if (r.live[q]) {
                const V of_delta = g.of_delta[q] * R::of_unit + g.of_drive[q] * g.input[q];
                of_u = g.of_drive[q] * g.delta[q] + g.out[q] * D;
                of_step = of_delta * r.gap(q);
                if (a.softplus) of_step *= g.slope[q];
                of_gap = of_delta * g.soft[q];
                if (a.grad_z && a.grad_y) {
                    const V z = S::load(r.of_channels(a.z, a.z_b, a.z_t, q), r.count), s = g.gate[q];
                    of_z = S::load(r.result((void*)a.grad_y, q), r.count) * g.value[q] * s * (T(1) + z * (T(1) - s));
                }
                bias_sum += of_step;
                D_sum += g.out[q] * g.input[q];
            }
            if (a.grad_u) S::store(r.result(a.grad_u, q), of_u, r.count);
            if (a.grad_z) S::store(r.result(a.grad_z, q), of_z, r.count);
            if (a.grad_dt && r.share == 1) S::store(r.result(a.grad_dt, q), of_step, r.count);
            else if (a.grad_dt) scatter(at<T>(a.grad_dt, row * a.heads), of_step);
            if (a.grad_gap) sum_gap[q] += S::sum(of_gap);
        }
        if (RULE == SHARED) S::add_to(of_A + i * W, rate_sum);
        S::add_to(of_D + i * W, D_sum);
        S::add_to(of_bias + i * W, bias_sum);
    }
    void scatter(T* out, V v) const {
        T x[W];
        S::store(x, v);
        if (r.head[0] == r.head[r.count - 1]) { out[r.head[0]] += S::sum(v); return; }  // other lanes are 0
        for (i64 l = 0; l < r.count; ++l) out[r.head[l]] += x[l];
    }
};

template <class T, int RULE> static int selective_backward_by(const SelectiveArgs& a) {
    const Cut<T> cut(a);
    const i64 sums = a.batch * a.times * a.groups * a.n, gaps = a.batch * a.times;
    const bool many_B = cut.parts > 1, many_gap = cut.parts * a.groups > 1;
    Scratch<T> shares((many_B ? cut.parts * sums * (!!a.grad_B + !!a.grad_C) : 0) +
                      (many_gap && a.grad_gap ? cut.parts * a.groups * gaps : 0));
    if (!shares.data) return 2;
    T* of_B = a.grad_B && many_B ? shares.take(cut.parts * sums) : (T*)a.grad_B;
    T* of_C = a.grad_C && many_B ? shares.take(cut.parts * sums) : (T*)a.grad_C;
    T* of_gap = a.grad_gap && many_gap ? shares.take(cut.parts * a.groups * gaps) : (T*)a.grad_gap;
    auto piece = [&](i64 begin, i64 end) {
        Scratch<T> memory(Backward<T, RULE>::scratch(a, cut));
        Scratch<double> total(Backward<T, RULE>::totals(a, cut));
        if (!memory.data || !total.data) return false;
        for (i64 item = begin; item < end; ++item) {
            if (item > begin) { memory.clear(); total.clear(); }
            Backward<T, RULE> pass(a, cut, item, memory, total);
            const i64 part = many_B ? pass.r.part * sums : 0;
            const i64 gap = many_gap ? (pass.r.part * a.groups + pass.r.group) * gaps : 0;
            pass.run(of_B ? of_B + part : nullptr, of_C ? of_C + part : nullptr, of_gap ? of_gap + gap : nullptr);
        }
        return true;
    };
    if (in_parallel(a.parallel_for, cut.count, piece)) return 2;
    if (many_B && a.grad_B) add_parts((T*)a.grad_B, of_B, cut.parts, sums);
    if (many_B && a.grad_C) add_parts((T*)a.grad_C, of_C, cut.parts, sums);
    if (many_gap && a.grad_gap) add_parts((T*)a.grad_gap, of_gap, cut.parts * a.groups, gaps);
    return 0;
}

template <class T> static int selective_backward_of(const SelectiveArgs& a) {
    if (a.rule == SELECTIVE_EULER) {
        const bool shared = a.decays == 1 && a.n > 1;
        return shared ? selective_backward_by<T, SHARED>(a) : selective_backward_by<T, SELECTIVE_EULER>(a);
    }
    if (a.decays != a.n) return 3;
    if (a.rule == SELECTIVE_ZOH) return selective_backward_by<T, SELECTIVE_ZOH>(a);
    return a.rule == SELECTIVE_BILINEAR ? selective_backward_by<T, SELECTIVE_BILINEAR>(a) : 3;
}
