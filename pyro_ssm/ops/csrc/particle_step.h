// One step of a filter whose particles move by a normal law with independent coordinates: weigh the cloud of step k,
// resample the series whose effective sample size is low, move to step k + 1 (particle_move.h). The sequence of
// pyro_ssm/infer/smc/stepper.py, on memory that the caller owns.
//
// Between steps a log-weight is log W = (l - top) - log_sum with two numbers a series: the next step subtracts them as it
// adds its potential, in one pass in which the largest is found as it goes; weights are made where they are resampled.
// `fresh` says that all of them are -log n, where every series was resampled: then nobody has written them.

// fn(l) for each lane l of series s.
template <class Fn> static inline void lanes_of(i64 s, i64 lanes, i64 series, Fn fn) {
    for (i64 l = s; l < lanes; l += series) fn(l);
}

// Numbers per series, spread over lanes.
template <class T> static inline void spread(const T* x, i64 lanes, i64 series, T* out) {
    for (i64 s = 0; s < series; ++s) lanes_of(s, lanes, series, [&](i64 l) { out[l] = x[s]; });
}

template <class T> static inline T log_equal(const ParticleStep<T>& job) { return (T)-std::log((double)job.n); }

// A tile of rows of LANES or fewer neighbours (normalise.h): l = (l - top) - log_sum + potential where `active` says so, with
// sums of e^(l - reference) and their squares in each lane; the reference is the largest yet, one for a series.
template <class T> class Weighing {
    T top[LANES], log_sum[LANES], reference[LANES], largest[LANES];
    double sums[LANES] = {}, squares[LANES] = {};
    int32_t active[LANES];
    i64 lanes, series;
    bool all, fresh;
    T equal;

  public:
    Weighing(const ParticleStep<T>& job, i64 s, const uint8_t* is_active, i64 num_lanes, i64 num_series)
        : lanes(num_lanes), series(num_series), all(!is_active), fresh(job.fresh), equal(log_equal(job)) {
        const T *tops = job.pending + s, *log_sums = tops + job.series;
        spread(tops, lanes, series, top);
        spread(log_sums, lanes, series, log_sum);
        for (i64 s = 0; s < series; ++s)
            lanes_of(s, lanes, series, [&](i64 l) { active[l] = !is_active || is_active[s]; });
        for (int l = 0; l < LANES; ++l) largest[l] = -(T)INFINITY, reference[l] = 0;
    }
    void tile(T* l_w, const T* potential, i64 rows, i64 stride, i64 tail) {
        add(l_w, potential, rows, stride, tail);
        for (i64 s = 0; s < series; ++s) raise(s);
        sum_up(l_w, rows, stride, tail);
    }

  private:
    // Copies of arrays: what stands in this object might be what a pointer points to, for all that a compiler knows.
    void add(T* l_w, const T* potential, i64 rows, i64 stride, i64 tail) {
        T t[LANES], c[LANES], most[LANES];
        int32_t on[LANES];
        std::memcpy(t, top, sizeof t), std::memcpy(c, log_sum, sizeof c), std::memcpy(most, largest, sizeof most);
        std::memcpy(on, active, sizeof on);
        const bool every = all, unwritten = fresh;
        const T equal_weight = equal;
        rows_of(rows, lanes, stride, tail, [&](i64, i64 at, int num) {
            T* x = l_w + at;
            const T* p = potential + at;
            T found[LANES];
            if (unwritten)
                for (int l = 0; l < num; ++l) found[l] = on[l] ? equal_weight + p[l] : equal_weight;
            else if (every)
                for (int l = 0; l < num; ++l) found[l] = (x[l] - t[l]) - c[l] + p[l];
            else
                for (int l = 0; l < num; ++l) found[l] = on[l] ? (x[l] - t[l]) - c[l] + p[l] : x[l];
            for (int l = 0; l < num; ++l) most[l] = found[l] > most[l] ? found[l] : most[l];  // a NaN shows in the sum
            for (int l = 0; l < num; ++l) x[l] = found[l];
        });
        std::memcpy(largest, most, sizeof most);
    }
    void sum_up(const T* l_w, i64 rows, i64 stride, i64 tail) {
        T from[LANES], sum[LANES] = {}, square[LANES] = {};
        std::memcpy(from, reference, sizeof from);
        rows_of(rows, lanes, stride, tail, [&](i64, i64 at, int num) {
            const T* x = l_w + at;
            for (int l = 0; l < num; ++l) {
                const T e = exponential(x[l] - from[l]);
                sum[l] += e;
                square[l] += e * e;
            }
        });
        for (i64 l = 0; l < lanes; ++l) sums[l] += sum[l], squares[l] += square[l];
    }
    void raise(i64 s) {
        T most = largest[s];
        lanes_of(s, lanes, series, [&](i64 l) { most = largest[l] > most ? largest[l] : most; });
        const T now = std::fabs(most) < INFINITY ? most : 0;  // e^-inf = 0 then, and e^inf = inf
        if (now == reference[s]) return;
        const double ratio = std::exp((double)reference[s] - (double)now);
        lanes_of(s, lanes, series, [&](i64 l) {
            if (sums[l] > 0) sums[l] *= ratio, squares[l] *= ratio * ratio;
            reference[l] = now;
        });
    }

  public:
    void results(const uint8_t* is_active, T* tops, T* log_sums, T* total, T* ess) {
        for (i64 s = 0; s < series; ++s) {
            double one = 0, two = 0;
            lanes_of(s, lanes, series, [&](i64 l) { one += sums[l], two += squares[l]; });
            ess[s] = (T)(one * (one / two));
            total[s] = is_active && !is_active[s] ? 0 : (T)((double)reference[s] + std::log(one));
            if (!is_active || is_active[s]) tops[s] = reference[s], log_sums[s] = (T)std::log(one);
        }
    }
};

