// Small dense matrices, row by row, rows padded with zeros to `ld` columns (4, 8, 16 or a multiple of 8).
//
// Included once for each instruction set, inside a namespace of its own, after every system header: code for one
// processor must not leak into functions that the linker shares. PYRO_SSM_WIDTH is the number of doubles in a register.

#if defined(_MSC_VER)
#define INLINE static __forceinline
#else
#define INLINE static inline __attribute__((always_inline))
#endif

#if defined(__GNUC__) && PYRO_SSM_WIDTH > 1
template <int W> struct Lanes;
template <> struct Lanes<2> { typedef double type __attribute__((vector_size(16), aligned(8), may_alias)); };
template <> struct Lanes<4> { typedef double type __attribute__((vector_size(32), aligned(8), may_alias)); };
template <> struct Lanes<8> { typedef double type __attribute__((vector_size(64), aligned(8), may_alias)); };
#else
template <int W> struct Lanes { typedef double type; };
#endif

template <int N> struct Width {
    static constexpr int value = N < PYRO_SSM_WIDTH ? N : PYRO_SSM_WIDTH;
    typedef typename Lanes<value>::type vec;
};

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define UNROLL _Pragma("GCC unroll 16")
#else
#define UNROLL
#endif

// Ask for memory that is read soon: processors do not foresee who walks back in time.
INLINE void fetch(const double* x, i64 count) {
#if defined(__GNUC__)
    for (i64 j = 0; j < count; j += 8) __builtin_prefetch(x + j);
#else
    (void)x; (void)count;
#endif
}

// MR x NR block of C (+)= A B; A(i, k) = A[i * ai + k * ak].
template <int MR, int NR, bool ADD>
INLINE void block(double* C, i64 ldc, const double* A, i64 ai, i64 ak, const double* B, i64 ldb, i64 K) {
    constexpr int W = Width<NR>::value, NV = NR / W;
    typedef typename Width<NR>::vec vec;
    vec acc[MR][NV];
    UNROLL for (int i = 0; i < MR; ++i)
        UNROLL for (int j = 0; j < NV; ++j) acc[i][j] = ADD ? *(const vec*)(C + i * ldc + j * W) : vec{} ;
    for (i64 k = 0; k < K; ++k) {
        UNROLL for (int i = 0; i < MR; ++i) {
            const double a = A[i * ai + k * ak];
            UNROLL for (int j = 0; j < NV; ++j) acc[i][j] += a * *(const vec*)(B + k * ldb + j * W);
        }
    }
    UNROLL for (int i = 0; i < MR; ++i)
        UNROLL for (int j = 0; j < NV; ++j) *(vec*)(C + i * ldc + j * W) = acc[i][j];
}

// One row of C (+)= A B in four chains of sums: one alone would wait for each of its additions.
template <int NR, bool ADD>
INLINE void row(double* C, const double* A, i64 ak, const double* B, i64 ldb, i64 K) {
    constexpr int W = Width<NR>::value, NV = NR / W, CHAINS = 4;
    typedef typename Width<NR>::vec vec;
    vec acc[CHAINS][NV];
    UNROLL for (int c = 0; c < CHAINS; ++c)
        UNROLL for (int j = 0; j < NV; ++j) acc[c][j] = ADD && c == 0 ? *(const vec*)(C + j * W) : vec{};
    i64 k = 0;
    for (; k + CHAINS <= K; k += CHAINS)
        UNROLL for (int c = 0; c < CHAINS; ++c) {
            const double a = A[(k + c) * ak];
            UNROLL for (int j = 0; j < NV; ++j) acc[c][j] += a * *(const vec*)(B + (k + c) * ldb + j * W);
        }
    for (; k < K; ++k) {
        const double a = A[k * ak];
        UNROLL for (int j = 0; j < NV; ++j) acc[0][j] += a * *(const vec*)(B + k * ldb + j * W);
    }
    UNROLL for (int j = 0; j < NV; ++j) *(vec*)(C + j * W) = (acc[0][j] + acc[1][j]) + (acc[2][j] + acc[3][j]);
}

