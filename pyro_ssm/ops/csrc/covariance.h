// The covariance recursion of one group: it does not depend on the data, so it runs once for all series of the group.
//
//     P- = F P F' + Q Q',   S = H P- H' + R R',   W = S^{-1/2},   E = W H P-,   P = P- - E' E
//
// Where that subtraction cancels more than CAREFUL allows, or where it follows a nearly exact observation and the next P-
// turns out nearly singular, the step is done again in square roots, by orthogonal transformations that subtract nothing
// (Kailath, Sayed and Hassibi 2000, ch. 12), and the recursion stays with square roots until P- is well conditioned. A
// first law that dwarfs all noise is carried in roots from the start: the sums of a vague state differ by less than its
// variance shows.

constexpr double CAREFUL = 1e-7;
// The recursion stops where P- is within this of its limit, relative to the deviations of the states.
constexpr double SETTLED = 1e-12;
constexpr double EPS = 2.220446049250313e-16;

// Lower root of a positive semi-definite matrix; a pivot lost in rounding gives a zero column.
static void semidefinite_root(double* L, i64 ldl, const double* P, i64 n, i64 ld) {
    for (i64 j = 0; j < n; ++j) {
        double pivot = P[j * ld + j];
        for (i64 k = 0; k < j; ++k) pivot -= L[j * ldl + k] * L[j * ldl + k];
        const bool lost = pivot <= 4 * (double)n * EPS * P[j * ld + j] && pivot < HUGE_VAL;
        const double root = lost ? 0 : std::sqrt(pivot), inverse = lost ? 0 : 1 / root;
        for (i64 i = 0; i < j; ++i) L[i * ldl + j] = 0;
        L[j * ldl + j] = root;
        for (i64 i = j + 1; i < n; ++i) {
            double sum = P[i * ld + j];
            for (i64 k = 0; k < j; ++k) sum -= L[i * ldl + k] * L[j * ldl + k];
            L[i * ldl + j] = sum * inverse;
        }
    }
}

// A (rows x cols) becomes lower triangular, A A' unchanged, by Householder reflections from the right.
static void lower_triangular(double* A, i64 rows, i64 cols) {
    for (i64 k = 0; k < rows && k < cols; ++k) {
        double* row = A + k * cols;
        double largest = 0, square = 0;
        for (i64 j = k; j < cols; ++j) largest = std::fabs(row[j]) > largest ? std::fabs(row[j]) : largest;
        if (!(largest > 0)) continue;
        for (i64 j = k; j < cols; ++j) square += (row[j] / largest) * (row[j] / largest);
        const double norm = largest * std::sqrt(square);
        const double head = row[k] > 0 ? -norm : norm;
        for (i64 j = k; j < cols; ++j) row[j] /= norm;  // v / norm: what is left by rounding may be as small as 1e-300
        row[k] += row[k] > 0 ? 1 : -1;
        const double scale = 1 / std::fabs(row[k]);     // 2 / v'v
        for (i64 i = k + 1; i < rows; ++i) {
            double* other = A + i * cols;
            double sum = 0;
            for (i64 j = k; j < cols; ++j) sum += other[j] * row[j];
            sum *= scale;
            for (i64 j = k; j < cols; ++j) other[j] -= sum * row[j];
        }
        row[k] = head;
        for (i64 j = k + 1; j < cols; ++j) row[j] = 0;
        if (head < 0)
            for (i64 i = k; i < rows; ++i) A[i * cols + k] = -A[i * cols + k];
    }
}

// The matrices of one group at one time, in the shapes that the loops want.
struct System {
    const Context& c;
    const i64 g, ld;
    Left F;
    double *FT;      // F' (n x ld)
    double *QQ;      // Q Q' (n x ld)
    double *H;       // the rows seen (p x ld)
    double *RR;      // R R' of the rows seen (p x p)
    i64 *rows;       // which rows are seen
    i64 *found;      // scratch: those of the next time
    i64 q = -1;      // how many
    bool whole = false, moving = false;
    double *H_all, *RR_all;
    double *noise;   // pivots of RR: the variance of each row's noise given the rows above
    double *factor;