// out = fn(l - top, log_sum) of all log-weights.
template <class T, class Fn> static void each_weight(const ParticleStep<T>& job, T* out, Fn fn) {
    const T *tops = job.pending, *log_sums = job.pending + job.series, *l_w = job.log_weights;
    T top[LANES], log_sum[LANES];
    const bool few = job.series <= LANES;
    for (i64 s = 0; s < job.series; s += LANES) {
        const i64 left = job.series - s, series = few ? left : left < LANES ? left : LANES, k = few ? LANES / series : 1;
        const i64 lanes = job.n < k ? series * job.n : series * k;
        spread(tops + s, lanes, series, top);
        spread(log_sums + s, lanes, series, log_sum);
        rows_of(job.n / k, lanes, job.series * k, job.series * (job.n % k), [&](i64, i64 at, int num) {
            for (int l = 0; l < num; ++l) out[s + at + l] = fn(l_w[s + at + l] - top[l], log_sum[l]);
        });
    }
}

template <class T> static void weigh(ParticleStep<T>& job) {
    const i64 n = job.n, series = job.series, dim = job.obs_dim;
    T *tops = job.pending, *log_sums = job.pending + series;
    T *total = job.total + job.k * series, *ess = job.ess + job.k * series;
    const bool few = series <= LANES, density = job.density_scale;
    const auto densities = [&](i64 from, i64 num, T* out) {  // of particles from `from` on
        const i64 at = from * series * dim;
        normal_density(job.value + at * job.value_whole, job.value_whole, job.density_loc + at * job.loc_whole,
                       job.loc_whole, job.density_scale + at * job.scale_whole, job.scale_whole, num, series * dim, dim, out);
    };
    if (!few) {
        if (density) densities(0, n, job.densities);
        const T* potential = density ? job.densities : job.potential;
        for (i64 s = 0; s < series; s += LANES) {
            const i64 lanes = series - s < LANES ? series - s : LANES;
            const uint8_t* active = job.active ? job.active + s : nullptr;
            Weighing<T> weighing(job, s, active, lanes, lanes);
            for (i64 r = 0; r < n; r += ROWS)
                weighing.tile(job.log_weights + r * series + s, potential + r * series + s, n - r < ROWS ? n - r : ROWS,
                              series, 0);
            weighing.results(active, tops + s, log_sums + s, total + s, ess + s);
        }
        return;
    }
    const i64 k = LANES / series, lanes = n < k ? series * n : series * k, tile = ROWS * k;
    Weighing<T> weighing(job, 0, job.active, lanes, series);
    for (i64 i = 0; i < n; i += tile) {
        const i64 num = n - i < tile ? n - i : tile;
        if (density) densities(i, num, job.densities);
        weighing.tile(job.log_weights + i * series, density ? job.densities : job.potential + i * series, num / k, series * k,
                      series * (num % k));
    }
    weighing.results(job.active, tops, log_sums, total, ess);
}

