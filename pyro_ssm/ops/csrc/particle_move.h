// The move of particles by a normal law with independent coordinates, from the ancestors that were chosen:
// out = m + s e, where m = A x + b or a mean that was given for each particle, and e is given or drawn here.

// Numbers moved at a time: what is drawn for them stays in the cache.
constexpr i64 MOVE_TILE = 4096;

// The column of each series of which `chosen` is 0, from one array of rows of series * width numbers to another.
template <class T>
static void keep_others(const uint8_t* chosen, const T* from, i64 n, i64 series, i64 width, T* to) {
    for (i64 s = 0; s < series; ++s)
        if (!chosen[s])
            for (i64 i = 0; i < n; ++i)
                for (i64 c = 0; c < width; ++c) to[(i * series + s) * width + c] = from[(i * series + s) * width + c];
}

// Particles [begin, end): loc(p, v, r) and scale(p, v, r) are of coordinate r of the particle that stands at p, of series v.
template <bool chosen, class T, class Loc, class Scale>
static void move_each(const ParticleStep<T>& job, i64 begin, i64 end, const T* e, Loc loc, Scale scale) {
    const i64 series = job.series, dim = job.dim;
    const int32_t* from = job.ancestors;
    T* out = job.moved + begin * series * dim;
    if (series * dim == 1) {
        for (i64 i = begin; i < end; ++i) {
            const i64 p = chosen ? from[i] : i;
            out[i - begin] = loc(p, 0, 0) + scale(p, 0, 0) * e[i - begin];
        }
        return;
    }
    for (i64 i = begin; i < end; ++i, e += series * dim, out += series * dim) {
        const int32_t* row = from + i * series;
        if (dim == 1) {
            for (i64 v = 0; v < series; ++v) {
                const i64 p = (chosen ? row[v] : i) * series + v;
                out[v] = loc(p, v, 0) + scale(p, v, 0) * e[v];
            }
            continue;
        }
        for (i64 v = 0; v < series; ++v) {
            const i64 p = (chosen ? row[v] : i) * series + v;
            for (i64 r = 0; r < dim; ++r) out[v * dim + r] = loc(p, v, r) + scale(p, v, r) * e[v * dim + r];
        }
    }
}

template <bool chosen, class T> static void move_rows(const ParticleStep<T>& job, i64 begin, i64 end, const T* e) {
    const i64 dim = job.dim, own = job.own;
    const T *x = job.state, *A = job.matrix, *b = job.offset, *s = job.scale, *mean = job.mean;
    const auto one_scale = [=](i64, i64 v, i64 r) { return s[own * v * dim + r]; };
    if (mean) {
        const auto loc = [=](i64 p, i64, i64 r) { return mean[p * dim + r]; };
        if (job.each_scale)
            move_each<chosen>(job, begin, end, e, loc, [=](i64 p, i64, i64 r) { return s[p * dim + r]; });
        else
            move_each<chosen>(job, begin, end, e, loc, one_scale);
    } else if (dim == 1 && !own) {
        const T a0 = A[0], b0 = b[0], s0 = s[0];
        move_each<chosen>(job, begin, end, e, [=](i64 p, i64, i64) { return a0 * x[p] + b0; },
                          [=](i64, i64, i64) { return s0; });
    } else {
        const auto loc = [=](i64 p, i64 v, i64 r) {
            const T* a = A + (own * v * dim + r) * dim;
            T sum = b[own * v * dim + r];
            for (i64 c = 0; c < dim; ++c) sum += a[c] * x[p * dim + c];
            return sum;
        };
        move_each<chosen>(job, begin, end, e, loc, one_scale);
    }
}

// Standard normals number `tile` of the step; only float32 ones are drawn here.
static inline void draw(uint64_t seed, i64 tile, i64 count, float* out) { normals(seed, tile, count, out); }
static inline void draw(uint64_t, i64, i64, double*) {}

// Of all particles, on several threads where there are some; from the ancestors if `chosen`. What a series that has ended
// was, it stays: none of its particles was resampled.
template <class T> static void move(const ParticleStep<T>& job, bool chosen) {
    const i64 width = job.series * job.dim, rows = width < MOVE_TILE ? MOVE_TILE / width : 1;
    const i64 tiles = (job.n + rows - 1) / rows;
    auto some = [&](i64 first, i64 last) {
        T small[MOVE_TILE];
        std::unique_ptr<T[]> large(!job.noise && width > MOVE_TILE ? new T[(size_t)width] : nullptr);
        T* drawn = large ? large.get() : small;
        for (i64 t = first; t < last; ++t) {
            const i64 begin = t * rows, end = begin + rows < job.n ? begin + rows : job.n;
            if (!job.noise) draw((uint64_t)job.seed, (job.k + 1) * tiles + t, (end - begin) * width, drawn);
            const T* e = job.noise ? job.noise + begin * width : drawn;
            if (chosen)
                move_rows<true>(job, begin, end, e);
            else
                move_rows<false>(job, begin, end, e);
        }
    };
    parallel(job.parallel_for, tiles, 8, some);
    if (job.alive) keep_others(job.alive, job.state, job.n, job.series, job.dim, job.moved);
}

// Uniforms of step k + 1 (rows, series): those given, or drawn into the memory for them.
template <class T> static const double* uniforms_of(const ParticleStep<T>& job) {
    if (job.uniforms) return job.uniforms;
    const i64 count = (job.resampling == STRATIFIED ? job.n : 1) * job.series;
    for (i64 i = 0; i < count; ++i)
        job.drawn[i] = (double)(mixed((uint64_t)job.uniform_seed, (uint64_t)(job.k * count + i)) >> 11) * 0x1p-53;
    return job.drawn;
}
