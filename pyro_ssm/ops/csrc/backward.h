// The gradient of the filter, by hand. Two passes back in time:
//
// means, every series:   w = W' (E lambda - g e),  lambda- = lambda - H' w,  lambda' = F' lambda-
// covariances, a group:  Gamma- = Gamma + sym(Z' W H),  Z = C - 2 E Gamma + G W H,  Gamma' = F' Gamma- F
//
// where lambda and Gamma are the gradients with respect to the mean and the covariance of a filtered state (- : of a
// predicted one), g that of log p(y_k | y_<k), e = W v the whitened innovation, and the means hand to the covariances the
// sums over series C = sum e lambda', U = sum g e e' and sum g. W' G W with G = E Gamma E' - sym(E C') + (U - sum g I) / 2
// is the gradient with respect to S. No inverse of Q, R or P is taken.

constexpr i64 AHEAD = 3;  // records that memory is asked for before they are read

// Sums of a group's gradients. Matrices with n columns are padded to ld; one entry a time where they vary over time.
struct Sums {
    double *F, *E, *H, *RR;  // of F, Q Q', H and R R'
    double *C, *U, *weight;  // for each time up to `rest`, where all later times add up
};

struct Layout {
    i64 F, H, E, RR;  // strides over time, 0 = one for all
    i64 moves, sees;  // entries
    i64 rest;         // slot of the times from `rest` on, in C, U, weight; `times` = a slot for each time
    i64 slots;
};

static Layout layout_of(const Context& c, i64 rest) {
    const KalmanArgs& a = c.a;
    Layout l;
    l.moves = c.times > 1 ? c.times - 1 : 0;
    l.sees = a.seen;
    l.F = a.F_t ? c.n * c.ld : 0; l.E = a.Q_t ? c.n * c.ld : 0;
    l.H = a.H_t ? c.p * c.ld : 0; l.RR = a.R_t ? c.p * c.p : 0;
    l.rest = rest;
    l.slots = rest < c.times ? rest + 1 : c.times;
    return l;
}

struct SumSizes { i64 F, E, H, RR, C, U; };
static SumSizes sizes_of(const Context& c, const Layout& l) {
    const i64 nn = c.n * c.ld, pn = c.p * c.ld, pp = c.p * c.p;
    return {l.F ? l.moves * nn : nn, l.E ? l.moves * nn : nn, l.H ? l.sees * pn : pn, l.RR ? l.sees * pp : pp,
            l.slots * pn, l.slots * pp};
}

static Sums take_sums(const Context& c, const Layout& l, Arena& arena, bool covariance) {
    const SumSizes s = sizes_of(c, l);
    Sums out;
    out.F = arena.doubles(s.F); out.H = arena.doubles(s.H);
    out.E = covariance ? arena.doubles(s.E) : nullptr;
    out.RR = covariance ? arena.doubles(s.RR) : nullptr;
    out.C = arena.doubles(s.C); out.U = arena.doubles(s.U); out.weight = arena.doubles(l.slots);
    return out;
}

