// The filter: covariances of a block of times, then the means of every tile of series over that block.

// How the means of one series move, or of eight side by side (`LANES`): of one they are padded to ld, of eight n x 8.
template <int LANES>
struct Motion {
    const Context& c;
    const i64 g, n, ld, size;  // size: doubles of a mean
    System system;
    i64 active[LANES];  // from this time on a series stands still
    const double* b[LANES];
    double* shift;      // b of all lanes

    Motion(const Context& context, i64 group, i64 tile, Arena& arena)
        : c(context), g(group), n(c.n), ld(c.ld), size(LANES == 1 ? c.ld : c.n * LANES), system(context, group, arena) {
        for (int l = 0; l < LANES; ++l) {
            const i64 real = tile * LANES + l, i = real < c.a.series ? real : c.a.series - 1;
            active[l] = c.length(g, real);
            b[l] = c.a.b + g * c.a.b_g + i * c.a.b_i;
        }
        shift = arena.doubles(size);
        if (c.times > 1) read_shift(0);
    }
    void read_shift(i64 at) {
        for (i64 j = 0; j < n; ++j)
            for (int l = 0; l < LANES; ++l) shift[j * LANES + l] = b[l][at + j];
    }
    bool all_active(i64 t) const {
        bool all = true;
        for (int l = 0; l < LANES; ++l) all = all && t < active[l];
        return all;
    }
    // x (rows x LANES) of a series that stands still is that of `before`, or zero.
    void keep_still(i64 t, double* x, const double* before, i64 rows) const {
        for (int l = 0; l < LANES; ++l)
            if (t >= active[l])
                for (i64 j = 0; j < rows; ++j) x[j * LANES + l] = before ? before[j * LANES + l] : 0;
    }
    // predicted = F mean + b into time t, or mean
    void predict(i64 t, const double* mean, double* predicted) {
        if (!c.moves(g, t)) {
            copy(predicted, mean, size);
            return;
        }
        if (c.a.b_t) read_shift((t - 1) * c.a.b_t);
        copy(predicted, shift, size);
        if (LANES == 1) {
            system.move(t, false);
            product<true>(predicted, mean, 0, 1, system.FT, 1, n, ld);
        } else {
            columns<(LANES == 1 ? 4 : LANES), true>(predicted, LANES, system.dense_F(t), n, 1, mean, LANES, n, n);
        }
        if (!all_active(t)) keep_still(t, predicted, mean, n);
    }
    // mean = predicted + E' e
    void update(const double* record, const double* predicted, const double* e, double* mean) const {
        const i64 q = (i64)record[c.at_rows];
        const double* E = record + c.at_E;
        copy(mean, predicted, size);
        if (q == 0) return;
        if (LANES == 1) product<true>(mean, e, 0, 1, E, 1, q, ld);
        else columns<(LANES == 1 ? 4 : LANES), true>(mean, LANES, E, 1, ld, e, LANES, n, q);
    }
};

// The filter of the means of a tile.
template <int LANES>
struct Means {
    const Context& c;
    const i64 g, n, p, ld;
    Motion<LANES> motion;
    double *mean, *predicted, *v, *e;
    const double* y[LANES];
    const double* d[LANES];
    double* out[3][LANES];  // log-likelihood, filtered mean, predicted mean

