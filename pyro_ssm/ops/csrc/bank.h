// What the banks share (Args: BankArgs, LowRankArgs, GapArgs). Lanes are pairs (row, channel). A block of them, over all steps, is one task; its states stay in the first cache.

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

template <class T, class Args> struct Bank {
    enum { BLOCK = BANK_BYTES / (int)sizeof(T), N = Full<T>::value, NV = BLOCK / N, STEPS = Args::STEPS };
    typedef typename Register<T, N>::type V;
    typedef Planes<V, 2> Z;

    const Args& args;
    i64 lanes, blocks, segments;
    mutable bool failed = false;  // no memory: an exception must not pass through the threads of others
    explicit Bank(const Args& a) : args(a) {
        lanes = a.batch * a.channels;
        blocks = (lanes + BLOCK - 1) / BLOCK;
        segments = (a.times + STEPS - 1) / STEPS;
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
    // The steps of a segment.
    i64 count(i64 segment) const { return args.times - segment * STEPS < STEPS ? args.times - segment * STEPS : (i64)STEPS; }
    // Complex coefficients of all states (`ranks` times) as [state][re, im][lane]; zero where there is no lane.
    void gather(const void* from, i64 of_row, const Block& x, T* to, i64 ranks = 1) const {
        const i64 each = ranks * args.n * 2;
        std::memset(to, 0, sizeof(T) * (size_t)(each * BLOCK));
        if (!from) return;
        for (i64 l = 0; l < x.count; ++l) {
            const T* z = (const T*)from + x.lane[l].row * of_row + x.lane[l].channel * each;
            for (i64 k = 0; k < each; ++k) to[k * BLOCK + l] = z[k];
        }
    }
    void scatter(void* to, const Block& x, const T* from, i64 ranks = 1) const {
        const i64 each = ranks * args.n * 2;
        if (!to) return;
        for (i64 l = 0; l < x.count; ++l)
            for (i64 k = 0; k < each; ++k) ((T*)to)[(x.first + l) * each + k] = from[k * BLOCK + l];
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

};

template <class T, class Args> static int bank_tasks(const Args& a, void (*one)(const Bank<T, Args>&, i64)) {
    const Bank<T, Args> bank(a);
    auto some = [&](i64 begin, i64 end) {
        for (i64 i = begin; i < end; ++i) one(bank, i);
    };
    const i64 work = a.times * a.n + 1;
    parallel(a.parallel_for, bank.blocks, work > 4096 ? 1 : 4096 / work, some);
    return bank.failed ? SCAN_NO_MEMORY : SCAN_OK;
}