template <int NR, bool ADD>
static void columns(double* C, i64 ldc, const double* A, i64 ai, i64 ak, const double* B, i64 ldb, i64 M, i64 K) {
    constexpr int NV = NR / Width<NR>::value;
    i64 i = 0;
    if (NV == 1)
        for (; i + 8 <= M; i += 8) block<8, NR, ADD>(C + i * ldc, ldc, A + i * ai, ai, ak, B, ldb, K);
    for (; i + 4 <= M; i += 4) block<4, NR, ADD>(C + i * ldc, ldc, A + i * ai, ai, ak, B, ldb, K);
    for (; i + 2 <= M; i += 2) block<2, NR, ADD>(C + i * ldc, ldc, A + i * ai, ai, ak, B, ldb, K);
    for (; i < M; ++i) row<NR, ADD>(C + i * ldc, A + i * ai, ak, B, ldb, K);
}

// C (+)= A B for C of M x ld, B of K x ld.
template <bool ADD>
static void product(double* C, const double* A, i64 ai, i64 ak, const double* B, i64 M, i64 K, i64 ld) {
    if (ld == 4) { columns<4, ADD>(C, 4, A, ai, ak, B, 4, M, K); return; }
    i64 j = 0;
    for (; j + 16 <= ld; j += 16) columns<16, ADD>(C + j, ld, A, ai, ak, B + j, ld, M, K);
    for (; j < ld; j += 8) columns<8, ADD>(C + j, ld, A, ai, ak, B + j, ld, M, K);
}

// One row += a x.
INLINE void add_row(double* y, double a, const double* x, i64 ld) {
    if (ld == 4) {
        constexpr int W = Width<4>::value;
        typedef typename Width<4>::vec vec;
        UNROLL for (int j = 0; j < 4; j += W) *(vec*)(y + j) += a * *(const vec*)(x + j);
        return;
    }
    constexpr int W = Width<8>::value;
    typedef typename Width<8>::vec vec;
    for (i64 j = 0; j < ld; j += 8)
        UNROLL for (int l = 0; l < 8; l += W) *(vec*)(y + j + l) += a * *(const vec*)(x + j + l);
}

INLINE double dot(const double* __restrict x, const double* __restrict y, i64 ld) {
    constexpr int W = Width<4>::value, NV = 4 / W;
    typedef typename Width<4>::vec vec;
    vec acc[NV];
    UNROLL for (int v = 0; v < NV; ++v) acc[v] = vec{};
    for (i64 j = 0; j < ld; j += 4)
        UNROLL for (int v = 0; v < NV; ++v) acc[v] += *(const vec*)(x + j + v * W) * *(const vec*)(y + j + v * W);
    double part[4];
    UNROLL for (int v = 0; v < NV; ++v) *(vec*)(part + v * W) = acc[v];
    return (part[0] + part[2]) + (part[1] + part[3]);
}

INLINE void copy(double* to, const double* from, i64 count) { std::memcpy(to, from, sizeof(double) * (size_t)count); }
INLINE void clear(double* to, i64 count) { std::memset(to, 0, sizeof(double) * (size_t)count); }

INLINE void add(double* __restrict to, const double* __restrict from, i64 count) {
    for (i64 i = 0; i < count; ++i) to[i] += from[i];
}

static void transpose(double* __restrict out, const double* __restrict in, i64 rows, i64 cols, i64 ld_in, i64 ld_out) {
    for (i64 i = 0; i < rows; ++i)
        for (i64 j = 0; j < cols; ++j) out[j * ld_out + i] = in[i * ld_in + j];
}

// T = X' for an n x ld matrix and its n x ld transpose.
static void transpose_square(double* __restrict T, const double* __restrict X, i64 n, i64 ld) {
#if PYRO_SSM_WIDTH >= 4 && (defined(__clang__) || __GNUC__ >= 12)
    typedef typename Lanes<4>::type vec;
    for (i64 i = 0; i < n; i += 4)
        for (i64 j = 0; j < n; j += 4) {  // 4 x 4 in registers
            vec r[4];
            UNROLL for (int k = 0; k < 4; ++k) r[k] = i + k < n ? *(const vec*)(X + (i + k) * ld + j) : vec{};
            const vec a = __builtin_shufflevector(r[0], r[1], 0, 4, 2, 6), b = __builtin_shufflevector(r[0], r[1], 1, 5, 3, 7),
                      c = __builtin_shufflevector(r[2], r[3], 0, 4, 2, 6), d = __builtin_shufflevector(r[2], r[3], 1, 5, 3, 7);
            double* out = T + j * ld + i;
            *(vec*)out = __builtin_shufflevector(a, c, 0, 1, 4, 5);
            if (j + 1 < n) *(vec*)(out + ld) = __builtin_shufflevector(b, d, 0, 1, 4, 5);
            if (j + 2 < n) *(vec*)(out + 2 * ld) = __builtin_shufflevector(a, c, 2, 3, 6, 7);
            if (j + 3 < n) *(vec*)(out + 3 * ld) = __builtin_shufflevector(b, d, 2, 3, 6, 7);
        }
#else
    transpose(T, X, n, n, ld, ld);
#endif
}

