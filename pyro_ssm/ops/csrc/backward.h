// The gradient of the filter, by hand. Two passes back in time:
//
// means, every series:   w = W' (E lambda - g e),  lambda- = lambda - H' w,  lambda' = F' lambda-
// covariances, a group:  Gamma- = Gamma + sym(Z' W H),  Z = C - 2 E Gamma + G W H,  Gamma' = F' Gamma- F
//
// where lambda and Gamma are the gradients with respect to the mean and the covariance of a filtered state (- : of a
// predicted one), g that of log p(y_k | y_<k), e = W v the whitened innovation, and the means hand to the covariances the
// sums over series C = sum e lambda', U = sum g e e' and sum g. W' G W with G = E Gamma E' - sym(E C') + (U - sum g I) / 2
// is the gradient with respect to S. No inverse of Q, R or P is taken.

constexpr i64 AHEAD = 3;  // steps that memory is asked for before they are taken

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

// OUT (rows x ld) += sum over steps and lanes of x y'; x is (steps, rows, LANES), y (steps, n, LANES) or, for one lane,
// (steps, ld) and x (steps, rows).
template <int LANES>
static void outer(double* out, const double* x, const double* y, i64 rows, i64 n, i64 ld, i64 steps) {
    if (LANES == 1) { product<true>(out, x, 1, rows, y, rows, steps, ld); return; }
    typedef typename Width<(LANES == 1 ? 8 : LANES)>::vec vec;
    constexpr int W = Width<(LANES == 1 ? 8 : LANES)>::value, NV = LANES == 1 ? 1 : LANES / W;
    constexpr int MR = NV == 1 ? 4 : 2;  // the sums stay in registers
    for (i64 i = 0; i < rows; i += MR)
        for (i64 j = 0; j < n; j += 4) {
            const i64 ni = rows - i < MR ? rows - i : MR, nj = n - j < 4 ? n - j : 4;
            vec acc[MR][4];
            UNROLL for (int a = 0; a < MR; ++a) UNROLL for (int b = 0; b < 4; ++b) acc[a][b] = vec{};
            for (i64 s = 0; s < steps; ++s)
                UNROLL for (int v = 0; v < NV; ++v) {
                    vec xs[MR], ys[4];
                    UNROLL for (int a = 0; a < MR; ++a) xs[a] = *(const vec*)(x + (s * rows + i + (a < ni ? a : 0)) * LANES + v * W);
                    UNROLL for (int b = 0; b < 4; ++b) ys[b] = *(const vec*)(y + (s * n + j + (b < nj ? b : 0)) * LANES + v * W);
                    UNROLL for (int a = 0; a < MR; ++a) UNROLL for (int b = 0; b < 4; ++b) acc[a][b] += xs[a] * ys[b];
                }
            for (int a = 0; a < ni; ++a)
                for (int b = 0; b < nj; ++b) {
                    double part[W], sum = 0;
                    *(vec*)part = acc[a][b];
                    for (int l = 0; l < W; ++l) sum += part[l];
                    out[(i + a) * ld + j + b] += sum;
                }
        }
}

template <int LANES>
struct MeanGradient {
    static constexpr i64 STEPS = 32;  // outer products are summed over this many steps at a time
    const Context& c;
    const Layout& layout;
    const i64 g, tile, n, p, ld, pad_n;  // pad_n: doubles of a mean of all lanes
    System system;
    Sums sums;
    i64 active[LANES], index[LANES];
    // blocks of steps: lambda- (x) beside the filtered mean before it (y), w beside the predicted mean (mp), e beside
    // g e and lambda (lam)
    double *lambda, *x, *y, *w, *mp, *es, *lam, *ges, *w_q, *mean, *weights;
    double *b, *d, *weight;  // sums of a lane: of lambda-, of -w, of g
    i64 moved = 0, seen = 0, summed = 0, summed_slot = 0;