    Means(const Context& context, i64 group, i64 tile, Arena& arena)
        : c(context), g(group), n(c.n), p(c.p), ld(c.ld), motion(context, group, tile, arena) {
        const KalmanArgs& a = c.a;
        mean = arena.doubles(motion.size); predicted = arena.doubles(motion.size);
        v = arena.doubles(p * LANES); e = arena.doubles(p * LANES);
        double* results[3] = {a.log_likelihood, a.filtered_mean, a.predicted_mean};
        for (int l = 0; l < LANES; ++l) {
            const i64 real = tile * LANES + l, i = real < a.series ? real : a.series - 1;
            y[l] = a.y + g * a.y_g + i * a.y_i;
            d[l] = a.d + g * a.d_g + i * a.d_i;
            for (int r = 0; r < 3; ++r)
                out[r][l] = results[r] && real < a.series ? results[r] + (g * a.series + i) * c.times * (r ? n : 1) : nullptr;
            const double* m = a.m + g * a.m_g + i * a.m_i;
            for (i64 j = 0; j < n; ++j) mean[j * LANES + l] = m[j];
        }
    }
    void write(int which, i64 t, const double* x) {
        for (int l = 0; l < LANES; ++l)
            if (out[which][l])
                for (i64 j = 0; j < n; ++j) out[which][l][t * n + j] = x[j * LANES + l];
    }
    void step(i64 t, const double* record, double* of_tile) {
        motion.predict(t, mean, predicted);
        if (out[2][0]) write(2, t, predicted);
        const i64 q = (i64)record[c.at_rows];
        double value[LANES];
        for (int l = 0; l < LANES; ++l) value[l] = 0;
        if (q > 0) {
            motion.system.observe(t, false);
            innovate(t, q);
            const bool all = motion.all_active(t);
            if (!all) motion.keep_still(t, v, nullptr, q);
            const double* W = record + c.at_W;
            for (i64 r = 0; r < q; ++r) {
                double sum[LANES];
                for (int l = 0; l < LANES; ++l) sum[l] = 0;
                for (i64 k = 0; k <= r; ++k)
                    for (int l = 0; l < LANES; ++l) sum[l] += W[r * p + k] * v[k * LANES + l];
                for (int l = 0; l < LANES; ++l) {
                    value[l] += sum[l] * sum[l];
                    e[r * LANES + l] = sum[l];
                }
            }
            const double constant = record[c.at_constant];
            for (int l = 0; l < LANES; ++l) value[l] = constant - 0.5 * value[l];
            if (!all) motion.keep_still(t, value, nullptr, 1);
        }
        motion.update(record, predicted, e, mean);
        if (out[0][0])
            for (int l = 0; l < LANES; ++l)
                if (out[0][l]) out[0][l][t] = value[l];
        if (out[1][0]) write(1, t, mean);
        if (!of_tile) return;
        if (t % c.kept_every == 0) copy(c.kept_mean(of_tile, t), predicted, n * LANES);
        double* kept = c.innovation(of_tile, t);  // of rows that are not seen: zero
        for (i64 j = 0; j < p * LANES; ++j) kept[j] = j < q * LANES ? e[j] : 0;
    }
    // v = y - d - H m-
    void innovate(i64 t, i64 q) {
        const KalmanArgs& a = c.a;
        const System& system = motion.system;
        const i64 s = c.seen_at[(size_t)t];
        if (LANES == 1) {
            for (i64 r = 0; r < q; ++r) {
                const i64 row = system.rows[r];
                v[r] = y[0][s * a.y_t + row] - d[0][s * a.d_t + row] - dot(system.H + r * ld, predicted, ld);
            }
        } else {
            columns<(LANES == 1 ? 4 : LANES), false>(v, LANES, system.H, ld, 1, predicted, LANES, q, n);
            for (i64 r = 0; r < q; ++r) {
                const i64 row = system.rows[r];
                for (int l = 0; l < LANES; ++l)
                    v[r * LANES + l] = y[l][s * a.y_t + row] - d[l][s * a.d_t + row] - v[r * LANES + l];
            }
        }
    }
};

struct Forward {
    const Context& c;
    const i64 g;
    Arena arena;
    Covariances covariances;
    double *tape, *ring, *steady, *scale;
    i64 settled, regular;
    double last_distance = -1;

