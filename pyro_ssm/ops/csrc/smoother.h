// Backwards over what a filter left, in square roots: the laws of each state given the next, and the smoothed laws.

// The lower-triangular root of A A' in the place of a rows x cols array A, by Householder reflections of its rows. Rows
// are padded with zeros to ld >= cols + 7.
static void lower_root(double* A, i64 rows, i64 cols, i64 ld) {
    for (i64 i = 0; i < rows && i < cols; ++i) {
        double* v = A + i * ld + i;
        const i64 length = (cols - i + 3) / 4 * 4;
        const double square = dot(v, v, length), head = v[0];
        if (square == 0) continue;
        const double norm = std::sqrt(square), sign = head < 0 ? 1 : -1, factor = 1 / (square + std::fabs(head) * norm);
        v[0] = head - sign * norm;
        for (i64 r = i + 1; r < rows; ++r) {
            double* row = A + r * ld + i;
            add_row(row, -factor * dot(row, v, length), v, length);
            row[0] *= sign;
        }
        v[0] = norm;
        for (i64 j = 1; j < cols - i; ++j) v[j] = 0;
    }
}

static i64 padded(i64 cols) { return (cols + 3) / 4 * 4 + 8; }

static const double* at(const Sequence& s, i64 row, i64 k) { return s.data + s.of[row] * s.stride + k * s.step; }

// Rows `begin` to `end`: [[F L, Q], [L, 0]] -> [[S, 0], [K, D]], G = K S^{-1}. False where S is singular.
static bool conditionals_of(const BackwardArgs& a, i64 begin, i64 end) {
    const i64 n = a.n, ld = padded(2 * n), size = n * n;
    const double smallest = 2.220446049250313e-16 * (double)n;
    Arena arena;
    double* A = arena.doubles(2 * n * ld);
    for (i64 g = begin; g < end; ++g)
        for (i64 k = 0; k < a.moves; ++k) {
            const double *F = at(a.first, g, k), *Q = at(a.second, g, k), *L = at(a.third, g, k);
            double *G = a.out + (g * a.moves + k) * size, *D = a.out_root + (g * a.moves + k) * size;
            if (k > 0 && !a.first.step && !a.second.step && !std::memcmp(L, L - a.third.step, sizeof(double) * size)) {
                std::memcpy(G, G - size, sizeof(double) * size);
                std::memcpy(D, D - size, sizeof(double) * size);
                continue;
            }
            for (i64 i = 0; i < n; ++i) {
                double *upper = A + i * ld, *lower = A + (n + i) * ld;
                for (i64 j = 0; j < ld; ++j) upper[j] = lower[j] = 0;
                for (i64 l = 0; l < n; ++l) {
                    const double f = F[i * n + l];
                    if (f != 0)
                        for (i64 j = 0; j < n; ++j) upper[j] += f * L[l * n + j];
                }
                for (i64 j = 0; j < n; ++j) { upper[n + j] = Q[i * n + j]; lower[j] = L[i * n + j]; }
            }
            lower_root(A, 2 * n, 2 * n, ld);
            for (i64 j = 0; j < n; ++j) {
                double square = 0;
                for (i64 i = 0; i <= j; ++i) square += A[j * ld + i] * A[j * ld + i];
                if (!(A[j * ld + j] > smallest * std::sqrt(square))) return false;
            }
            for (i64 r = 0; r < n; ++r) {
                double* K = A + (n + r) * ld;
                for (i64 j = n - 1; j >= 0; --j) {
                    const double* S = A + j * ld;
                    const double x = K[j] / S[j];
                    for (i64 i = 0; i < j; ++i) K[i] -= x * S[i];
                    G[r * n + j] = x;
                }
                for (i64 j = 0; j < n; ++j) D[r * n + j] = j <= r ? K[n + j] : 0;
            }
        }
    return true;
}

// Rows `begin` to `end`: the root of D D' + G L L' G', back from the last L.
static void roots_of(const BackwardArgs& a, i64 begin, i64 end) {
    const i64 n = a.n, ld = padded(2 * n), size = n * n;
    Arena arena;
    double* A = arena.doubles(n * ld);
    for (i64 g = begin; g < end; ++g) {
        double* L = a.out + (g * (a.moves + 1) + a.moves) * size;
        std::memcpy(L, at(a.third, g, 0), sizeof(double) * size);
        for (i64 k = a.moves - 1; k >= 0; --k, L -= size) {
            const double *G = at(a.first, g, k), *D = at(a.second, g, k);
            for (i64 i = 0; i < n; ++i) {
                double* row = A + i * ld;
                for (i64 j = 0; j < ld; ++j) row[j] = 0;
                for (i64 l = 0; l < n; ++l) {
                    const double x = G[i * n + l];
                    if (x != 0)
                        for (i64 j = 0; j < n; ++j) row[j] += x * L[l * n + j];
                }
                for (i64 j = 0; j < n; ++j) row[n + j] = D[i * n + j];
            }
            lower_root(A, n, 2 * n, ld);
            for (i64 i = 0; i < n; ++i)
                for (i64 j = 0; j < n; ++j) (L - size)[i * n + j] = A[i * ld + j];
        }
    }
}

// Rows `begin` to `end`: x_k = G x_{k+1} + c, back from the last x.
static void recurrence_of(const BackwardArgs& a, i64 begin, i64 end) {
    const i64 n = a.n;
    for (i64 g = begin; g < end; ++g) {
        double* x = a.out + (g * (a.moves + 1) + a.moves) * n;
        std::memcpy(x, at(a.third, g, 0), sizeof(double) * n);
        for (i64 k = a.moves - 1; k >= 0; --k, x -= n) {
            const double *G = at(a.first, g, k), *c = at(a.second, g, k);
            for (i64 i = 0; i < n; ++i) {
                double sum = c[i];
                for (i64 j = 0; j < n; ++j) sum += G[i * n + j] * x[j];
                (x - n)[i] = sum;
            }
        }
    }
}

static int backwards(const BackwardArgs& a) {
    char* failed = (char*)std::calloc((size_t)(a.rows > 0 ? a.rows : 1), 1);  // 1: singular, 2: no memory
    if (!failed) return KALMAN_NO_MEMORY;
    auto work = [&](i64 begin, i64 end) {
        try {
            if (a.what == 0 && !conditionals_of(a, begin, end)) failed[begin] = 1;
            if (a.what == 1) roots_of(a, begin, end);
            if (a.what == 2) recurrence_of(a, begin, end);
        } catch (const std::bad_alloc&) { failed[begin] = 2; }
    };
    parallel(a.n * a.n * a.moves > 512 ? a.parallel_for : nullptr, a.rows, 4, work);
    int status = KALMAN_OK;
    for (i64 g = 0; g < a.rows; ++g)
        if (failed[g]) status = failed[g] == 1 ? KALMAN_SINGULAR : KALMAN_NO_MEMORY;
    std::free(failed);
    return status;
}