// OUT (rows x ld) += sum over steps and lanes of x y'; x is (steps, rows, LANES), its steps `x_step` apart, and y (steps, n,
// LANES) or, for one lane, (steps, ld).
template <int LANES>
static void outer(double* out, const double* x, i64 x_step, const double* y, i64 rows, i64 n, i64 ld, i64 steps) {
    if (LANES == 1) { product<true>(out, x, 1, x_step, y, rows, steps, ld); return; }
    typedef Simd<double> S;
    typedef typename S::V vec;
    constexpr int W = S::W, NV = LANES < W ? 1 : LANES / W;
    constexpr int MR = NV == 1 ? 4 : 2;  // the sums stay in registers
    for (i64 i = 0; i < rows; i += MR)
        for (i64 j = 0; j < n; j += 4) {
            const i64 ni = rows - i < MR ? rows - i : MR, nj = n - j < 4 ? n - j : 4;
            vec acc[MR * 4];
            UNROLL for (int a = 0; a < MR * 4; ++a) acc[a] = vec{};
            for (i64 s = 0; s < steps; ++s)
                UNROLL for (int v = 0; v < NV; ++v) {
                    vec xs[MR], ys[4];
                    UNROLL for (int a = 0; a < MR; ++a) xs[a] = S::load(x + s * x_step + (i + (a < ni ? a : 0)) * LANES + v * W);
                    UNROLL for (int b = 0; b < 4; ++b) ys[b] = S::load(y + (s * n + j + (b < nj ? b : 0)) * LANES + v * W);
                    UNROLL for (int a = 0; a < MR; ++a) UNROLL for (int b = 0; b < 4; ++b) acc[4 * a + b] += xs[a] * ys[b];
                }
            double sum[MR * 4];
            UNROLL for (int a = 0; a < MR * 4; a += W) S::store(sum + a, S::totals(acc + a));
            for (i64 a = 0; a < ni; ++a)
                for (i64 b = 0; b < nj; ++b) out[(i + a) * ld + j + b] += sum[4 * a + b];
        }
}

// The pass over the means of a tile, STEPS times at once.
template <int LANES>
struct MeanGradient {
    const Context& c;
    const Layout& layout;
    const i64 g, n, p, ld, size, wide;  // doubles of a mean, of an innovation
    Motion<LANES> motion;
    Sums sums;
    i64 index[LANES];  // of the series; -1 = there is none
    const double* upstream[LANES]; // gradient of its log-likelihoods,
    i64 upstream_t = 0;            // whose times are so far apart
    const double zero = 0;
    double *predicted, *filtered;  // means of each time of the block
    double *lambda;   // of each time from the one before the block on
    double *ahead;    // lambda- of each time to the one after the block, 0 where the state does not move into it
    double *w, *ge;   // -w and g e of each time
    double *weight;   // g of each time
    double *w_q;
    double *b, *d;    // sums of a lane: of lambda-, of -w