    Forward(const Context& context, i64 group)
        : c(context), g(group), covariances(context, group, arena), tape(c.a.tape), settled(c.times),
          regular(c.regular_from(group)) {
        ring = tape ? nullptr : arena.doubles((BLOCK + 1) * c.record);
        steady = arena.doubles(c.record);
        scale = arena.doubles(c.n);
    }
    double* record(i64 t) const {
        if (tape) return c.records(tape, g) + (t < settled ? t : settled) * c.record;
        return t >= settled ? steady : ring + t % (BLOCK + 1) * c.record;
    }
    // Has the recursion come to its fixed point at time t? Looked at every fourth time.
    void look(i64 t) {
        if (t % 4 || t < regular + 5 || t + 1 >= c.times) return;
        const double now = distance(record(t), record(t - 1), scale, c.n, c.ld), four = now / last_distance;
        const bool close = last_distance >= 0 && (now == 0 || (four < 1 && 4 * now / (1 - four) <= SETTLED));
        last_distance = now;
        if (!close) return;
        if (!tape) std::memcpy(steady, record(t), sizeof(double) * (size_t)c.record);
        settled = t;
    }
    // `given`: the law is still the initial one, whose root is the caller's.
    // `root`: that of the law, where it is known better than its covariance tells.
    void write_root(double* out, i64 t, const double* P, bool given, const double* root) {
        if (!out) return;
        const i64 n = c.n;
        out += (g * c.times + t) * n * n;
        if (given) std::memcpy(out, c.a.L + g * c.a.L_g, sizeof(double) * (size_t)(n * n));
        else if (t > settled + 1) std::memcpy(out, out - n * n, sizeof(double) * (size_t)(n * n));
        else if (root && t < settled) std::memcpy(out, root, sizeof(double) * (size_t)(n * n));
        else semidefinite_root(out, n, P, n, c.ld);
    }
    bool run(i64* failed_at, void* threads) {
        if (c.lanes == 1) return times<1>(failed_at, threads);
        return times<8>(failed_at, threads);
    }
    template <int LANES>
    bool times(i64* failed_at, void* threads) {
        typedef Means<LANES> Tile;
        std::vector<std::unique_ptr<Tile>> tiles;
        for (i64 i = 0; i < c.tiles; ++i) tiles.emplace_back(new Tile(c, g, i, arena));
        bool given = true;
        for (i64 start = 0; start < c.times; start += BLOCK) {
            const i64 stop = start + BLOCK < c.times ? start + BLOCK : c.times;
            for (i64 t = start; t < stop; ++t) {
                if (t < settled) {
                    if (!covariances.step(t, t ? record(t - 1) : nullptr, record(t))) { *failed_at = t; return false; }
                    if (covariances.redone) write_root(c.a.filtered_root, t - 1, record(t - 1) + c.at_P, false, nullptr);
                    look(t);
                }
                given = given && !c.moves(g, t);
                write_root(c.a.predicted_root, t, record(t), given, covariances.rooted_ahead ? covariances.ahead : nullptr);
                given = given && record(t)[c.at_rows] == 0;
                write_root(c.a.filtered_root, t, covariances.P, given, covariances.rooted ? covariances.root : nullptr);
            }
            auto work = [&](i64 begin, i64 end) {
                for (i64 i = begin; i < end; ++i)
                    for (i64 t = start; t < stop; ++t)
                        tiles[(size_t)i]->step(t, record(t), tape ? c.of_tile(tape, g, i) : nullptr);
            };
            parallel(c.n * c.n * (stop - start) > 2048 ? threads : nullptr, c.tiles, 2, work);
        }
        if (tape) *c.settled(tape, g) = (double)settled;
        return true;
    }
};

static int forward_all(const Context& c) {
    const KalmanArgs& a = c.a;
    std::vector<i64> failed((size_t)a.groups, -1);
    std::vector<char> no_memory((size_t)a.groups, 0);
    auto work = [&](i64 begin, i64 end) {
        for (i64 g = begin; g < end; ++g) {
            try {
                Forward filter(c, g);
                filter.run(&failed[(size_t)g], a.groups == 1 ? a.parallel_for : nullptr);
            } catch (const std::bad_alloc&) { no_memory[(size_t)g] = 1; }
        }
    };
    parallel(a.groups > 1 ? a.parallel_for : nullptr, a.groups, 4, work);
    for (i64 g = 0; g < a.groups; ++g) {
        if (no_memory[(size_t)g]) return KALMAN_NO_MEMORY;
        if (failed[(size_t)g] >= 0) { a.failed[0] = g; a.failed[1] = failed[(size_t)g]; return KALMAN_SINGULAR; }
    }
    return KALMAN_OK;
}
