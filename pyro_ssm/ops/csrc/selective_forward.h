// The scan forward: for each chunk of steps and tile of W channels, states in registers.

template <class T, int RULE, int NB>
static inline void advance(const Row<T>& r, const Steps<T>& tile, i64 k, const T* A, T* state,
                           const typename Simd<T>::V* decay, typename Simd<T>::V* sums) {
    typedef Simd<T> S;
    typedef Rule<T, RULE> R;
    typedef typename S::V V;
    constexpr i64 W = S::W;
    V h[NB], rate[NB];
    for (int j = 0; j < NB; ++j) {
        h[j] = S::load(state + (k + j) * W);
        rate[j] = RULE == SHARED ? V{} : S::load(A + (k + j) * W);
    }
    for (i64 q = 0; q < r.steps; ++q) {
        const T *B = r.B + q * r.n + k, *C = r.C + q * r.n + k;
        if (r.fresh[q]) for (int j = 0; j < NB; ++j) h[j] = V{};
        const V delta = tile.delta[q], drive = tile.drive[q], shared = RULE == SHARED ? decay[q] : V{};
        V y = sums[q];
        for (int j = 0; j < NB; ++j) {
            V w;
            const V a = RULE == SHARED ? shared : R::decay(delta * rate[j], &w);
            h[j] = a * h[j] + (R::weighted ? drive * w : drive) * B[j];
            y += h[j] * C[j];
        }
        sums[q] = y;
    }
    for (int j = 0; j < NB; ++j) S::store(state + (k + j) * W, h[j]);
}

template <class T, int RULE>
static void forward_row(const SelectiveArgs& a, const Cut<T>& cut, i64 item, Scratch<T>& memory) {
    typedef Simd<T> S;
    typedef Rule<T, RULE> R;
    typedef typename S::V V;
    constexpr i64 W = S::W;
    constexpr int NB = RULE == SHARED ? 8 : 4;
    Row<T> r(a, cut, item, memory, R::unit);
    Steps<T> steps;
    alignas(64) V decay[Q], sums[Q];
    for (i64 t = 0; t < a.times; t += Q) {
        r.begin_chunk(t);
        for (i64 tile = 0; tile < r.tiles(); ++tile) {
            r.begin_tile(tile);
            r.fetch_steps(Q);
            for (i64 q = 0; q < r.steps; ++q) fetch<true>(r.result(a.y, q));
            T* state = r.state + tile * r.n * W;
            const T* A = r.A + tile * a.decays * W;
            if (a.kept && t) for (i64 k = 0; k < r.n; ++k) S::store(r.kept(t / Q, k), S::load(state + k * W), r.count);
            r.read_steps(steps);
            const V D = r.direct();
            for (i64 q = 0; q < r.steps; ++q) {
                sums[q] = D * steps.input[q];
                if (RULE == SHARED) decay[q] = R::decay(steps.delta[q] * S::load(A), nullptr);
            }
            i64 k = 0;
            for (; k + NB <= r.n; k += NB) advance<T, RULE, NB>(r, steps, k, A, state, decay, sums);
            for (; k < r.n; ++k) advance<T, RULE, 1>(r, steps, k, A, state, decay, sums);
            for (i64 q = 0; q < r.steps; ++q) {
                V y = sums[q];
                if (a.z && r.live[q]) {
                    const V z = S::load(r.of_channels(a.z, a.z_b, a.z_t, q), r.count);
                    y *= z * Elementary<T>::logistic(z);
                }
                S::store(r.result(a.y, q), r.live[q] ? y : V{}, r.count);
            }
        }
    }
    r.transpose_back(at<T>(a.final, (r.b * a.channels + r.first) * r.n), r.state);
}

template <class T, int RULE> static int selective_forward_by(const SelectiveArgs& a) {
    if (a.times > 0 && a.times < 4 && (2 * a.n >= Simd<T>::W || a.channels * 2 < Simd<T>::W))
        return few_steps<T, RULE>(a);
    const Cut<T> cut(a);
    auto piece = [&](i64 begin, i64 end) {
        Scratch<T> memory(Row<T>::scratch(a, cut));
        if (!memory.data) return false;
        for (i64 item = begin; item < end; ++item) {
            if (item > begin) memory.clear();
            forward_row<T, RULE>(a, cut, item, memory);
        }
        return true;
    };
    return in_parallel(a.parallel_for, cut.count, piece);
}

template <class T> static int selective_forward_of(const SelectiveArgs& a) {
    if (a.rule == SELECTIVE_EULER) {
        const bool shared = a.decays == 1 && a.n > 1;
        return shared ? selective_forward_by<T, SHARED>(a) : selective_forward_by<T, SELECTIVE_EULER>(a);
    }
    if (a.decays != a.n) return 3;
    if (a.rule == SELECTIVE_ZOH) return selective_forward_by<T, SELECTIVE_ZOH>(a);
    return a.rule == SELECTIVE_BILINEAR ? selective_forward_by<T, SELECTIVE_BILINEAR>(a) : 3;
}