// A step without observation: only the effective sample size.
template <class T> static void measure(ParticleStep<T>& job) {
    const i64 n = job.n, series = job.series;
    if (job.fresh) std::fill(job.log_weights, job.log_weights + n * series, log_equal(job));
    each_weight(job, job.weights, [](T x, T) { return exponential(x); });
    for (i64 s = 0; s < series; ++s) {
        double one = 0, two = 0;
        for (i64 i = 0; i < n; ++i) {
            const double w = (double)job.weights[i * series + s];
            one += w, two += w * w;
        }
        job.total[job.k * series + s] = 0;
        job.ess[job.k * series + s] = (T)(one * (one / two));
    }
}

// The series to resample before step k + 1; whether there is one, and whether it is all of them.
template <class T> static std::pair<bool, bool> choose_series(const ParticleStep<T>& job, uint8_t* need) {
    bool any = false, every = true;
    for (i64 s = 0; s < job.series; ++s) {
        const bool uneven = job.always || (double)job.ess[job.k * job.series + s] < job.least_ess;
        need[s] = uneven && (!job.alive || job.alive[s]);
        any = any || need[s], every = every && need[s];
    }
    return {any, every};
}

// Resamples and moves. Where a particle is one number and nobody asks for the ancestors, that number goes to the offspring
// at once; otherwise the move reads it by the ancestors. The weights of those who were resampled are equal then.
template <class T> static void resample_and_move(ParticleStep<T>& job, const uint8_t* need, bool every) {
    const i64 n = job.n, series = job.series;
    each_weight(job, job.weights, [](T x, T) { return exponential(x); });
    const double* u = uniforms_of(job);
    if (job.dim == 1 && !job.each_scale && !job.kept_ancestors) {
        ParticleStep<T> copies = job;
        const T*& from = job.mean ? copies.mean : copies.state;
        const auto value = [x = from, series](i64 i, i64 s) { return x[i * series + s]; };
        chosen_by(job.resampling, job.weights, u, need, n, series, job.densities, value);
        from = job.densities;
        move(copies, false);
    } else {
        chosen_by(job.resampling, job.weights, u, need, n, series, job.ancestors, [](i64 i, i64) { return (int32_t)i; });
        if (job.kept_ancestors) std::copy(job.ancestors, job.ancestors + n * series, job.kept_ancestors);
        move(job, true);
    }
    job.fresh = every;
    const T equal = log_equal(job);
    for (i64 i = 0; i < n && !every; ++i)
        for (i64 s = 0; s < series; ++s) {
            T* l = job.log_weights + i * series + s;
            *l = need[s] ? equal : *l;
        }
    for (i64 s = 0; s < series; ++s)
        if (need[s]) job.pending[s] = job.pending[series + s] = 0;
}

template <class T> static void step(ParticleStep<T>& job) {
    if (job.potential || job.density_scale)
        weigh(job);
    else
        measure(job);
    job.fresh = 0;
    T* kept = job.moved ? job.kept_log_weights : job.log_weights;
    if (kept) each_weight(job, kept, [](T x, T log_sum) { return x - log_sum; });
    if (job.moved) {
        uint8_t* need = job.resampled + (job.k + 1) * job.series;
        const auto [any, every] = choose_series(job, need);
        if (any)
            resample_and_move(job, need, every);
        else
            move(job, false);
    }
    ++job.k;
}
template <class T> static int particle_step(ParticleStep<T>* job) {
    try {
        step(*job);
    } catch (const std::bad_alloc&) { return 1; }
    return 0;
}
