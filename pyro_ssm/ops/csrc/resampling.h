// Resampling: from weights and uniforms to ancestors, the arithmetic of pyro_ssm/ops/resampling.py in double.
//
// A pass over the weights finds the total, a second one sums again and writes ancestors as it goes: nothing is stored.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>

typedef int64_t i64;

enum ResamplingScheme { SYSTEMATIC = 0, STRATIFIED = 1, POINTS = 2 };

// How many of n points of a series fall on its particles up to one, from the sum of the weights up to it.
class PointsBelow {
    ResamplingScheme scheme;
    i64 n, stride, passed = 0;
    double most, total, scale;
    const double* u;
    static constexpr double ONE_UP = 1.0 + 8.8817841970012523e-16;  // 1 + 2^-50: the last one reaches n despite rounding

    i64 whole(double x) const { return (i64)(x > 0 ? (x < most ? x : most) : 0.0); }  // also of NaN

  public:
    PointsBelow() : scheme(SYSTEMATIC), n(0), stride(0), most(0), total(0), scale(0), u(nullptr) {}
    PointsBelow(ResamplingScheme s, i64 num, double sum, const double* uniforms, i64 series)
        : scheme(s), n(num), stride(series), most((double)num), total(sum), scale(most * ONE_UP / sum), u(uniforms) {}

    template <ResamplingScheme scheme> i64 upto(double sum) {
        if (scheme == SYSTEMATIC) return whole(u[0] + sum * scale);
        if (scheme == STRATIFIED) {
            const double reached = sum * scale;
            const i64 stratum = whole(reached);
            return stratum + (u[(stratum < n ? stratum : n - 1) * stride] < reached - (double)stratum);
        }
        const double share = sum / total * ONE_UP;
        while (passed < n && u[passed * stride] < share) ++passed;
        return passed;
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
// before it; joined so that they never descend. Returns the last.
constexpr i64 PIECES = 8, PIECE = 64;
template <class T> static inline double block_sums(const T* w, i64 num, double base, double* sums) {
    if (num < PIECES * PIECE) {
        for (i64 i = 0; i < num; ++i) sums[i] = base += (double)w[i];
        return base;
    }
    double running[PIECES] = {};
    for (i64 i = 0; i < PIECE; ++i)
        for (i64 p = 0; p < PIECES; ++p) sums[p * PIECE + i] = running[p] += (double)w[p * PIECE + i];
    for (i64 p = 0; p < PIECES; ++p) {
        for (i64 i = 0; i < PIECE; ++i) sums[p * PIECE + i] += base;
        base = sums[p * PIECE + PIECE - 1];
    }
    return base;
}

// One series: weights and ancestors next to each other.
template <ResamplingScheme scheme, class T> static void one_series(const T* w, const double* u, i64 n, i64* out) {
    constexpr i64 BLOCK = PIECES * PIECE;
    double sums[BLOCK], total = 0, base = 0;
    for (i64 at = 0; at < n; at += BLOCK) total = block_sums(w + at, n - at < BLOCK ? n - at : BLOCK, total, sums);
    PointsBelow below(scheme, n, total, u, 1);
    i64 begin = 0;
    for (i64 at = 0; at < n; at += BLOCK) {
        const i64 num = n - at < BLOCK ? n - at : BLOCK;
        base = block_sums(w + at, num, base, sums);
        for (i64 i = 0; i < num; ++i) {
            const i64 found = below.upto<scheme>(sums[i]), end = at + i == n - 1 ? n : found;  // also of NaN
            place(out, n, begin, end, at + i);
            begin = end > begin ? end : begin;
        }
    }
}

// Up to PIECES series out of many, side by side: their weights and ancestors stand in columns.
template <ResamplingScheme scheme, class T>
static void some_series(const T* w, const double* u, i64 n, i64 stride, const i64* which, i64 num, int32_t* lines,
                        i64* out) {
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
        for (i64 s = 0; s < num; ++s) out[i * stride + which[s]] = lines[s * n + i];
}

// weights and ancestors (n, series), uniforms (rows, series); need (series), or null for all: where it is 0, a particle is
// its own ancestor.
template <ResamplingScheme scheme, class T>
static void ancestors_of(const T* w, const double* u, const uint8_t* need, i64 n, i64 series, i64* out) {
    if (series == 1 && (!need || need[0])) return one_series<scheme>(w, u, n, out);
    if (need)
        for (i64 i = 0; i < n; ++i)
            for (i64 s = 0; s < series; ++s) out[i * series + s] = i;
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
