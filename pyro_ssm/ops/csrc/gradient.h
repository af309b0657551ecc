// The covariance pass of the gradient, and how a group's gradients are put together.

struct CovarianceGradient {
    const Context& c;
    const Layout& layout;
    const i64 g, n, p, ld, width;
    System system;
    Sums sums;
    Left back;  // F'
    double *F;   // padded
    double *gamma, *EF, *T, *EG, *Z, *Y, *WH, *G, *EC, *FP, *half, *pair, *P;

    CovarianceGradient(const Context& context, const Layout& l, i64 group, Arena& arena, const Sums& into)
        : c(context), layout(l), g(group), n(c.n), p(c.p), ld(c.ld), width(c.ld),
          system(context, group, arena), sums(into) {
        back.start = arena.take<i64>(n + 1); back.column = arena.take<i64>(n * n); back.entry = arena.doubles(n * n);
        gamma = arena.doubles(n * ld); EF = arena.doubles(n * ld); T = arena.doubles(n * ld);
        FP = arena.doubles(n * ld);
        EG = arena.doubles(p * ld); WH = arena.doubles(p * ld); Z = arena.doubles(p * ld); Y = arena.doubles(p * ld);
        half = arena.doubles(2 * p * ld); pair = arena.doubles(2 * p * ld); F = arena.doubles(n * ld); P = arena.doubles(n * ld);
        G = arena.doubles(p * p); EC = arena.doubles(p * p);
    }
    // gamma: of P -> of P-, given the sums over series; with gradients of H and R where `sum`.
    void update(i64 t, const double* rec, const double* C, const double* U, double weight, bool sum) {
        const i64 q = (i64)rec[c.at_rows];
        if (q == 0) return;
        system.observe(t, false);
        const double *E = rec + c.at_E, *W = rec + c.at_W;
        const i64 s = c.seen_at[(size_t)t];
        product<false>(WH, W, p, 1, system.H, q, q, ld);  // above the diagonal W is zero
        product<false>(EG, E, ld, 1, gamma, q, n, ld);
        for (i64 r = 0; r < q; ++r)
            for (i64 k = 0; k < q; ++k) EC[r * p + k] = dot(E + r * width, C + k * width, ld);
        for (i64 r = 0; r < q; ++r)
            for (i64 k = 0; k <= r; ++k)
                G[r * p + k] = G[k * p + r] =
                    dot(EG + r * width, E + k * width, ld) - 0.5 * (EC[r * p + k] + EC[k * p + r]) +
                    0.25 * (U[r * p + k] + U[k * p + r]) - (r == k ? 0.5 * weight : 0);
        product<false>(Y, G, p, 1, WH, q, q, ld);
        for (i64 i = 0; i < q * width; ++i) Z[i] = C[i] - 2 * EG[i] + Y[i];
        // gamma += sym(Z' WH)
        for (i64 i = 0; i < q * width; ++i) half[i] = 0.5 * Z[i], half[q * width + i] = 0.5 * WH[i];
        std::memcpy(pair, WH, sizeof(double) * (size_t)(q * width));
        std::memcpy(pair + q * width, Z, sizeof(double) * (size_t)(q * width));
        product<true>(gamma, half, 1, ld, pair, n, 2 * q, ld);
        if (!sum) return;
        double* RR = sums.RR + s * layout.RR;
        for (i64 r = 0; r < q; ++r)  // W' G W
            for (i64 k = 0; k < q; ++k) {
                EC[r * p + k] = 0;
                for (i64 j = k; j < q; ++j) EC[r * p + k] += G[r * p + j] * W[j * p + k];
            }
        for (i64 r = 0; r < q; ++r)
            for (i64 k = 0; k < q; ++k) {
                double value = 0;
                for (i64 j = r; j < q; ++j) value += W[j * p + r] * EC[j * p + k];
                RR[system.rows[r] * p + system.rows[k]] += value;
            }
        if (!c.a.grad_H) return;
        for (i64 i = 0; i < q * width; ++i) Z[i] += Y[i];  // W' Z P-
        product<false>(Y, Z, ld, 1, rec, q, n, ld);
        double* out = sums.H + s * layout.H;
        for (i64 r = 0; r < q; ++r)
            for (i64 k = r; k < q; ++k) add_row(out + system.rows[r] * width, W[k * p + r], Y + k * width, ld);
    }
    void read_F(i64 t, bool fresh) {
        if (!fresh && !c.a.F_t) return;
        back.read(system.dense_F(t), 1, n, n);
        pad(F, system.dense_F(t), n, n, ld);
    }
    // The filtered covariance of a record.
    const double* filtered(const double* rec) {
        if (rec[c.at_exact] != 0) return rec + c.at_P;
        const i64 q = (i64)rec[c.at_rows];
        if (q == 0) return rec;
        for (i64 i = 0; i < q * width; ++i) half[i] = -rec[c.at_E + i];
        std::memcpy(P, rec, sizeof(double) * (size_t)(n * width));
        product<true>(P, half, 1, ld, rec + c.at_E, n, q, ld);
        return P;
    }
    // gamma: of P- at t -> of P at t - 1, whose record is `before`.
    void move(i64 t, const double* before, bool sum) {
        if (sum) add(sums.E + (t - 1) * layout.E, gamma, n * width);
        congruence(back, F, T, EF, FP, gamma, ld);
        std::memcpy(gamma, T, sizeof(double) * (size_t)(n * width));
        if (sum && c.a.grad_F) {  // 2 E F P, with E F = (F' E)'
            for (i64 i = 0; i < n * width; ++i) EF[i] *= 2;
            product<true>(sums.F + (t - 1) * layout.F, EF, 1, width, filtered(before), n, n, ld);
        }
    }
};

