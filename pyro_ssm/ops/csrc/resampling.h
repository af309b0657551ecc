// Resampling: from weights and uniforms to ancestors, the arithmetic of pyro_ssm/ops/resampling.py in double.
//
// A pass over the weights finds the sums of blocks, a second one sums within them and writes ancestors as it goes.

// How many of n points of a series fall on its particles up to one, from the sum of the weights up to it.
class PointsBelow {
    ResamplingScheme scheme;
    i64 n, stride, passed = 0;
    double most, total, scale;
    const double* u;
    static constexpr double ONE_UP = 1.0 + 8.8817841970012523e-16;  // 1 + 2^-50: the last one reaches n despite rounding

    int32_t whole(double x) const { return (int32_t)(x > 0 ? (x < most ? x : most) : 0.0); }  // also of NaN

  public:
    PointsBelow() : scheme(SYSTEMATIC), n(0), stride(0), most(0), total(0), scale(0), u(nullptr) {}
    PointsBelow(ResamplingScheme s, i64 num, double sum, const double* uniforms, i64 series)
        : scheme(s), n(num), stride(series), most((double)num), total(sum), scale(most * ONE_UP / sum), u(uniforms) {}

    template <ResamplingScheme scheme> int32_t upto(double sum) {
        if (scheme == SYSTEMATIC) return whole(u[0] + sum * scale);
        if (scheme == STRATIFIED) {
            const double reached = sum * scale;
            const int32_t stratum = whole(reached);
            return stratum + (u[(stratum < n ? stratum : n - 1) * stride] < reached - (double)stratum);
        }
        const double share = sum / total * ONE_UP;
        while (passed < n && u[passed * stride] < share) ++passed;
        return (int32_t)passed;
    }
};

// Writes particle i to places [begin, end) of n; four at once in the usual case, as the next particle overwrites what was
// too many.
template <class Index> static inline void place(Index* out, i64 n, i64 begin, i64 end, i64 i) {
    if (begin + 4 <= n) {
        Index* to = out + begin;
        to[0] = to[1] = to[2] = to[3] = (Index)i;
        begin += 4;
    }
    for (; begin < end; ++begin) out[begin] = (Index)i;
}

// The sums of a block of weights, each from `base` on, in PIECES pieces side by side, as an addition waits for the one
// before it; joined so that they never descend.
constexpr i64 PIECES = 8, PIECE = 64, BLOCK = PIECES * PIECE;
template <class T> static inline void block_sums(const T* w, i64 num, double base, double* sums) {
    if (num < BLOCK) {
        for (i64 i = 0; i < num; ++i) sums[i] = base += (double)w[i];
        return;
    }
    double running[PIECES] = {};
    for (i64 i = 0; i < PIECE; ++i)
        for (i64 p = 0; p < PIECES; ++p) sums[p * PIECE + i] = running[p] += (double)w[p * PIECE + i];
    for (i64 p = 0; p < PIECES; ++p) {
        for (i64 i = 0; i < PIECE; ++i) sums[p * PIECE + i] += base;
        base = sums[p * PIECE + PIECE - 1];
    }
}
template <class T> static inline double block_total(const T* w, i64 num) {
    constexpr int WIDE = 16;
    double sum[WIDE] = {}, total = 0;
    i64 i = 0;
    for (; i + WIDE <= num; i += WIDE)
        for (int l = 0; l < WIDE; ++l) sum[l] += (double)w[i + l];
    for (; i < num; ++i) total += (double)w[i];
    for (int l = 0; l < WIDE; ++l) total += sum[l];
    return total;
}

// One series: weights and ancestors next to each other; ancestors have room for n + SPARE, sums for a number a block and
// one. A block's sums begin and end where the sums of whole blocks say: what rounding leaves over falls to its last
// particle of positive weight.
constexpr i64 SPARE = 4;
template <ResamplingScheme scheme, class T>
static void one_series(const T* w, const double* u, i64 n, double* bases, int32_t* out) {
    const i64 blocks = (n + BLOCK - 1) / BLOCK;
    bases[0] = 0;
    for (i64 b = 0; b < blocks; ++b)
        bases[b + 1] = bases[b] + block_total(w + b * BLOCK, n - b * BLOCK < BLOCK ? n - b * BLOCK : BLOCK);
    PointsBelow below(scheme, n, bases[blocks], u, 1);
    double sums[BLOCK];
    int32_t ends[BLOCK];
    i64 begin = 0;
    for (i64 b = 0; b < blocks; ++b) {
        const i64 at = b * BLOCK, num = n - at < BLOCK ? n - at : BLOCK;
        block_sums(w + at, num, bases[b], sums);
        for (i64 i = 0; i < num; ++i) ends[i] = below.upto<scheme>(sums[i]);
        const i64 limit = b == blocks - 1 ? n : below.upto<scheme>(bases[b + 1]);  // also of NaN
        for (i64 i = 0; i < num; ++i) {
            const i64 end = ends[i] < limit ? ends[i] : limit;
            int32_t* to = out + begin;
            to[0] = to[1] = to[2] = to[3] = (int32_t)(at + i);  // the next particle overwrites what was too many
            for (i64 j = begin + 4; j < end; ++j) out[j] = (int32_t)(at + i);
            begin = end;
        }
        if (begin == limit) continue;
        i64 last = num - 1;
        while (last > 0 && !(w[at + last] > 0)) --last;
        for (; begin < limit; ++begin) out[begin] = (int32_t)(at + last);
    }
}

