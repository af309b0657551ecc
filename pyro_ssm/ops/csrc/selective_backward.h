// The gradient of the scan: chunk by chunk from the last, each first run forward again from the state that was kept.

// Sums over the channels of a part: gradients of B and C, for NB states at a time (Q, NB), and of the gap (Q).
template <class T> struct Sums { T *B, *C, *gap; };

// sums (ROWS) += the sums over the lanes of x (ROWS, W); x is used up.
template <class T, int ROWS> SIMD_INLINE void fold(T* sums, typename Simd<T>::V* x) {
    typedef Simd<T> S;
    for (int r = 0; r < ROWS; r += S::W) S::store(sums + r, S::load(sums + r) + S::totals(x + r));
}

// Of one tile and chunk.
template <class T> struct Local {
    typedef typename Simd<T>::V V;
    alignas(64) V out[Q];  // gradient of C h + D u
    V value[Q];            // C h + D u
    V decay[Q], of_decay[Q];  // SHARED: the decay and its gradient
    V of_delta[Q], of_drive[Q];
    V soft[Q], slope[Q];      // of the step before its gap; the slope of softplus
    V gate[Q];                // logistic(z)
};

template <class T, bool SHARED, int NB>
static inline void retreat(const Row<T>& r, i64 k, const T* A, const T* before, T* adjoint,
                           double* of_A, Local<T>& g, const Sums<T>& sums) {
    typedef Simd<T> S;
    typedef typename S::V V;
    constexpr i64 W = S::W;
    alignas(64) V after[(Q + 1) * NB], decay[SHARED ? 1 : Q * NB];
    alignas(64) V from_B[Q * NB], from_C[Q * NB];
    V x[NB], rate[NB], rate_sum[NB];
    for (i64 i = r.steps * NB; i < Q * NB; ++i) from_B[i] = from_C[i] = V{};
    for (int j = 0; j < NB; ++j) {
        after[j] = S::load(before + (k + j) * W);
        rate[j] = SHARED ? V{} : S::load(A + (k + j) * W);
        x[j] = S::load(adjoint + (k + j) * W);
        rate_sum[j] = V{};
    }
    for (i64 q = 0; q < r.steps; ++q) {
        const T *B = r.B + q * r.n + k, *C = r.C + q * r.n + k;
        V* h = after + q * NB;
        const V delta = r.delta[q], drive = r.drive[q], shared = SHARED ? g.decay[q] : V{};
        V y = g.value[q];
        for (int j = 0; j < NB; ++j) {
            const V a = SHARED ? shared : Elementary<T>::exp(delta * rate[j]);
            if (!SHARED) decay[q * NB + j] = a;
            h[NB + j] = (r.fresh[q] ? V{} : a * h[j]) + drive * B[j];
            y += h[NB + j] * C[j];
        }
        g.value[q] = y;
    }
    for (i64 q = r.steps - 1; q >= 0; --q) {
        const T *B = r.B + q * r.n + k, *C = r.C + q * r.n + k;
        const V* h = after + q * NB;
        const V out = g.out[q], delta = r.delta[q], drive = r.drive[q], shared = SHARED ? g.decay[q] : V{};
        V of_delta = V{}, of_drive = g.of_drive[q], of_decay = V{};
        for (int j = 0; j < NB; ++j) {
            x[j] += out * C[j];
            of_drive += x[j] * B[j];
            from_B[q * NB + j] = x[j] * drive;
            from_C[q * NB + j] = out * h[NB + j];
            if (r.fresh[q]) { x[j] = V{}; continue; }
            const V a = SHARED ? shared : decay[q * NB + j];
            if (SHARED) {
                of_decay += x[j] * h[j];
                x[j] = x[j] * a;
            } else {
                x[j] = x[j] * a;
                const V of_exponent = x[j] * h[j];
                of_delta += of_exponent * rate[j];
                rate_sum[j] += of_exponent * delta;
            }
        }
        g.of_drive[q] = of_drive;
        if (SHARED) g.of_decay[q] += of_decay;
        else g.of_delta[q] += of_delta;
    }
    for (int j = 0; j < NB; ++j) {
        S::store(adjoint + (k + j) * W, x[j]);
        if (!SHARED) S::add_to(of_A + (k + j) * W, rate_sum[j]);
    }
    fold<T, Q * NB>(sums.B + k * Q, from_B);
    fold<T, Q * NB>(sums.C + k * Q, from_C);
}