    MeanGradient(const Context& context, const Layout& l, i64 group, i64 tile_index, Arena& arena, const Sums& into)
        : c(context), layout(l), g(group), tile(tile_index), n(c.n), p(c.p), ld(c.ld),
          pad_n(LANES == 1 ? c.ld : c.n * LANES), system(context, group, arena), sums(into) {
        lambda = arena.doubles(pad_n); mean = arena.doubles(pad_n);
        x = arena.doubles(STEPS * n * LANES); y = arena.doubles(STEPS * pad_n);
        w = arena.doubles(STEPS * p * LANES); mp = arena.doubles(STEPS * pad_n);
        es = arena.doubles(STEPS * p * LANES); ges = arena.doubles(STEPS * p * LANES); lam = arena.doubles(STEPS * pad_n);
        w_q = arena.doubles(p * LANES); weights = arena.doubles(LANES);
        b = arena.doubles(n * LANES); d = arena.doubles(p * LANES); weight = arena.doubles(LANES);
        for (int i = 0; i < LANES; ++i) {
            const i64 real = tile * LANES + i;
            active[i] = c.length(g, real);
            index[i] = real < c.a.series ? g * c.a.series + real : -1;
        }
    }
    void add_upstream(const double* grad, i64 t) {
        if (!grad) return;
        for (int l = 0; l < LANES; ++l)
            if (index[l] >= 0)
                for (i64 j = 0; j < n; ++j) lambda[j * LANES + l] += grad[(index[l] * c.times + t) * n + j];
    }
    void flush_moves(i64 t) {
        if (moved) outer<LANES>(sums.F + t * layout.F, x, y, n, n, ld, moved);
        moved = 0;
    }
    void flush_seen(i64 s) {
        if (seen) {
            double* H = sums.H + s * layout.H;
            for (i64 i = 0; i < seen * p * LANES; ++i) w[i] = -w[i];
            outer<LANES>(H, w, mp, p, n, ld, seen);
        }
        seen = 0;
    }
    void flush_sums(i64 slot) {
        if (summed) {
            outer<LANES>(sums.C + slot * p * ld, es, lam, p, n, ld, summed);
            double* U = sums.U + slot * p * p;
            if (LANES > 1) outer<LANES>(U, ges, es, p, p, p, summed);
            else
                for (i64 k = 0; k < summed; ++k)
                    for (i64 r = 0; r < p; ++r)
                        for (i64 q = 0; q < p; ++q) U[r * p + q] += ges[k * p + r] * es[k * p + q];
            for (int l = 0; l < LANES; ++l) sums.weight[slot] += weight[l];
            for (int l = 0; l < LANES; ++l) weight[l] = 0;
        }
        summed = 0;
    }

    // record(t), tape(t)
    template <class Records>
    void run(const Records& record, const double* tape) {
        const KalmanArgs& a = c.a;
        bool pending = false;  // lambda- of the move into t + 1 waits in x for the mean of time t
        for (i64 t = c.times - 1; t >= 0; --t) {
            if (t >= AHEAD) fetch(tape + (t - AHEAD) * c.mean_record, c.mean_record);
            const double *rec = record(t), *now = tape + t * c.mean_record, *e = now + n * LANES;
            const i64 q = (i64)rec[c.at_rows];
            const double* E = rec + c.at_E;
            // the filtered mean of time t
            if (pending) {
                for (i64 j = 0; j < n * LANES; ++j) mean[j] = now[j];
                if (q) {
                    if (LANES == 1) product<true>(mean, e, 0, 1, E, 1, q, ld);
                    else columns<(LANES == 1 ? 4 : LANES), true>(mean, LANES, E, 1, ld, e, LANES, n, q);
                }
            }
            if (pending) {
                std::memcpy(y + moved * pad_n, mean, sizeof(double) * (size_t)pad_n);
                if (++moved == STEPS || layout.F) flush_moves(t);
                pending = false;
            }
            add_upstream(a.grad_filtered_mean, t);
            if (q) observe(t, q, rec, now, e);
            add_upstream(a.grad_predicted_mean, t);
            if (c.moves(g, t)) pending = move(t);
        }
        flush_moves(0); flush_seen(0); flush_sums(summed_slot);
        spread(a.grad_m, lambda, n); spread(a.grad_b_sum, b, n); spread(a.grad_d_sum, d, p);
    }

    // Lanes to their series.
    void spread(double* to, const double* from, i64 size) {
        for (int l = 0; to && l < LANES; ++l)
            if (index[l] >= 0)
                for (i64 j = 0; j < size; ++j) to[index[l] * size + j] = from[j * LANES + l];
    }