struct Powers { double* matrix[64]; i64 count = 0; };

// How many steps until the closed loop F (I - K H) has forgotten: a power of two, or 0 where that takes longer than
// `limit`. The powers F (I - K H)^(2^j) are left in `powers`.
static i64 memory_of(const Context& c, i64 g, const double* rec, i64 limit, Arena& arena, Powers& powers) {
    const i64 n = c.n, ld = c.ld, width = ld;
    System system(c, g, arena);
    system.move(1, false);
    const i64 q = system.observe(c.times - 1, false);
    double *A = arena.doubles(n * ld), *loop = arena.doubles(n * ld), *WH = arena.doubles(c.p * ld);
    product<false>(WH, rec + c.at_W, c.p, 1, system.H, q, q, ld);
    for (i64 i = 0; i < n; ++i) {
        A[i * width + i] = 1;
        for (i64 r = 0; r < q; ++r) add_row(A + i * width, -rec[c.at_E + r * width + i], WH + r * width, ld);
    }
    product<false>(loop, system.dense_F(1), n, 1, A, n, n, ld);
    for (i64 steps = 1; steps <= limit; steps *= 2) {
        powers.matrix[powers.count++] = loop;
        double largest = 0;
        for (i64 i = 0; i < n; ++i)
            for (i64 j = 0; j < n; ++j) {
                const double vi = rec[i * width + i], vj = rec[j * width + j];
                const double entry = std::fabs(loop[i * width + j]) * (vi > 0 && vj > 0 ? std::sqrt(vj / vi) : 1);
                if (!(entry <= largest)) largest = entry;
            }
        if (largest < 1e-8) return steps;
        double* next = arena.doubles(n * ld);
        product<false>(next, loop, width, 1, loop, n, n, ld);
        loop = next;
    }
    return 0;
}

struct Backward {
    const Context& c;
    const i64 g;
    double* grad_L;
    const i64 n, p, ld, width;
    Arena arena;
    const double* records;
    i64 settled, zone, memory = 0;
    Powers powers;
    Layout layout;
    Sums sums;

    Backward(const Context& context, i64 group, double* gradient_L)
        : c(context), g(group), grad_L(gradient_L), n(c.n), p(c.p), ld(c.ld), width(c.ld), records(c.records(c.a.tape, group)) {
        settled = (i64)*c.settled(c.a.tape, g);
        zone = settled + 1;
        if (zone < c.times) memory = memory_of(c, g, record(settled), (c.times - zone) / 2, arena, powers);
        layout = layout_of(c, memory ? zone + memory : c.times);
        sums = take_sums(c, layout, arena, true);
    }
    const double* record(i64 t) const { return records + (t < settled ? t : settled) * c.record; }