    MeanGradient(const Context& context, const Layout& l, i64 group, i64 tile, Arena& arena, const Sums& into)
        : c(context), layout(l), g(group), n(c.n), p(c.p), ld(c.ld), size(LANES == 1 ? c.ld : c.n * LANES),
          wide(c.p * LANES), motion(context, group, tile, arena), sums(into) {
        predicted = arena.doubles(STEPS * size); filtered = arena.doubles(STEPS * size);
        lambda = arena.doubles((STEPS + 1) * size); ahead = arena.doubles((STEPS + 1) * size);
        w = arena.doubles(STEPS * wide); ge = arena.doubles(STEPS * wide); weight = arena.doubles(STEPS * LANES);
        w_q = arena.doubles(wide);
        b = arena.doubles(n * LANES); d = arena.doubles(wide);
        for (int l = 0; l < LANES; ++l) {
            const i64 real = tile * LANES + l;
            index[l] = real < c.a.series ? g * c.a.series + real : -1;
            upstream[l] = &zero;
            if (!c.a.grad_log_likelihood) continue;
            upstream[l] = c.a.grad_log_likelihood + g * c.a.grad_g + (real < c.a.series ? real : 0) * c.a.grad_i;
            upstream_t = c.a.grad_t;
        }
    }
    // record(t)
    template <class Records>
    void run(const Records& record, double* tape) {
        const KalmanArgs& a = c.a;
        for (i64 stop = c.times; stop > 0;) {
            const i64 start = (stop - 1) / STEPS * STEPS;
            if (a.grad_F || a.grad_H) restore(record, tape, start, stop);
            for (int l = 0; l < LANES; ++l)
                for (i64 t = start; t < stop; ++t)
                    weight[(t - start) * LANES + l] = t < motion.active[l] ? upstream[l][t * upstream_t] : 0;
            for (i64 t = stop - 1; t >= start; --t) {
                const i64 k = t - start;
                double *now = lambda + (k + 1) * size, *minus = ahead + k * size;
                add_upstream(now, a.grad_filtered_mean, t);
                copy(minus, now, size);
                observe(t, k, record(t), c.innovation(tape, t), now, minus);
                add_upstream(minus, a.grad_predicted_mean, t);
                if (t == 0) spread(a.grad_m, minus, n);
                move(t, minus, lambda + k * size);
            }
            sum(start, stop, c.innovation(tape, start));
            copy(lambda + STEPS * size, lambda, size);
            copy(ahead + STEPS * size, ahead, size);
            stop = start;
        }
        spread(a.grad_b_sum, b, n); spread(a.grad_d_sum, d, p);
    }
    // The means of a block, from what is kept of them.
    template <class Records>
    void restore(const Records& record, double* tape, i64 start, i64 stop) {
        for (i64 t = start; t < stop; ++t) {
            const i64 k = t - start;
            double *ahead_of = predicted + k * size, *mean = filtered + k * size;
            if (LANES == 1 || k == 0) copy(ahead_of, c.kept_mean(tape, t), n * LANES);
            else motion.predict(t, mean - size, ahead_of);
            motion.update(record(t), ahead_of, c.innovation(tape, t), mean);
        }
    }
    void add_upstream(double* to, const double* grad, i64 t) const {
        if (!grad) return;
        for (int l = 0; l < LANES; ++l)
            if (index[l] >= 0)
                for (i64 j = 0; j < n; ++j) to[j * LANES + l] += grad[(index[l] * c.times + t) * n + j];
    }
    // Lanes to their series.
    void spread(double* to, const double* from, i64 rows) const {
        for (int l = 0; to && l < LANES; ++l)
            if (index[l] >= 0)
                for (i64 j = 0; j < rows; ++j) to[index[l] * rows + j] = from[j * LANES + l];
    }

    // `minus` is lambda at first, and then lambda-.
    void observe(i64 t, i64 k, const double* rec, const double* e, const double* now, double* minus) {
        const KalmanArgs& a = c.a;
        const i64 q = (i64)rec[c.at_rows];
        double *w_t = w + k * wide, *ge_t = ge + k * wide, *g_t = weight + k * LANES;
        if (q < p) { clear(w_t, wide); clear(ge_t, wide); }
        if (q == 0) { clear(g_t, LANES); return; }
        const double *E = rec + c.at_E, *W = rec + c.at_W;
        const i64 s = c.seen_at[(size_t)t];
        const System& system = motion.system;
        motion.system.observe(t, false);
        const bool all = motion.all_active(t);
        double now_weight[LANES];
        for (int l = 0; l < LANES; ++l) now_weight[l] = g_t[l];
        for (i64 r = 0; r < q; ++r) {
            double both[LANES];
            for (int l = 0; l < LANES; ++l) both[l] = now_weight[l] * e[r * LANES + l];
            for (int l = 0; l < LANES; ++l) ge_t[r * LANES + l] = both[l];
        }
        // w = W' (E lambda - g e)
        if (LANES == 1)
            for (i64 r = 0; r < q; ++r) w_q[r] = dot(E + r * ld, now, ld);
        else columns<(LANES == 1 ? 4 : LANES), false>(w_q, LANES, E, ld, 1, now, LANES, q, n);
        for (i64 r = 0; r < q; ++r) {
            double total[LANES];
            for (int l = 0; l < LANES; ++l) total[l] = 0;
            for (i64 j = r; j < q; ++j)
                for (int l = 0; l < LANES; ++l) total[l] += W[j * p + r] * (w_q[j * LANES + l] - ge_t[j * LANES + l]);
            for (int l = 0; l < LANES; ++l) w_q[r * LANES + l] = -total[l];
        }
        if (!all) motion.keep_still(t, w_q, nullptr, q);
        for (i64 r = 0; r < q; ++r) {
            const i64 row = system.rows[r];
            double now_w[LANES];
            for (int l = 0; l < LANES; ++l) now_w[l] = w_q[r * LANES + l];
            for (int l = 0; l < LANES; ++l) w_t[row * LANES + l] = now_w[l];
            for (int l = 0; l < LANES; ++l) d[row * LANES + l] += now_w[l];
            if (a.grad_y)
                for (int l = 0; l < LANES; ++l)
                    if (index[l] >= 0) a.grad_y[(index[l] * a.seen + s) * p + row] = -w_q[r * LANES + l];
        }
        // lambda- = lambda - H' w
        if (LANES == 1) product<true>(minus, w_q, 0, 1, system.H, 1, q, ld);
        else columns<(LANES == 1 ? 4 : LANES), true>(minus, LANES, system.H, 1, ld, w_q, LANES, n, q);
    }

