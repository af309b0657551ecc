// A step or a few: W channels a tile, of as many rows of the batch as it takes; the states of a channel lie side by
// side, as they stand in memory.

// Where the lanes of a tile are: channels of the whole batch, one after the other.
template <class T> struct Lanes {
    typedef Simd<T> S;
    typedef typename S::V V;
    static constexpr i64 W = S::W;
    i64 from, count, channels, row[W], channel[W];
    Lanes(const SelectiveArgs& a, i64 tile) : from(tile * W), channels(a.channels) {
        const i64 rest = a.batch * channels - from;
        count = rest < W ? rest : W;
        i64 b = from / channels, c = from - b * channels;
        for (i64 l = 0; l < count; ++l) {
            row[l] = b; channel[l] = c;
            if (++c == channels) { c = 0; ++b; }
        }
    }
    bool one_row() const { return row[0] == row[count - 1]; }
    // p (batch, channels / share)
    V load(const T* p, i64 stride, i64 share) const {
        if (share == 1 && (stride == channels || one_row())) return S::load(p + row[0] * stride + channel[0], count);
        i64 at[W];
        for (i64 l = 0; l < count; ++l) at[l] = row[l] * stride + (share == 1 ? channel[l] : channel[l] / share);
        return S::gather(p, at, count);
    }
    // p (batch)
    V load_rows(const T* p, i64 stride) const {
        if (stride == 0 || one_row()) return S::all(p[row[0] * stride]);
        i64 at[W];
        for (i64 l = 0; l < count; ++l) at[l] = row[l] * stride;
        return S::gather(p, at, count);
    }
};

// What heads share over the batch, for each channel, and again for the first W: any tile reads it in one go.
template <class T> struct Repeated {
    const T* p;
    i64 stride, share;
    T* table = nullptr;
    Repeated(const void* given, i64 stride_b, const SelectiveArgs& a, Scratch<T>& memory)
        : p((const T*)given), stride(stride_b), share(a.channels / a.heads) {
        if (!p || stride) return;
        table = memory.take(a.channels + Simd<T>::W);
        for (i64 c = 0; c < a.channels; ++c) table[c] = p[c / share];
        for (i64 c = 0; c < Simd<T>::W; ++c) table[a.channels + c] = table[c];
    }
    typename Simd<T>::V operator()(const Lanes<T>& lanes) const {
        if (!p) return typename Simd<T>::V{};
        return table ? Simd<T>::load(table + lanes.channel[0]) : lanes.load(p, stride, share);
    }
};

// What is one for all of the batch; made once for each thread.
template <class T> struct Common {
    const Repeated<T> bias, direct, rate;
    Common(const SelectiveArgs& a, bool shared, Scratch<T>& memory)
        : bias(a.bias, a.bias_b, a, memory), direct(a.D, a.D_b, a, memory),
          rate(shared ? a.A : nullptr, a.A_b, a, memory) {}
    static i64 scratch(const SelectiveArgs& a) { return 3 * (a.channels + Simd<T>::W); }
};