    System(const Context& context, i64 group, Arena& arena) : c(context), g(group), ld(context.ld) {
        F.start = arena.take<i64>(c.n + 1);
        F.column = arena.take<i64>(c.n * c.n);
        F.entry = arena.doubles(c.n * c.n);
        FT = arena.doubles(c.n * ld); QQ = arena.doubles(c.n * ld);
        H = arena.doubles(c.p * ld); H_all = arena.doubles(c.p * ld);
        RR = arena.doubles(c.p * c.p); RR_all = arena.doubles(c.p * c.p);
        noise = arena.doubles(c.p); factor = arena.doubles(c.p * c.p);
        rows = arena.take<i64>(c.p); found = arena.take<i64>(c.p);
    }
    const double* dense_F(i64 t) const { return c.a.F + g * c.a.F_g + (t - 1) * c.a.F_t; }
    // F and, for covariances, Q of the move into time t.
    void move(i64 t, bool covariances) {
        const KalmanArgs& a = c.a;
        if (!moving || a.F_t) {
            if (covariances) F.read(dense_F(t), c.n, 1, c.n);
            transpose(FT, dense_F(t), c.n, c.n, c.n, ld);
        }
        if (covariances && (!moving || a.Q_t)) gram(QQ, a.Q + g * a.Q_g + (t - 1) * a.Q_t, c.n, c.n, ld);
        moving = true;
    }
    // H and, for covariances, R R' of what is observed at time t.
    i64 observe(i64 t, bool covariances) {
        const KalmanArgs& a = c.a;
        const i64 s = c.seen_at[(size_t)t], p = c.p;
        if (whole && !a.mask && !a.H_t && !a.R_t) return s < 0 ? 0 : q;
        const i64 now = c.rows_seen(g, t, found);
        if (now == 0) return 0;
        const bool fresh = !whole;
        if (!fresh && !a.H_t && !a.R_t && now == q && !std::memcmp(found, rows, sizeof(i64) * (size_t)q)) return q;
        std::memcpy(rows, found, sizeof(i64) * (size_t)now);
        if (fresh || a.H_t) pad(H_all, a.H + g * a.H_g + s * a.H_t, p, c.n, ld);
        if (covariances && (fresh || a.R_t)) gram(RR_all, a.R + g * a.R_g + s * a.R_t, p, p, p);
        whole = true;
        q = now;
        for (i64 r = 0; r < q; ++r) {
            for (i64 j = 0; j < ld; ++j) H[r * ld + j] = H_all[rows[r] * ld + j];
            if (covariances)
                for (i64 k = 0; k < q; ++k) RR[r * p + k] = RR_all[rows[r] * p + rows[k]];
        }
        if (covariances) {
            semidefinite_root(factor, p, RR, q, p);
            for (i64 r = 0; r < q; ++r) noise[r] = factor[r * p + r] * factor[r * p + r];
        }
        return q;
    }
};

struct Covariances {
    const Context& c;
    System system;
    const i64 g, n, p, ld;
    double *P;            // the last filtered covariance
    double *T1, *T2, *B, *S, *root, *ahead, *array;
    bool sharp = false;   // the last update was by a nearly exact observation
    bool redone = false;  // the record of the time before was improved
    bool rooted = false;  // root is that of the last law, and better than its covariance
    bool rooted_ahead = false;  // the same of the predicted law of the last step, whose root is in ahead

    Covariances(const Context& context, i64 group, Arena& arena)
        : c(context), system(context, group, arena), g(group), n(context.n), p(context.p), ld(context.ld) {
        P = arena.doubles(n * ld);
        T1 = arena.doubles(n * ld); T2 = arena.doubles(n * ld);
        B = arena.doubles(p * ld);
        S = arena.doubles(p * p);
        root = arena.doubles(n * n); ahead = arena.doubles(n * n); array = arena.doubles((n + p) * (n + p > 2 * n ? n + p : 2 * n));
    }

