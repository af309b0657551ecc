// What the forward and the backward scan share: one row of the batch (and group) in chunks of steps, W channels at a
// time.

constexpr i64 Q = SELECTIVE_CHUNK;

// fn(begin, end) over [0, count) on several threads; 2 (no memory) if one of them returns false.
template <class Fn>
static int in_parallel(void* parallel_for, i64 count, Fn& fn) {
    bool failed = false;
    auto piece = [&](i64 begin, i64 end) { if (!fn(begin, end)) failed = true; };
    parallel(parallel_for, count, 1, piece);
    return failed ? 2 : 0;
}

// Memory for one thread, zeroed, in pieces that begin on a cache line; freed at the end of the scope. `data` is null
// where there is none left.
template <class T> struct Scratch {
    static constexpr i64 line = 64, pieces = 16;
    void* block;
    T *data, *next;
    i64 size;
    explicit Scratch(i64 count) : size(count * (i64)sizeof(T) + pieces * line) {
        block = std::calloc((size_t)(size + line), 1);
        data = block ? (T*)(((uintptr_t)block + line - 1) / line * line) : nullptr;
        next = data;
    }
    Scratch(const Scratch&) = delete;
    ~Scratch() { std::free(block); }
    T* take(i64 count) {
        T* piece = next;
        next = (T*)((char*)next + (count * (i64)sizeof(T) + line - 1) / line * line);
        return piece;
    }
    void clear() { next = data; std::memset((void*)data, 0, (size_t)size); }
};

// How the work is cut: for each row of the batch and group, `parts` ranges of channels. It depends on sizes alone, so
// that sums over channels do not depend on the number of threads.
template <class T> struct Cut {
    static constexpr i64 W = Simd<T>::W;
    i64 channels, share, parts, part, tiles;  // of a group; channels a head; channels and tiles of a part
    i64 count;
    explicit Cut(const SelectiveArgs& a) {
        channels = a.channels / a.groups; share = a.channels / a.heads;
        const i64 unit = share == 1 ? W : share, units = (channels + unit - 1) / unit, rows = a.batch * a.groups;
        const i64 wanted = (8 + rows - 1) / rows;
        part = (units + wanted - 1) / wanted * unit;
        parts = (channels + part - 1) / part;
        tiles = ((part < channels ? part : channels) + W - 1) / W;
        count = rows * parts;
    }
};

template <class T> SIMD_INLINE const T* at(const void* p, i64 offset) { return (const T*)p + offset; }
template <class T> SIMD_INLINE T* at(void* p, i64 offset) { return (T*)p + offset; }

// Asks for the cache line of p, which need not be memory of ours; `writes`: it will be written.
template <bool WRITES = false> SIMD_INLINE void fetch(const void* p) {
#if defined(__GNUC__)
    __builtin_prefetch(p, WRITES);
#else
    (void)p;
#endif
}

// What a tile does in a chunk of steps; 0 where a step is skipped.
template <class T> struct Steps {
    typedef typename Simd<T>::V V;
    alignas(64) V delta[Q], drive[Q], input[Q];  // the step, step times u, u
};