    // lambda of time t - 1 from lambda- of time t, of which remains what F, b and Q feel: nothing where nothing moves.
    void move(i64 t, double* minus, double* before) {
        const KalmanArgs& a = c.a;
        if (!c.moves(g, t)) {
            copy(before, minus, size);
            clear(minus, size);
            return;
        }
        if (LANES == 1) {
            motion.system.move(t, false);
            for (i64 j = 0; j < n; ++j) before[j] = dot(motion.system.FT + j * ld, minus, ld);
        } else {
            columns<(LANES == 1 ? 4 : LANES), false>(before, LANES, motion.system.dense_F(t), 1, n, minus, LANES, n, n);
        }
        if (!motion.all_active(t)) {
            motion.keep_still(t, before, minus, n);
            motion.keep_still(t, minus, nullptr, n);
        }
        for (i64 j = 0; j < n * LANES; ++j) b[j] += minus[j];
        if (a.grad_b)
            for (int l = 0; l < LANES; ++l)
                if (index[l] >= 0)
                    for (i64 j = 0; j < n; ++j)
                        a.grad_b[(index[l] * (c.times - 1) + t - 1) * n + j] = minus[j * LANES + l];
    }

    // The outer products of a block.
    void sum(i64 start, i64 stop, const double* e) {
        const KalmanArgs& a = c.a;
        const i64 count = stop - start, each_F = layout.F ? 1 : count, each_H = layout.H ? 1 : count;
        for (i64 k = 0; a.grad_F && k < count; k += each_F)
            if (!layout.F || start + k + 1 < c.times)
                outer<LANES>(sums.F + (start + k) * layout.F, ahead + (k + 1) * size, size, filtered + k * size, n, n, ld, each_F);
        for (i64 k = 0; a.grad_H && k < count; k += each_H) {
            const i64 s = c.seen_at[(size_t)(start + k)];
            if (!layout.H || s >= 0)
                outer<LANES>(sums.H + s * layout.H, w + k * wide, wide, predicted + k * size, p, n, ld, each_H);
        }
        for (i64 k = 0, steps; k < count; k += steps) {
            const bool alone = start + k < layout.rest;
            const i64 slot = alone ? start + k : layout.rest;
            steps = alone ? 1 : count - k;
            if (alone && c.seen_at[(size_t)slot] < 0) continue;
            outer<LANES>(sums.C + slot * p * ld, e + k * wide, wide, lambda + (k + 1) * size, p, n, ld, steps);
            double* U = sums.U + slot * p * p;
            if (LANES > 1) outer<LANES>(U, ge + k * wide, wide, e + k * wide, p, p, p, steps);
            else
                for (i64 j = k; j < k + steps; ++j)
                    for (i64 r = 0; r < p; ++r)
                        for (i64 m = 0; m < p; ++m) U[r * p + m] += ge[j * p + r] * e[j * p + m];
            double total = 0;
            for (i64 j = k * LANES; j < (k + steps) * LANES; ++j) total += weight[j];
            sums.weight[slot] += total;
        }
    }
};