    bool run(void* threads) {
        if (c.lanes == 1) means<1>(threads); else means<8>(threads);
        covariances();
        return true;
    }
    template <int LANES>
    void means(void* threads) {
        const i64 chunks = c.tiles < 4 ? c.tiles : 4;  // fixed: the order of sums does not depend on the threads
        std::vector<Sums> parts;
        for (i64 k = 0; k < chunks; ++k) {
            Sums part = k ? take_sums(c, layout, arena, false) : sums;
            parts.push_back(part);
        }
        bool no_memory[4] = {false, false, false, false};
        auto work = [&](i64 begin, i64 end) {
            for (i64 k = begin; k < end; ++k) {
                try {
                    for (i64 tile = k; tile < c.tiles; tile += chunks) {
                        Arena scratch;
                        MeanGradient<LANES> pass(c, layout, g, tile, scratch, parts[(size_t)k]);
                        pass.run([this](i64 t) { return record(t); }, c.of_tile(c.a.tape, g, tile));
                    }
                } catch (const std::bad_alloc&) { no_memory[k] = true; }
            }
        };
        parallel(c.n * c.n * c.times > 2048 ? threads : nullptr, chunks, 1, work);
        const SumSizes size = sizes_of(c, layout);
        for (i64 k = 0; k < chunks; ++k) {
            if (no_memory[k]) throw std::bad_alloc();
            if (k == 0) continue;
            const Sums& part = parts[(size_t)k];
            add(sums.F, part.F, size.F); add(sums.H, part.H, size.H);
            add(sums.C, part.C, size.C); add(sums.U, part.U, size.U); add(sums.weight, part.weight, layout.slots);
        }
    }
    void covariances() {
        CovarianceGradient pass(c, layout, g, arena, sums);
        i64 t = c.times - 1;
        if (c.times > 1) pass.read_F(c.times - 1, true);
        if (memory) t = standing(pass);
        for (; t >= 0; --t) {
            if (t >= AHEAD) fetch(record(t - AHEAD), c.at_P);
            pass.update(t, record(t), sums.C + t * p * ld, sums.U + t * p * p, sums.weight[t], true);
            if (c.moves(g, t)) {
                pass.read_F(t, false);
                pass.move(t, record(t - 1), true);
            }
        }
        if (grad_L) {
            double* out = grad_L + (c.a.L_g ? g * n * n : 0);
            times_root(out, pass.gamma, width, c.a.L + g * c.a.L_g, n);
        }
    }
    // All times from `zone` on at once: gamma- of each is linear in the next, so their sum solves
    // X = A' X A + W with A = F (I - K H), by doubling. Returns the time before, with its gamma in place.
    i64 standing(CovarianceGradient& pass) {
        const double* rec = record(settled);
        const i64 nn = n * width, pn = p * ld, pp = p * p;
        for (i64 t = layout.rest - 1; t >= zone; --t) {  // gamma- of the first, which the later ones no longer reach
            pass.update(t, rec, sums.C + t * pn, sums.U + t * pp, sums.weight[t], false);
            if (t > zone) pass.move(t, rec, false);
        }
        double *first = arena.doubles(nn), *C = arena.doubles(pn), *U = arena.doubles(pp), weight = 0;
        std::memcpy(first, pass.gamma, sizeof(double) * (size_t)nn);
        for (i64 t = zone; t <= layout.rest; ++t) {
            add(C, sums.C + t * pn, pn); add(U, sums.U + t * pp, pp);
            weight += sums.weight[t];
        }
        double *X = arena.doubles(nn), *M = arena.doubles(nn), *MT = arena.doubles(nn), *T = arena.doubles(nn);
        Left A;
        A.start = arena.take<i64>(n + 1); A.column = arena.take<i64>(n * n); A.entry = arena.doubles(n * n);
        std::memset(pass.gamma, 0, sizeof(double) * (size_t)nn);
        pass.update(settled, rec, C, U, weight, false);
        std::memcpy(X, pass.gamma, sizeof(double) * (size_t)nn);
        for (i64 j = 0; j < powers.count; ++j) {
            A.read(powers.matrix[j], 1, width, n);  // transposed
            if (j == 0) {
                congruence(A, powers.matrix[j], M, MT, T, first, ld);
                for (i64 i = 0; i < nn; ++i) X[i] -= M[i];
            }
            congruence(A, powers.matrix[j], M, MT, T, X, ld);
            add(X, M, nn);
        }
        // the sum of gamma over the zone is F' (X - first) F
        for (i64 i = 0; i < nn; ++i) pass.gamma[i] = X[i] - first[i];
        pass.move(zone, rec, false);
        pass.update(settled, rec, C, U, weight, true);
        std::memcpy(pass.gamma, X, sizeof(double) * (size_t)nn);
        pass.move(zone, rec, true);
        std::memcpy(pass.gamma, first, sizeof(double) * (size_t)nn);
        pass.move(zone, rec, false);
        return settled;
    }
    // out += 2 G root
    static void times_root(double* out, const double* G, i64 ldg, const double* root, i64 size) {
        for (i64 i = 0; i < size; ++i)
            for (i64 k = 0; k < size; ++k) {
                const double a = 2 * G[i * ldg + k];
                if (a != 0)
                    for (i64 j = 0; j < size; ++j) out[i * size + j] += a * root[k * size + j];
            }
    }
    static void add_rows(double* out, const double* from, i64 rows, i64 cols, i64 ldf) {
        for (i64 i = 0; i < rows; ++i)
            for (i64 j = 0; j < cols; ++j) out[i * cols + j] += from[i * ldf + j];
    }
    // The group's sums into the results.
    void flush(const KalmanArgs& to) const {
        const KalmanArgs& a = c.a;
        const i64 nn = n * n;
        const i64 F = layout.F ? layout.moves : 1, Q = layout.E ? layout.moves : 1;
        const i64 H = layout.H ? layout.sees : 1, R = layout.RR ? layout.sees : 1;
        if (layout.moves > 0) {
            for (i64 k = 0; to.grad_F && k < F; ++k)
                add_rows(to.grad_F + ((a.F_g ? g * F : 0) + k) * nn, sums.F + k * layout.F, n, n, ld);
            for (i64 k = 0; to.grad_Q && k < Q; ++k)
                times_root(to.grad_Q + ((a.Q_g ? g * Q : 0) + k) * nn, sums.E + k * layout.E, ld,
                           a.Q + g * a.Q_g + k * a.Q_t, n);
        }
        for (i64 k = 0; to.grad_H && k < H; ++k)
            add_rows(to.grad_H + ((a.H_g ? g * H : 0) + k) * p * n, sums.H + k * layout.H, p, n, ld);
        for (i64 k = 0; to.grad_R && k < R; ++k)
            times_root(to.grad_R + ((a.R_g ? g * R : 0) + k) * p * p, sums.RR + k * layout.RR, p,
                       a.R + g * a.R_g + k * a.R_t, p);
    }
};

