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

// One series: weights and results next to each other, uniforms `stride` apart. To the places of each particle's offspring
// goes value(i): i itself, or something of the particle. Results have room for n + SPARE, sums for a number a block and
// one. A block's sums begin and end where the sums of whole blocks say: what rounding leaves over falls to its last
// particle of positive weight.
constexpr i64 SPARE = 8;
template <ResamplingScheme scheme, class T, class Out, class Value>
static void one_series(const T* w, const double* u, i64 stride, i64 n, double* bases, Out* out, Value value) {
    const i64 blocks = (n + BLOCK - 1) / BLOCK;
    bases[0] = 0;
    for (i64 b = 0; b < blocks; ++b)
        bases[b + 1] = bases[b] + block_total(w + b * BLOCK, n - b * BLOCK < BLOCK ? n - b * BLOCK : BLOCK);
    PointsBelow below(scheme, n, bases[blocks], u, stride);
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
            const Out found = value(at + i);
            Out* to = out + begin;
            for (int j = 0; j < SPARE; ++j) to[j] = found;  // the next particle overwrites what was too many
            for (i64 j = begin + SPARE; j < end; ++j) out[j] = found;
            begin = end;
        }
        if (begin == limit) continue;
        i64 last = num - 1;
        while (last > 0 && !(w[at + last] > 0)) --last;
        for (; begin < limit; ++begin) out[begin] = value(at + last);
    }
}

// weights (n, series), uniforms (rows, series); need (series), or null for all: where it is 0, a particle is its own
// ancestor. Results (n, series), with room for SPARE more: value(i, s) of the ancestors.
template <ResamplingScheme scheme, class T, class Out, class Value>
static void chosen_of(const T* w, const double* u, const uint8_t* need, i64 n, i64 series, Out* out, Value value) {
    std::unique_ptr<double[]> bases(new double[(size_t)(n / BLOCK + 2)]);
    if (series == 1 && (!need || need[0]))
        return one_series<scheme>(w, u, 1, n, bases.get(), out, [=](i64 i) { return value(i, 0); });
    std::unique_ptr<T[]> columns(new T[(size_t)(PIECES * n)]);
    std::unique_ptr<Out[]> lines(new Out[(size_t)(PIECES * n + SPARE)]);
    i64 which[PIECES], num = 0;
    for (i64 s = 0; s < series; ++s) {
        if (!need || need[s]) which[num++] = s;
        if (!num || (num < PIECES && s < series - 1)) continue;
        for (i64 i = 0; i < n; ++i)
            for (i64 c = 0; c < num; ++c) columns[c * n + i] = w[i * series + which[c]];
        for (i64 c = 0; c < num; ++c)  // in this order: each writes a little into the next
            one_series<scheme>(columns.get() + c * n, u + which[c], series, n, bases.get(), lines.get() + c * n,
                               [=, s = which[c]](i64 i) { return value(i, s); });
        for (i64 i = 0; i < n; ++i)
            for (i64 c = 0; c < num; ++c) out[i * series + which[c]] = lines[c * n + i];
        num = 0;
    }
    for (i64 s = 0; need && s < series; ++s)
        for (i64 i = 0; !need[s] && i < n; ++i) out[i * series + s] = value(i, s);
}
template <class T, class Out, class Value>
static void chosen_by(i64 scheme, const T* w, const double* u, const uint8_t* need, i64 n, i64 series, Out* out, Value value) {
    if (scheme == SYSTEMATIC) chosen_of<SYSTEMATIC>(w, u, need, n, series, out, value);
    if (scheme == STRATIFIED) chosen_of<STRATIFIED>(w, u, need, n, series, out, value);
    if (scheme == POINTS) chosen_of<POINTS>(w, u, need, n, series, out, value);
}
template <class T>
static int ancestors(i64 scheme, const T* w, const double* u, const uint8_t* need, i64 n, i64 series, i64* out) {
    try {
        std::unique_ptr<int32_t[]> found(new int32_t[(size_t)(n * series + SPARE)]);
        chosen_by(scheme, w, u, need, n, series, found.get(), [](i64 i, i64) { return (int32_t)i; });
        for (i64 i = 0; i < n * series; ++i) out[i] = found[i];
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