// A step of a tile: what precedes the states, the states, what follows them. Each is a chain of operations that wait
// for one another, and the same part of several tiles runs in that time.
template <class T, int RULE> struct Step {
    typedef Simd<T> S;
    typedef Rule<T, RULE> R;
    typedef typename S::V V;
    static constexpr i64 W = S::W;
    const SelectiveArgs& a;
    const Common<T>& common;
    const Lanes<T> lanes;
    const i64 share, of_group;
    V input;
    alignas(64) V sums[W];
    alignas(64) T delta[W], drive[W], decay[W];
    i64 dead;  // bits of the lanes that are skipped

    Step(const SelectiveArgs& args, const Common<T>& c, i64 tile)
        : a(args), common(c), lanes(args, tile), share(args.channels / args.heads),
          of_group(args.channels / args.groups) {}
    void begin(i64 t) {
        V x = lanes.load(at<T>(a.dt, t * a.dt_t), a.dt_b, share) + common.bias(lanes);
        if (a.softplus) x = Elementary<T>::softplus(x, nullptr);
        if (a.gap) x *= lanes.load_rows(at<T>(a.gap, t * a.gap_t), a.gap_b);
        input = lanes.load(at<T>(a.u, t * a.u_t), a.u_b, 1);
        S::store(delta, x * R::unit);
        S::store(drive, x * input);
        if (RULE == SHARED) S::store(decay, R::decay(x * R::unit * common.rate(lanes), nullptr));
    }
    void states(i64 t) {
        const i64 n = a.n;
        for (i64 l = lanes.count; l < W; ++l) sums[l] = V{};
        dead = 0;
        for (i64 l = 0, end; l < lanes.count; l = end) {  // lanes of one row and one group
            const i64 b = lanes.row[l], c = lanes.channel[l], group = c / of_group, left = (group + 1) * of_group - c;
            end = left < lanes.count - l ? l + left : lanes.count;
            T* now = at<T>(a.final, (lanes.from + l) * n);
            const T* before = t ? now : a.initial ? at<T>(a.initial, b * a.initial_b + c * n) : nullptr;
            if (a.reset && a.reset[b * a.reset_b + t]) before = nullptr;
            if (a.mask && !a.mask[b * a.mask_b + t]) {
                const size_t size = (size_t)((end - l) * n) * sizeof(T);
                if (!before) std::memset((void*)now, 0, size);
                else if (before != now) std::memcpy((void*)now, (const void*)before, size);
                for (i64 i = l; i < end; ++i) { sums[i] = V{}; dead |= (i64)1 << i; }
                continue;
            }
            const T* B = at<T>(a.B, b * a.B_b + t * a.B_t + group * n);
            const T* C = at<T>(a.C, b * a.C_b + t * a.C_t + group * n);
            const T* rates = at<T>(a.A, b * a.A_b);
            const V first_B = S::load(B, n), first_C = S::load(C, n);
            for (i64 i = l; i < end; ++i, now += n, before += before ? n : 0) {
                const T* A = rates + (share == 1 ? c + i - l : (c + i - l) / share) * a.decays;
                const V step = S::all(delta[i]), in = S::all(drive[i]);
                const V shared = S::all(RULE == SHARED ? decay[i] : T(0));
                V sum = V{};
                auto advance = [&](i64 k, V in_map, V out_map, i64 count) {
                    const V h = before ? S::load(before + k, count) : V{}, v = in_map * in;
                    V w, f = shared;
                    if (RULE != SHARED) f = R::decay(S::load(A + k, count) * step, &w);
                    const V after = f * h + (R::weighted ? v * w : v);
                    S::store(now + k, after, count);
                    sum += after * out_map;
                };
                if (n >= W) advance(0, first_B, first_C, W);
                else advance(0, first_B, first_C, n);
                i64 k = W;
                for (; k + W <= n; k += W) advance(k, S::load(B + k), S::load(C + k), W);
                if (k < n) advance(k, S::load(B + k, n - k), S::load(C + k, n - k), n - k);
                sums[i] = sum;
            }
        }
    }
    void end(i64 t) {
        V out = S::totals(sums) + common.direct(lanes) * input;
        if (a.z) {
            const V z = lanes.load(at<T>(a.z, t * a.z_t), a.z_b, 1);
            out *= z * Elementary<T>::logistic(z);
        }
        T* y = at<T>(a.y, t * a.channels);
        if (!dead && (a.times == 1 || lanes.one_row())) {
            S::store(y + lanes.row[0] * a.times * a.channels + lanes.channel[0], out, lanes.count);
            return;
        }
        alignas(64) T found[W];
        S::store(found, out);
        for (i64 l = 0; l < lanes.count; ++l)
            y[lanes.row[l] * a.times * a.channels + lanes.channel[l]] = dead >> l & 1 ? T(0) : found[l];
    }
};

template <class T, int RULE> static int few_steps(const SelectiveArgs& a) {
    constexpr i64 W = Simd<T>::W, TOGETHER = 4;
    const i64 tiles = (a.batch * a.channels + W - 1) / W;
    auto piece = [&](i64 begin, i64 end) {
        Scratch<T> memory(Common<T>::scratch(a));
        if (!memory.data) return false;
        const Common<T> common(a, RULE == SHARED, memory);
        for (i64 i = begin; i < end; ++i) {
            i64 tile = i * TOGETHER;
            auto take = [&](auto&... step) {
                for (i64 t = 0; t < a.times; ++t) {
                    (step.begin(t), ...);
                    (step.states(t), ...);
                    (step.end(t), ...);
                }
            };
            if (tile + TOGETHER <= tiles) {
                Step<T, RULE> p(a, common, tile), q(a, common, tile + 1);
                Step<T, RULE> r(a, common, tile + 2), s(a, common, tile + 3);
                take(p, q, r, s);
                continue;
            }
            for (; tile < tiles; ++tile) {
                Step<T, RULE> p(a, common, tile);
                take(p);
            }
        }
        return true;
    };
    return in_parallel(a.parallel_for, (tiles + TOGETHER - 1) / TOGETHER, piece);
}