// Both triangles of the n x ld matrix X become its symmetric part; T is scratch.
static void symmetrise(double* X, double* T, i64 n, i64 ld) {
    constexpr int W = Width<4>::value;
    typedef typename Width<4>::vec vec;
    transpose_square(T, X, n, ld);
    for (i64 i = 0; i < n * ld; i += W) *(vec*)(X + i) = 0.5 * (*(const vec*)(X + i) + *(const vec*)(T + i));
}

// rows x cols, contiguous, into rows padded with zeros.
static void pad(double* out, const double* in, i64 rows, i64 cols, i64 ld) {
    for (i64 i = 0; i < rows; ++i) {
        for (i64 j = 0; j < cols; ++j) out[i * ld + j] = in[i * cols + j];
        for (i64 j = cols; j < ld; ++j) out[i * ld + j] = 0;
    }
}

// C = A A' for a rows x cols root, contiguous; zeros of A cost nothing.
static void gram(double* C, const double* A, i64 rows, i64 cols, i64 ld) {
    for (i64 i = 0; i < rows * ld; ++i) C[i] = 0;
    for (i64 k = 0; k < cols; ++k)
        for (i64 i = 0; i < rows; ++i) {
            const double a = A[i * cols + k];
            if (a != 0)
                for (i64 j = 0; j <= i; ++j) C[i * ld + j] += a * A[j * cols + k];
        }
    for (i64 i = 0; i < rows; ++i)
        for (i64 j = 0; j < i; ++j) C[j * ld + i] = C[i * ld + j];
}

// A square matrix as a left factor: dense, or by its nonzero entries where they are few.
struct Left {
    const double* dense;  // row i at dense + i * ai, entry k at + k * ak
    i64 ai, ak, n;
    bool sparse;
    i64* start;   // n + 1
    i64* column;  // n * n
    double* entry;

    void read(const double* A, i64 row, i64 col, i64 size) {
        dense = A; ai = row; ak = col; n = size; sparse = false;
        if (n < 6) return;
        i64 count = 0;
        for (i64 i = 0; i < n; ++i) {
            start[i] = count;
            for (i64 k = 0; k < n; ++k) {
                const double a = A[i * row + k * col];
                if (a != 0) {
                    if (3 * (count + 1) > n * n) return;
                    column[count] = k; entry[count++] = a;
                }
            }
        }
        start[n] = count;
        sparse = true;
    }
};

static void left_times(const Left& A, double* C, const double* B, i64 ld) {
    if (!A.sparse) { product<false>(C, A.dense, A.ai, A.ak, B, A.n, A.n, ld); return; }
    constexpr int W = Width<8>::value;
    typedef typename Width<8>::vec vec;
    for (i64 i = 0; i < A.n; ++i)  // n > 5: ld is a multiple of 8
        for (i64 j = 0; j < ld; j += W) {
            vec sum = vec{};
            for (i64 e = A.start[i]; e < A.start[i + 1]; ++e) sum += A.entry[e] * *(const vec*)(B + A.column[e] * ld + j);
            *(vec*)(C + i * ld + j) = sum;
        }
}

// X = A P A' for a symmetric P, by way of AP = A P, which is kept; AT is A', T is scratch. All n x ld; beyond column n
// T must be zero.
static void congruence(const Left& A, const double* AT, double* X, double* AP, double* T, const double* P, i64 ld) {
    left_times(A, AP, P, ld);
    if (A.sparse) {
        transpose_square(T, AP, A.n, ld);
        left_times(A, X, T, ld);
    } else {
        product<false>(X, AP, ld, 1, AT, A.n, A.n, ld);
    }
    symmetrise(X, T, A.n, ld);
}