// One group without a tape: its filter runs again, into memory that stays near.
static void anew(KalmanArgs a, double* tape, void* threads) {
    a.tape = tape;
    const Context c(a);
    i64 failed;
    if (!Forward(c, 0).run(&failed, threads)) return;  // as the first time
    Backward pass(c, 0, a.grad_L);
    pass.run(threads);
    pass.flush(a);
}

// Groups in fixed chunks; what groups share is summed within a chunk, then over chunks in order.
static int backward_all(const Context& c) {
    const KalmanArgs& a = c.a;
    const i64 n = c.n, p = c.p, chunks = a.groups < 16 ? a.groups : 16;
    const i64 moves = c.times > 1 ? c.times - 1 : 0;
    struct Part { double* KalmanArgs::*field; bool shared; i64 count; };
    const Part parts[] = {
        {&KalmanArgs::grad_F, a.F_g == 0, (a.F_t ? moves : 1) * n * n}, {&KalmanArgs::grad_Q, a.Q_g == 0, (a.Q_t ? moves : 1) * n * n},
        {&KalmanArgs::grad_H, a.H_g == 0, (a.H_t ? a.seen : 1) * p * n}, {&KalmanArgs::grad_R, a.R_g == 0, (a.R_t ? a.seen : 1) * p * p},
        {&KalmanArgs::grad_L, a.L_g == 0, n * n},
    };
    Arena shared;
    std::vector<KalmanArgs> own((size_t)chunks, a);
    for (i64 k = 1; k < chunks; ++k)
        for (const Part& part : parts)
            if (a.*part.field && part.shared) own[(size_t)k].*part.field = shared.doubles(part.count);
    std::vector<char> no_memory((size_t)chunks, 0);
    auto work = [&](i64 begin, i64 end) {
        for (i64 k = begin; k < end; ++k) {
            try {
                Arena arena;
                double* tape = a.tape ? nullptr : arena.doubles(Context(group_of(a, 0)).tape_size());
                void* threads = a.groups == 1 ? a.parallel_for : nullptr;
                for (i64 g = a.groups * k / chunks; g < a.groups * (k + 1) / chunks; ++g) {
                    if (a.tape) {
                        Backward pass(c, g, own[(size_t)k].grad_L);
                        pass.run(threads);
                        pass.flush(own[(size_t)k]);
                    } else {
                        anew(group_of(own[(size_t)k], g), tape, threads);
                    }
                }
            } catch (const std::bad_alloc&) { no_memory[(size_t)k] = 1; }
        }
    };
    parallel(a.groups > 1 ? a.parallel_for : nullptr, chunks, 1, work);
    for (i64 k = 0; k < chunks; ++k) {
        if (no_memory[(size_t)k]) return KALMAN_NO_MEMORY;
        if (k)
            for (const Part& part : parts)
                if (a.*part.field && part.shared) add(a.*part.field, own[(size_t)k].*part.field, part.count);
    }
    return KALMAN_OK;
}