template <class T, bool SHARED> struct Backward {
    typedef Simd<T> S;
    typedef Elementary<T> E;
    typedef typename S::V V;
    static constexpr i64 W = S::W;
    static constexpr int NB = 4;
    const SelectiveArgs& a;
    Row<T> r;
    Local<T> g;
    Sums<T> sums;
    T *adjoint, *before;
    double *of_A, *of_D, *of_bias;

    static i64 scratch(const SelectiveArgs& a, const Cut<T>& cut) {
        return Row<T>::scratch(a, cut) + (cut.tiles + 1) * a.n * W + (2 * a.n + 1) * Q;
    }
    static i64 totals(const SelectiveArgs& a, const Cut<T>& cut) { return cut.tiles * (a.decays + 2) * W; }

    Backward(const SelectiveArgs& args, const Cut<T>& cut, i64 item, Scratch<T>& memory, Scratch<double>& total)
        : a(args), r(args, cut, item, memory, true) {
        adjoint = memory.take(cut.tiles * a.n * W);
        before = memory.take(a.n * W);
        sums = {memory.take(Q * a.n), memory.take(Q * a.n), memory.take(Q)};
        of_A = total.take(cut.tiles * a.decays * W); of_D = total.take(cut.tiles * W); of_bias = total.take(cut.tiles * W);
        if (a.grad_final) r.transpose(adjoint, at<T>(a.grad_final, (r.b * a.channels + r.first) * r.n));
    }
    void run(T* sum_B, T* sum_C, T* sum_gap) {
        for (i64 t = (a.times - 1) / Q * Q; t >= 0; t -= Q) {
            r.begin_chunk(t);
            if (a.grad_dt && r.share > 1)
                for (i64 q = 0; q < r.steps; ++q) zero(at<T>(a.grad_dt, (r.b * a.times + t + q) * a.heads + r.first / r.share), r.width / r.share);
            zero(sums.B, Q * r.n); zero(sums.C, Q * r.n); zero(sums.gap, Q);
            for (i64 i = 0; i < r.tiles(); ++i) tile(i);
            for (i64 q = 0; q < r.steps; ++q) {
                const i64 row = r.b * a.times + t + q, to = (row * a.groups + r.group) * r.n;
                if (sum_B) write(sum_B + to, sums.B, q);
                if (sum_C) write(sum_C + to, sums.C, q);
                if (sum_gap) sum_gap[row] = sums.gap[q];
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
    void tile(i64 i) {
        r.begin_tile(i);
        r.read_steps(g.soft, g.slope);
        const T* A = r.A + i * a.decays * W;
        T* x = adjoint + i * r.n * W;
        const i64 chunk = r.t0 / Q;
        for (i64 k = 0; k < r.n; ++k)
            S::store(before + k * W, chunk ? S::load(r.kept(chunk, k), r.count) : S::load(r.state + (i * r.n + k) * W));
        const V D = r.direct();
        for (i64 q = 0; q < r.steps; ++q) {
            V out = V{};
            if (r.live[q] && a.grad_y) {
                out = S::load(at<T>(a.grad_y, (r.b * a.times + r.t0 + q) * a.channels + r.c0), r.count);
                if (a.z) {
                    const V z = S::load(r.of_channels(a.z, a.z_b, a.z_t, q), r.count);
                    g.gate[q] = E::logistic(z);
                    out *= z * g.gate[q];
                }
            }
            g.out[q] = out;
            g.value[q] = D * r.input[q];
            g.of_delta[q] = g.of_drive[q] = g.of_decay[q] = V{};
            if (SHARED) g.decay[q] = E::exp(r.delta[q] * S::load(A));
        }
        i64 k = 0;
        for (; k + NB <= r.n; k += NB) retreat<T, SHARED, NB>(r, k, A, before, x, of_A + i * a.decays * W, g, sums);
        for (; k < r.n; ++k) retreat<T, SHARED, 1>(r, k, A, before, x, of_A + i * a.decays * W, g, sums);
        finish(i, A, D);
    }
    // From the gradients of step, drive and output to those of the arguments.
    void finish(i64 i, const T* A, V D) {
        V rate_sum = V{}, D_sum = V{}, bias_sum = V{};
        for (i64 q = 0; q < r.steps; ++q) {
            if (SHARED) {
                const V of_exponent = g.of_decay[q] * g.decay[q];
                g.of_delta[q] += of_exponent * S::load(A);
                rate_sum += of_exponent * r.delta[q];
            }
            const i64 row = r.b * a.times + r.t0 + q, to = row * a.channels + r.c0;
            V of_gap = V{}, of_step = V{}, of_u = V{}, of_z = V{};
            if (r.live[q]) {
                const V of_delta = g.of_delta[q] + g.of_drive[q] * r.input[q];
                of_u = g.of_drive[q] * r.delta[q] + g.out[q] * D;
                of_step = of_delta * r.gap(q);
                if (a.softplus) of_step *= g.slope[q];
                of_gap = of_delta * g.soft[q];
                if (a.grad_z && a.grad_y) {
                    const V z = S::load(r.of_channels(a.z, a.z_b, a.z_t, q), r.count), s = g.gate[q];
                    of_z = S::load(at<T>(a.grad_y, to), r.count) * g.value[q] * s * (T(1) + z * (T(1) - s));
                }
                bias_sum += of_step;
                D_sum += g.out[q] * r.input[q];
            }
            if (a.grad_u) S::store(at<T>(a.grad_u, to), of_u, r.count);
            if (a.grad_z) S::store(at<T>(a.grad_z, to), of_z, r.count);
            if (a.grad_dt && r.share == 1) S::store(at<T>(a.grad_dt, row * a.heads + r.c0), of_step, r.count);
            else if (a.grad_dt) scatter(at<T>(a.grad_dt, row * a.heads), of_step);
            if (a.grad_gap) sums.gap[q] += S::sum(of_gap);
        }
        if (SHARED) S::add_to(of_A + i * W, rate_sum);
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

template <class T, bool SHARED>
static int selective_backward_all(const SelectiveArgs& a) {
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
        Scratch<T> memory(Backward<T, SHARED>::scratch(a, cut));
        Scratch<double> total(Backward<T, SHARED>::totals(a, cut));
        if (!memory.data || !total.data) return false;
        for (i64 item = begin; item < end; ++item) {
            if (item > begin) { memory.clear(); total.clear(); }
            Backward<T, SHARED> pass(a, cut, item, memory, total);
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

template <class T>
static int selective_backward_of(const SelectiveArgs& a) {
    return a.decays == 1 && a.n > 1 ? selective_backward_all<T, true>(a) : selective_backward_all<T, false>(a);
}