    // The record of time t, whose law follows that of t - 1, in P; false where the innovation covariance is singular.
    bool step(i64 t, double* before, double* record) {
        double* Pp = record;
        const i64 width = ld;
        if (t == 0) {
            gram(Pp, c.a.L + g * c.a.L_g, n, n, width);
            for (i64 i = 0; i < n * n; ++i) root[i] = c.a.L[g * c.a.L_g + i];
        } else if (!c.moves(g, t)) {
            std::memcpy(Pp, P, sizeof(double) * (size_t)(n * width));
        } else if (rooted) {
            move_root(t);
            gram(Pp, root, n, n, width);
        } else {
            system.move(t, true);
            congruence(system.F, system.FT, Pp, T1, T2, P, ld);
            add(Pp, system.QQ, n * width);
        }
        for (i64 i = 0; i < n; ++i)
            if (!(Pp[i * width + i] < HUGE_VAL)) return false;
        redone = false;
        if (sharp && !rooted) {
            semidefinite_root(root, n, Pp, n, width);
            if (thin(Pp)) {
                system.observe(t - 1, true);
                if (!carefully(t - 1, before, (i64)before[c.at_rows])) return false;
                if (c.moves(g, t)) move_root(t);
                gram(Pp, root, n, n, width);
                redone = true;
            }
        }
        sharp = false;
        rooted_ahead = rooted;
        if (rooted)
            for (i64 i = 0; i < n * n; ++i) ahead[i] = root[i];
        const i64 q = system.observe(t, true);
        if (t == 0) rooted = vague(Pp, t, q);
        record[c.at_rows] = (double)q;
        record[c.at_constant] = record[c.at_exact] = 0;
        if (q == 0) {
            std::memcpy(P, Pp, sizeof(double) * (size_t)(n * width));
            return true;
        }
        if (!(rooted && (thin(Pp) || vague(Pp, t, q))) && update(record, q)) {
            rooted = false;
            return true;
        }
        return carefully(t, record, q);
    }
    // Whether P- = root root' is too near to singular to be worked with as a covariance.
    bool thin(const double* Pp) const {
        for (i64 i = 0; i < n; ++i)
            if (root[i * n + i] * root[i * n + i] < CAREFUL * Pp[i * ld + i]) return true;
        return false;
    }
    // Whether some state is so uncertain that all noise is rounding beside it.
    bool vague(const double* Pp, i64 t, i64 q) const {
        double most = 0, noise = 0;
        for (i64 i = 0; i < n; ++i) most = Pp[i * ld + i] > most ? Pp[i * ld + i] : most;
        for (i64 r = 0; r < q; ++r) noise = system.RR[r * p + r] > noise ? system.RR[r * p + r] : noise;
        if (c.times > 1) {
            const double* Q = c.a.Q + g * c.a.Q_g + (t > 0 ? t - 1 : 0) * c.a.Q_t;
            for (i64 i = 0; i < n; ++i) {
                double square = 0;
                for (i64 j = 0; j < n; ++j) square += Q[i * n + j] * Q[i * n + j];
                noise = square > noise ? square : noise;
            }
        }
        return noise < CAREFUL * most;
    }
    // [F L, Q] -> [L-, 0]
    void move_root(i64 t) {
        const KalmanArgs& a = c.a;
        const double *F = system.dense_F(t), *Q = a.Q + g * a.Q_g + (t - 1) * a.Q_t;
        for (i64 i = 0; i < n; ++i)
            for (i64 j = 0; j < n; ++j) {
                double sum = 0;
                for (i64 k = 0; k < n; ++k) sum += F[i * n + k] * root[k * n + j];
                array[i * 2 * n + j] = sum;
                array[i * 2 * n + n + j] = Q[i * n + j];
            }
        lower_triangular(array, n, 2 * n);
        for (i64 i = 0; i < n; ++i)
            for (i64 j = 0; j < n; ++j) root[i * n + j] = array[i * 2 * n + j];
    }