    void observe(i64 t, i64 q, const double* rec, const double* now, const double* e) {
        const KalmanArgs& a = c.a;
        const double *E = rec + c.at_E, *W = rec + c.at_W;
        const i64 s = c.seen_at[(size_t)t], slot = t < layout.rest ? t : layout.rest;
        system.observe(t, false);
        if (summed == STEPS || slot != summed_slot) flush_sums(summed_slot);
        summed_slot = slot;
        if (seen == STEPS) flush_seen(0);
        double *e_t = es + summed * p * LANES, *ge_t = ges + summed * p * LANES, *w_t = w + seen * p * LANES;
        for (i64 i = 0; i < p * LANES; ++i) e_t[i] = ge_t[i] = w_t[i] = 0;
        for (int l = 0; l < LANES; ++l) {
            weights[l] = t < active[l] && index[l] >= 0 && a.grad_log_likelihood
                             ? a.grad_log_likelihood[index[l] * c.times + t] : 0;
        }
        for (int l = 0; l < LANES; ++l) weight[l] += weights[l];
        for (i64 r = 0; r < q; ++r)
            for (int l = 0; l < LANES; ++l) {
                e_t[r * LANES + l] = e[r * LANES + l];
                ge_t[r * LANES + l] = weights[l] * e[r * LANES + l];
            }
        // w = W' (E lambda - g e)
        if (LANES == 1)
            for (i64 r = 0; r < q; ++r) w_q[r] = dot(E + r * ld, lambda, ld);
        else columns<(LANES == 1 ? 4 : LANES), false>(w_q, LANES, E, ld, 1, lambda, LANES, q, n);
        for (i64 r = 0; r < q; ++r) {
            double sum[LANES];
            for (int l = 0; l < LANES; ++l) sum[l] = 0;
            for (i64 k = r; k < q; ++k)
                for (int l = 0; l < LANES; ++l) sum[l] += W[k * p + r] * (w_q[k * LANES + l] - ge_t[k * LANES + l]);
            for (int l = 0; l < LANES; ++l) w_q[r * LANES + l] = sum[l];
        }
        bool all = true;
        for (int l = 0; l < LANES; ++l) all = all && t < active[l];
        if (!all)
            for (int l = 0; l < LANES; ++l)
                if (t >= active[l])
                    for (i64 r = 0; r < q; ++r) w_q[r * LANES + l] = e_t[r * LANES + l] = 0;
        std::memcpy(lam + summed * pad_n, lambda, sizeof(double) * (size_t)pad_n);
        for (i64 r = 0; r < q; ++r) {
            const i64 row = system.rows[r];
            for (int l = 0; l < LANES; ++l) {
                const double value = w_q[r * LANES + l];
                w_t[row * LANES + l] = value;
                d[row * LANES + l] -= value;
            }
            if (a.grad_y)
                for (int l = 0; l < LANES; ++l)
                    if (index[l] >= 0) a.grad_y[(index[l] * a.seen + s) * p + row] = w_q[r * LANES + l];
        }
        ++summed;
        if (a.grad_H) {
            if (LANES == 1) for (i64 j = 0; j < ld; ++j) mp[seen * pad_n + j] = j < n ? now[j] : 0;
            else std::memcpy(mp + seen * pad_n, now, sizeof(double) * (size_t)(n * LANES));
            ++seen;
            if (layout.H) flush_seen(s);
        }
        // lambda- = lambda - H' w
        for (i64 i = 0; i < q * LANES; ++i) w_q[i] = -w_q[i];
        if (LANES == 1) product<true>(lambda, w_q, 0, 1, system.H, 1, q, ld);
        else columns<(LANES == 1 ? 4 : LANES), true>(lambda, LANES, system.H, 1, ld, w_q, LANES, n, q);
    }

    // lambda of time t - 1; the part of series that stand still passes through.
    bool move(i64 t) {
        const KalmanArgs& a = c.a;
        system.move(t, false);
        double* before = x + moved * n * LANES;
        std::memcpy(before, lambda, sizeof(double) * (size_t)(n * LANES));
        bool all = true;
        for (int l = 0; l < LANES; ++l) all = all && t < active[l];
        if (!all)
            for (int l = 0; l < LANES; ++l)
                if (t >= active[l])
                    for (i64 j = 0; j < n; ++j) before[j * LANES + l] = 0;
        for (i64 j = 0; j < n * LANES; ++j) b[j] += before[j];
        if (a.grad_b)
            for (int l = 0; l < LANES; ++l)
                if (index[l] >= 0)
                    for (i64 j = 0; j < n; ++j)
                        a.grad_b[(index[l] * (c.times - 1) + t - 1) * n + j] = before[j * LANES + l];
        if (LANES == 1) {
            if (!all) return a.grad_F != nullptr;
            for (i64 j = 0; j < n; ++j) lambda[j] = dot(system.FT + j * ld, pad_row(before), ld);
        } else {
            double* moved_back = mean;  // scratch: the mean of time t was used above
            columns<(LANES == 1 ? 4 : LANES), false>(moved_back, LANES, system.FT, ld, 1, before, LANES, n, n);
            for (int l = 0; l < LANES; ++l)
                if (t < active[l])
                    for (i64 j = 0; j < n; ++j) lambda[j * LANES + l] = moved_back[j * LANES + l];
        }
        return a.grad_F != nullptr;
    }
    const double* pad_row(const double* row) {
        for (i64 j = 0; j < n; ++j) mean[j] = row[j];
        return mean;
    }
};