// Up to PIECES series out of many, side by side: their weights and ancestors stand in columns.
template <ResamplingScheme scheme, class T, class Index>
static void some_series(const T* w, const double* u, i64 n, i64 stride, const i64* which, i64 num, int32_t* lines,
                        Index* out) {
    double total[PIECES] = {}, sum[PIECES] = {};
    i64 begin[PIECES] = {};
    PointsBelow below[PIECES];
    for (i64 i = 0; i < n; ++i)
        for (i64 s = 0; s < num; ++s) total[s] += (double)w[i * stride + which[s]];
    for (i64 s = 0; s < num; ++s) below[s] = PointsBelow(scheme, n, total[s], u + which[s], stride);
    for (i64 i = 0; i < n; ++i)
        for (i64 s = 0; s < num; ++s) {
            sum[s] += (double)w[i * stride + which[s]];
            const i64 found = below[s].template upto<scheme>(sum[s]), end = i == n - 1 ? n : found;
            place(lines + s * n, n, begin[s], end, i);
            begin[s] = end > begin[s] ? end : begin[s];
        }
    for (i64 i = 0; i < n; ++i)
        for (i64 s = 0; s < num; ++s) out[i * stride + which[s]] = (Index)lines[s * n + i];
}

// weights and ancestors (n, series), uniforms (rows, series); need (series), or null for all: where it is 0, a particle is
// its own ancestor. Ancestors of 4 bytes have room for SPARE more.
template <ResamplingScheme scheme, class T, class Index>
static void ancestors_of(const T* w, const double* u, const uint8_t* need, i64 n, i64 series, Index* out) {
    if (series == 1 && (!need || need[0])) {
        std::unique_ptr<double[]> bases(new double[(size_t)(n / BLOCK + 2)]);
        if constexpr (sizeof(Index) == sizeof(int32_t)) return one_series<scheme>(w, u, n, bases.get(), (int32_t*)out);
        std::unique_ptr<int32_t[]> line(new int32_t[(size_t)(n + SPARE)]);
        one_series<scheme>(w, u, n, bases.get(), line.get());
        for (i64 i = 0; i < n; ++i) out[i] = (Index)line[i];
        return;
    }
    if (need)
        for (i64 i = 0; i < n; ++i)
            for (i64 s = 0; s < series; ++s) out[i * series + s] = (Index)i;
    std::unique_ptr<int32_t[]> lines(new int32_t[(size_t)(PIECES * n)]);
    i64 which[PIECES], num = 0;
    for (i64 s = 0; s < series; ++s) {
        if (!need || need[s]) which[num++] = s;
        if (num && (num == PIECES || s == series - 1)) {
            some_series<scheme>(w, u, n, series, which, num, lines.get(), out);
            num = 0;
        }
    }
}
template <class T, class Index>
static int ancestors(i64 scheme, const T* w, const double* u, const uint8_t* need, i64 n, i64 series, Index* out) {
    try {
        if (scheme == SYSTEMATIC) ancestors_of<SYSTEMATIC>(w, u, need, n, series, out);
        if (scheme == STRATIFIED) ancestors_of<STRATIFIED>(w, u, need, n, series, out);
        if (scheme == POINTS) ancestors_of<POINTS>(w, u, need, n, series, out);
    } catch (const std::bad_alloc&) { return 1; }
    return 0;
}

// Counts (series, n) that ascend and end in n.
static inline void ancestors_of_counts(const i64* upto, i64 n, i64 series, i64* out) {
    for (i64 s = 0; s < series; ++s, upto += n, out += n)
        for (i64 i = 0, begin = 0; i < n; ++i) {
            const i64 end = upto[i] < n ? upto[i] : n;
            place(out, n, begin, end, i);
            begin = end > begin ? end : begin;
        }
}

// Particles of `bytes` bytes: out (rows, series) from x (n, series) at ancestors (rows, series); 1 where one is out of range.
template <i64 size>
static int take_ancestors(const char* x, const i64* at, i64 n, i64 rows, i64 series, i64 bytes, char* out) {
    const i64 step = size ? size : bytes;
    for (i64 r = 0; r < rows; ++r)
        for (i64 s = 0; s < series; ++s, ++at, out += step) {
            if ((uint64_t)*at >= (uint64_t)n) return 1;
            std::memcpy(out, x + (*at * series + s) * step, (size_t)step);
        }
    return 0;
}
static int take(const char* x, const i64* at, i64 n, i64 rows, i64 series, i64 bytes, char* out) {
    if (bytes == 4) return take_ancestors<4>(x, at, n, rows, series, bytes, out);
    if (bytes == 8) return take_ancestors<8>(x, at, n, rows, series, bytes, out);
    return take_ancestors<0>(x, at, n, rows, series, bytes, out);
}
