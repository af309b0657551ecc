// log sum_n w_n, log W_n, W_n and 1 / sum_n W_n^2 of every series, for log-weights a + b.
//
// Memory is read in rows of up to LANES neighbours: of several series, or of several particles of each of few series.
// Each lane has a sum of its own, in the type of the data over a block of rows and in double over blocks.

constexpr int LANES = 64, ROWS = 64;

// fn(offset, lanes) for each row of a tile, with a constant number of lanes where rows are full.
template <class Fn> static inline void rows_of(i64 rows, i64 lanes, i64 stride, i64 tail, Fn fn) {
    if (lanes == LANES)
        for (i64 r = 0; r < rows; ++r) fn(r, r * stride, LANES);
    else
        for (i64 r = 0; r < rows; ++r) fn(r, r * stride, (int)lanes);
    if (tail) fn(rows, rows * stride, (int)tail);
}

template <class T>
static void normalise_tile(const T* a, const T* b, i64 rows, i64 lanes, i64 stride, i64 tail, i64 series, T* log_w,
                           T* w, T* total, T* ess) {
    T top[LANES], sum[LANES], square[LANES];
    double sums[LANES] = {}, squares[LANES] = {};
    for (int l = 0; l < LANES; ++l) top[l] = -(T)INFINITY, sum[l] = square[l] = 0;
    rows_of(rows, lanes, stride, tail, [&](i64, i64 at, int num) {
        const T* x = a + at;
        T* out = log_w + at;
        if (b)
            for (int l = 0; l < num; ++l) out[l] = x[l] + b[at + l];
        else
            for (int l = 0; l < num; ++l) out[l] = x[l];
        for (int l = 0; l < num; ++l) top[l] = out[l] > top[l] ? out[l] : top[l];  // a NaN shows in the sum
    });
    for (i64 l = series; l < lanes; ++l) top[l % series] = top[l] > top[l % series] ? top[l] : top[l % series];
    for (i64 l = 0; l < series; ++l)
        if (!(std::fabs(top[l]) < INFINITY)) top[l] = 0;  // e^-inf = 0 then, and e^inf = inf
    for (i64 l = series; l < lanes; ++l) top[l] = top[l % series];
    const auto flush = [&] {
        for (int l = 0; l < LANES; ++l) sums[l] += sum[l], squares[l] += square[l], sum[l] = square[l] = 0;
    };
    rows_of(rows, lanes, stride, tail, [&](i64 r, i64 at, int num) {
        const T* x = log_w + at;
        T* out = w + at;
        for (int l = 0; l < num; ++l) {
            const T e = exponential(x[l] - top[l]);
            out[l] = e;
            sum[l] += e;
            square[l] += e * e;
        }
        if (r % ROWS == ROWS - 1) flush();
    });
    flush();
    for (i64 l = series; l < lanes; ++l) sums[l % series] += sums[l], squares[l % series] += squares[l];
    T scale[LANES], shift[LANES];
    for (i64 l = 0; l < lanes; ++l) {
        scale[l] = (T)(1 / sums[l % series]);
        shift[l] = (T)std::log(sums[l % series]);
    }
    for (i64 l = 0; l < series; ++l) {
        total[l] = (T)((double)top[l] + std::log(sums[l]));
        ess[l] = (T)(sums[l] * (sums[l] / squares[l]));
    }
    rows_of(rows, lanes, stride, tail, [&](i64, i64 at, int num) {
        T *x = log_w + at, *out = w + at;
        for (int l = 0; l < num; ++l) {
            x[l] = (x[l] - top[l]) - shift[l];
            out[l] *= scale[l];
        }
    });
}

template <class T>
static void normalise(const T* a, const T* b, i64 n, i64 series, T* log_w, T* w, T* total, T* ess) {
    if (series <= LANES) {
        const i64 k = LANES / series;  // particles in a row
        normalise_tile(a, b, n / k, n < k ? series * n : series * k, series * k, series * (n % k), series, log_w, w,
                       total, ess);
        return;
    }
    for (i64 s = 0; s < series; s += LANES) {
        const i64 lanes = series - s < LANES ? series - s : LANES;
        normalise_tile(a + s, b ? b + s : nullptr, n, lanes, series, 0, lanes, log_w + s, w + s, total + s, ess + s);
    }
}