// One row of the batch, one group, one range of channels.
template <class T> struct Row {
    typedef Simd<T> S;
    typedef Elementary<T> E;
    typedef typename S::V V;
    static constexpr i64 W = S::W;
    const SelectiveArgs& a;
    const Cut<T>& cut;
    const T unit;            // of rates
    i64 b, group, part, first, width, share, n;  // channels [first, first + width)
    // of a chunk:
    i64 t0, steps;
    bool live[Q], fresh[Q];  // whether a step counts; whether the state begins at 0
    T *B, *C;                // (Q, n), 0 at steps that are skipped
    T *A, *state;            // unit * A (tiles, decays, W); (tiles, n, W)
    // of a tile:
    i64 c0, count, head[W];

    static i64 scratch(const SelectiveArgs& a, const Cut<T>& cut) {
        return 2 * Q * a.n + cut.tiles * W * (a.decays + a.n);
    }
    Row(const SelectiveArgs& args, const Cut<T>& c, i64 item, Scratch<T>& memory, T unit_of_rates)
        : a(args), cut(c), unit(unit_of_rates) {
        part = item % c.parts; group = item / c.parts % a.groups; b = item / c.parts / a.groups;
        first = group * c.channels + part * c.part;
        const i64 rest = c.channels - part * c.part;
        width = rest < c.part ? rest : c.part;
        share = c.share; n = a.n;
        B = memory.take(Q * n); C = memory.take(Q * n);
        A = memory.take(c.tiles * a.decays * W); state = memory.take(c.tiles * n * W);
        const T* rates = at<T>(a.A, b * a.A_b);
        for (i64 i = 0; i < width; ++i)
            for (i64 k = 0; k < a.decays; ++k)
                A[(i / W * a.decays + k) * W + i % W] = unit * rates[(first + i) / share * a.decays + k];
        if (a.initial) transpose(state, at<T>(a.initial, b * a.initial_b + first * n));
    }
    i64 tiles() const { return (width + W - 1) / W; }
    // (channels, n) to (tiles, n, W), and back
    void transpose(T* out, const T* in) const {
        for (i64 i = 0; i < width; ++i)
            for (i64 k = 0; k < n; ++k) out[(i / W * n + k) * W + i % W] = in[i * n + k];
    }
    void transpose_back(T* out, const T* in) const {
        for (i64 i = 0; i < width; ++i)
            for (i64 k = 0; k < n; ++k) out[i * n + k] = in[(i / W * n + k) * W + i % W];
    }
    void begin_chunk(i64 t) {
        t0 = t;
        steps = a.times - t < Q ? a.times - t : Q;
        for (i64 q = 0; q < steps; ++q) {
            live[q] = !a.mask || a.mask[b * a.mask_b + t0 + q];
            fresh[q] = a.reset && a.reset[b * a.reset_b + t0 + q];
            const T* in = at<T>(a.B, b * a.B_b + (t0 + q) * a.B_t + group * n);
            const T* out = at<T>(a.C, b * a.C_b + (t0 + q) * a.C_t + group * n);
            for (i64 k = 0; k < n; ++k) {
                B[q * n + k] = live[q] ? in[k] : T(0);
                C[q * n + k] = live[q] ? out[k] : T(0);
            }
        }
    }
    void begin_tile(i64 tile) {
        c0 = first + tile * W;
        count = width - tile * W < W ? width - tile * W : W;
        for (i64 l = 0; l < W; ++l) head[l] = share == 1 ? c0 + l : (c0 + (l < count ? l : 0)) / share;
    }
    // A quantity of heads, for the channels of the tile.
    V of_heads(const T* p) const {
        if (share == 1) return S::load(p + c0, count);
        if (head[0] == head[count - 1]) return S::all(p[head[0]]);
        return S::gather(p, head, count);
    }
    V direct() const { return a.D ? of_heads(at<T>(a.D, b * a.D_b)) : V{}; }
    V bias() const { return a.bias ? of_heads(at<T>(a.bias, b * a.bias_b)) : V{}; }
    T gap(i64 q) const { return a.gap ? *at<T>(a.gap, b * a.gap_b + (t0 + q) * a.gap_t) : T(1); }
    const T* of_channels(const void* p, i64 stride_b, i64 stride_t, i64 q) const {
        return at<T>(p, b * stride_b + (t0 + q) * stride_t + c0);
    }
    // Where the tile has a result of steps and channels.
    T* result(void* p, i64 q) const { return at<T>(p, (b * a.times + t0 + q) * a.channels + c0); }
    // Also the steps before the gap, and the slope of softplus, where they are wanted.
    void read_steps(Steps<T>& to, V* soft = nullptr, V* slope = nullptr) const {
        const V beta = bias();
        for (i64 q = 0; q < steps; ++q) {
            if (!live[q]) { to.delta[q] = to.input[q] = to.drive[q] = V{}; continue; }
            V x = of_heads(at<T>(a.dt, b * a.dt_b + (t0 + q) * a.dt_t)) + beta;
            if (a.softplus) x = E::softplus(x, slope ? slope + q : nullptr);
            if (soft) soft[q] = x;
            to.delta[q] = x * gap(q);
            to.input[q] = S::load(of_channels(a.u, a.u_b, a.u_t, q), count);
            to.drive[q] = to.delta[q] * to.input[q];
        }
    }
    // Asks for what the tile reads of the chunk `ahead` steps from this one. (Rows of a tile lie too far
    // from each other for the processor to guess.)
    void fetch_steps(i64 ahead) const {
        const i64 begin = t0 + ahead < 0 ? -t0 : ahead, end = begin + Q;
        for (i64 q = begin; q < end && t0 + q < a.times; ++q) {
            fetch(of_channels(a.u, a.u_b, a.u_t, q));
            if (share == 1) fetch(of_channels(a.dt, a.dt_b, a.dt_t, q));
            if (a.z) fetch(of_channels(a.z, a.z_b, a.z_t, q));
        }
    }
    T* kept(i64 chunk, i64 k) const {  // of chunks 1, 2, ...
        const i64 chunks = (a.times + Q - 1) / Q - 1;
        return at<T>(a.kept, ((b * chunks + chunk - 1) * n + k) * a.channels + c0);
    }
};

// out = the sum of `parts` arrays of `size` that follow each other.
template <class T> static void add_parts(T* out, const T* in, i64 parts, i64 size) {
    for (i64 i = 0; i < size; ++i) out[i] = in[i];
    for (i64 p = 1; p < parts; ++p)
        for (i64 i = 0; i < size; ++i) out[i] += in[p * size + i];
}