    // False where rounding may have hurt the result.
    bool update(double* record, i64 q) {
        const i64 width = ld;
        double *Pp = record, *E = record + c.at_E, *W = record + c.at_W;
        product<false>(B, system.H, width, 1, Pp, q, n, ld);  // B' = H P-
        for (i64 r = 0; r < q; ++r)
            for (i64 k = 0; k <= r; ++k) S[r * p + k] = dot(system.H + r * width, B + k * width, ld) + system.RR[r * p + k];
        double log_root = 0;
        for (i64 j = 0; j < q; ++j) {  // S = root root'
            double pivot = S[j * p + j];
            for (i64 k = 0; k < j; ++k) pivot -= S[j * p + k] * S[j * p + k];
            if (!(pivot > CAREFUL * S[j * p + j])) return false;
            sharp = sharp || system.noise[j] < CAREFUL * pivot;
            const double r = std::sqrt(pivot), inverse = 1 / r;
            log_root += std::log(r);
            S[j * p + j] = r;
            for (i64 i = j + 1; i < q; ++i) {
                double sum = S[i * p + j];
                for (i64 k = 0; k < j; ++k) sum -= S[i * p + k] * S[j * p + k];
                S[i * p + j] = sum * inverse;
            }
        }
        invert(W, q);
        for (i64 r = 0; r < q; ++r) {  // E = W H P-
            double* row = E + r * width;
            for (i64 j = 0; j < width; ++j) row[j] = W[r * p] * B[j];
            for (i64 k = 1; k <= r; ++k) add_row(row, W[r * p + k], B + k * width, ld);
        }
        for (i64 i = 0; i < q * width; ++i) B[i] = -E[i];
        std::memcpy(P, Pp, sizeof(double) * (size_t)(n * width));
        product<true>(P, B, 1, ld, E, n, q, ld);
        for (i64 i = 0; i < n; ++i)
            if (!(P[i * width + i] >= CAREFUL * Pp[i * width + i])) return false;
        record[c.at_constant] = -log_root - 0.5 * 1.8378770664093454836 * (double)q;
        return true;
    }
    // W = root^{-1} of the lower triangular root in S.
    void invert(double* W, i64 q) {
        for (i64 j = 0; j < q; ++j) {
            for (i64 i = 0; i < j; ++i) W[i * p + j] = 0;
            W[j * p + j] = 1 / S[j * p + j];
            for (i64 i = j + 1; i < q; ++i) {
                double sum = 0;
                for (i64 k = j; k < i; ++k) sum -= S[i * p + k] * W[k * p + j];
                W[i * p + j] = sum / S[i * p + i];
            }
        }
    }
    // [H L, R; L, 0] -> [S^{1/2}, 0; E, P^{1/2}]
    bool carefully(i64 t, double* record, i64 q) {
        const KalmanArgs& a = c.a;
        const i64 width = ld, cols = n + p, s = c.seen_at[(size_t)t];
        double *Pp = record, *E = record + c.at_E, *W = record + c.at_W;
        const double* R = a.R + g * a.R_g + s * a.R_t;
        if (t == 0) for (i64 i = 0; i < n * n; ++i) root[i] = a.L[g * a.L_g + i];
        else if (!rooted) semidefinite_root(root, n, Pp, n, width);
        for (i64 r = 0; r < q; ++r) {
            double* row = array + r * cols;
            for (i64 j = 0; j < n; ++j) {
                row[j] = 0;
                for (i64 k = 0; k < n; ++k) row[j] += system.H[r * width + k] * root[k * n + j];
            }
            for (i64 j = 0; j < p; ++j) row[n + j] = R[system.rows[r] * p + j];
            double square = 0;
            for (i64 j = 0; j < cols; ++j) square += row[j] * row[j];
            S[r * p + r] = std::sqrt(square);  // the deviation of this innovation
        }
        for (i64 i = 0; i < n; ++i) {
            for (i64 j = 0; j < n; ++j) array[(q + i) * cols + j] = root[i * n + j];
            for (i64 j = 0; j < p; ++j) array[(q + i) * cols + n + j] = 0;
        }
        lower_triangular(array, q + n, cols);
        double log_root = 0;
        for (i64 r = 0; r < q; ++r) {
            const double pivot = array[r * cols + r];
            if (!(pivot > (double)cols * EPS * S[r * p + r]) || !(pivot < HUGE_VAL)) return false;
            log_root += std::log(pivot);
        }
        for (i64 r = 0; r < q; ++r)
            for (i64 k = 0; k <= r; ++k) S[r * p + k] = array[r * cols + k];
        invert(W, q);
        for (i64 r = 0; r < q; ++r)
            for (i64 j = 0; j < width; ++j) E[r * width + j] = j < n ? array[(q + j) * cols + r] : 0;
        for (i64 i = 0; i < n; ++i)
            for (i64 j = 0; j < n; ++j) root[i * n + j] = q + j < cols ? array[(q + i) * cols + q + j] : 0;
        gram(P, root, n, n, width);
        record[c.at_exact] = 1;
        std::memcpy(record + c.at_P, P, sizeof(double) * (size_t)(n * width));
        rooted = true;
        record[c.at_constant] = -log_root - 0.5 * 1.8378770664093454836 * (double)q;
        return true;
    }
};

// How far apart two covariances are, entry by entry, relative to the deviations of the states.
static double distance(const double* A, const double* B, double* scale, i64 n, i64 ld) {
    double worst = 0;
    for (i64 i = 0; i < n; ++i) scale[i] = A[i * ld + i] > 0 ? 1 / std::sqrt(A[i * ld + i]) : 0;
    for (i64 i = 0; i < n; ++i)
        for (i64 j = 0; j <= i; ++j) {
            const double d = std::fabs(A[i * ld + j] - B[i * ld + j]) * scale[i] * scale[j];
            if (!(d <= worst)) worst = d;
        }
    return worst;
}
