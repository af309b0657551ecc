// The scan forward: for each chunk of steps and tile of W channels, states in registers.

template <class T, bool SHARED, int NB>  // SHARED: one decay for all states of a channel
static inline void advance(const Row<T>& r, i64 k, const T* A, T* state, const typename Simd<T>::V* decay,
                           typename Simd<T>::V* sums) {
    typedef Simd<T> S;
    typedef typename S::V V;
    constexpr i64 W = S::W;
    V h[NB], rate[NB];
    for (int j = 0; j < NB; ++j) {
        h[j] = S::load(state + (k + j) * W);
        rate[j] = SHARED ? V{} : S::load(A + (k + j) * W);
    }
    for (i64 q = 0; q < r.steps; ++q) {
        const T *B = r.B + q * r.n + k, *C = r.C + q * r.n + k;
        if (r.fresh[q]) for (int j = 0; j < NB; ++j) h[j] = V{};
        const V delta = r.delta[q], drive = r.drive[q], shared = SHARED ? decay[q] : V{};
        V y = sums[q];
        for (int j = 0; j < NB; ++j) {
            const V a = SHARED ? shared : Elementary<T>::exp(delta * rate[j]);
            h[j] = a * h[j] + drive * B[j];
            y += h[j] * C[j];
        }
        sums[q] = y;
    }
    for (int j = 0; j < NB; ++j) S::store(state + (k + j) * W, h[j]);
}

template <class T, bool SHARED>
static void forward_row(const SelectiveArgs& a, const Cut<T>& cut, i64 item, Scratch<T>& memory) {
    typedef Simd<T> S;
    typedef typename S::V V;
    constexpr i64 W = S::W;
    constexpr int NB = SHARED ? 8 : 4;
    Row<T> r(a, cut, item, memory, true);
    alignas(64) V decay[Q], sums[Q];
    for (i64 t = 0; t < a.times; t += Q) {
        r.begin_chunk(t);
        for (i64 tile = 0; tile < r.tiles(); ++tile) {
            r.begin_tile(tile);
            T* state = r.state + tile * r.n * W;
            const T* A = r.A + tile * a.decays * W;
            if (a.kept && t) for (i64 k = 0; k < r.n; ++k) S::store(r.kept(t / Q, k), S::load(state + k * W), r.count);
            r.read_steps();
            const V D = r.direct();
            for (i64 q = 0; q < r.steps; ++q) {
                sums[q] = D * r.input[q];
                if (SHARED) decay[q] = Elementary<T>::exp(r.delta[q] * S::load(A));
            }
            i64 k = 0;
            for (; k + NB <= r.n; k += NB) advance<T, SHARED, NB>(r, k, A, state, decay, sums);
            for (; k < r.n; ++k) advance<T, SHARED, 1>(r, k, A, state, decay, sums);
            for (i64 q = 0; q < r.steps; ++q) {
                V y = sums[q];
                if (a.z && r.live[q]) {
                    const V z = S::load(r.of_channels(a.z, a.z_b, a.z_t, q), r.count);
                    y *= z * Elementary<T>::logistic(z);
                }
                T* out = at<T>(a.y, (r.b * a.times + t + q) * a.channels + r.c0);
                S::store(out, r.live[q] ? y : V{}, r.count);
            }
        }
    }
    r.transpose_back(at<T>(a.final, (r.b * a.channels + r.first) * r.n), r.state);
}

// A few steps: the states of a channel side by side, as they stand in memory.
template <class T, bool SHARED>
static void forward_few(const SelectiveArgs& a, const Cut<T>& cut, i64 item, Scratch<T>& memory) {
    typedef Simd<T> S;
    typedef typename S::V V;
    constexpr i64 W = S::W;
    Row<T> r(a, cut, item, memory, false);
    T *delta = memory.take(W), *drive = memory.take(W), *decay = memory.take(W);
    for (i64 t = 0; t < a.times; ++t) {
        r.begin_chunk(t);
        r.steps = 1;
        for (i64 tile = 0; tile < r.tiles(); ++tile) {
            r.begin_tile(tile);
            r.read_steps();
            S::store(delta, r.delta[0]);
            S::store(drive, r.drive[0]);
            if (SHARED) S::store(decay, Elementary<T>::exp(r.delta[0] * S::load(r.A + tile * W)));
            alignas(64) V sums[W];
            for (i64 l = r.count; l < W; ++l) sums[l] = V{};
            for (i64 l = 0; l < r.count; ++l) {
                const i64 c = r.c0 + l;
                T* now = at<T>(a.final, (r.b * a.channels + c) * r.n);
                const T* before = t ? now : a.initial ? at<T>(a.initial, r.b * a.initial_b + c * r.n) : nullptr;
                const T* A = at<T>(a.A, r.b * a.A_b + r.head[l] * a.decays);
                V sum = V{};
                for (i64 k = 0; k < r.n; k += W) {
                    const i64 rest = r.n - k;
                    const V h = before && !r.fresh[0] ? S::load(before + k, rest) : V{};
                    const V decays = SHARED ? S::all(decay[l]) : Elementary<T>::exp(S::load(A + k, rest) * delta[l]);
                    const V next = decays * h + S::load(r.B + k, rest) * drive[l];
                    S::store(now + k, next, rest);
                    sum += next * S::load(r.C + k, rest);
                }
                sums[l] = sum;
            }
            V out = S::totals(sums) + r.direct() * r.input[0];
            if (a.z && r.live[0]) {
                const V z = S::load(r.of_channels(a.z, a.z_b, a.z_t, 0), r.count);
                out *= z * Elementary<T>::logistic(z);
            }
            S::store(at<T>(a.y, (r.b * a.times + t) * a.channels + r.c0), r.live[0] ? out : V{}, r.count);
        }
    }
}

template <class T>
static int selective_forward_of(const SelectiveArgs& a) {
    const Cut<T> cut(a);
    const bool few = a.times > 0 && a.times < 4 && (2 * a.n >= Simd<T>::W || a.channels * 2 < Simd<T>::W);
    const auto row = a.decays == 1 && a.n > 1 ? (few ? forward_few<T, true> : forward_row<T, true>)
                                              : (few ? forward_few<T, false> : forward_row<T, false>);
    auto piece = [&](i64 begin, i64 end) {
        Scratch<T> memory(Row<T>::scratch(a, cut) + 4 * Simd<T>::W);
        if (!memory.data) return false;
        for (i64 item = begin; item < end; ++item) {
            if (item > begin && few) memory.next = memory.data;
            else if (item > begin) memory.clear();
            row(a, cut, item, memory);
        }
        return true;
    };
    return in_parallel(a.parallel_for, cut.count, piece);
}
