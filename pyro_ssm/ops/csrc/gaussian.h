// Draws from and densities of normal laws with independent coordinates, for many particles in one pass.

// out = A x + b + s e, rows of `dim` numbers: A (dim, dim), b (dim), s (dim) are shared by all rows.
template <class T>
static void affine_draw(const T* x, const T* e, const T* A, const T* b, const T* s, i64 rows, i64 dim, T* out) {
    if (dim == 1) {
        const T a0 = A[0], b0 = b[0], s0 = s[0];
        for (i64 i = 0; i < rows; ++i) out[i] = a0 * x[i] + b0 + s0 * e[i];
        return;
    }
    for (i64 i = 0; i < rows; ++i, x += dim, e += dim, out += dim)
        for (i64 r = 0; r < dim; ++r) {
            T sum = b[r] + s[r] * e[r];
            for (i64 c = 0; c < dim; ++c) sum += A[r * dim + c] * x[c];
            out[r] = sum;
        }
}

// log N(value; loc, scale) over rows of `width` = series * dim numbers, summed over dim. Each argument is whole (a number for
// each, step 1) or one row for all particles (step 0), of which as many copies as fill a tile are made beforehand.
template <class T> struct Operand {
    const T* at;
    bool whole;
    std::unique_ptr<T[]> copies;

    Operand(const T* x, i64 is_whole, i64 width, i64 tile) : at(x), whole(is_whole != 0) {
        if (whole) return;
        copies.reset(new T[(size_t)tile]);
        std::copy(x, x + width, copies.get());
        for (i64 i = width; i < tile; i *= 2)
            std::copy(copies.get(), copies.get() + std::min(i, tile - i), copies.get() + i);
        at = copies.get();
    }
    const T* from(i64 i) const { return whole ? at + i : at; }
};

// Whether logarithms and reciprocals of all of them are those of ordinary numbers.
template <class T> static inline bool ordinary(const T* x, i64 num) {
    int32_t all = 1;
    for (i64 i = 0; i < num; ++i) all &= (x[i] > (T)1e-30) & (x[i] < (T)1e30);
    return all;
}

// log N(y; mean, sd^2), number by number.
template <class T>
static inline void density_of_each(const T* y, const T* mean, const T* sd, i64 num, T* to) {
    constexpr double HALF_LOG_2PI = 0.91893853320467274178;
    if constexpr (sizeof(T) == 4) {
        if (ordinary(sd, num)) {  // a division costs more than all the rest
            for (i64 l = 0; l < num; ++l) {
                const T white = (y[l] - mean[l]) * reciprocal(sd[l]);
                to[l] = ((T)-HALF_LOG_2PI - logarithm(sd[l])) - (T)0.5 * (white * white);
            }
            return;
        }
    }
    for (i64 l = 0; l < num; ++l) to[l] = (T)-HALF_LOG_2PI - logarithm_of_any(sd[l]);
    for (i64 l = 0; l < num; ++l) {
        const T white = (y[l] - mean[l]) / sd[l];
        to[l] -= (T)0.5 * (white * white);
    }
}

template <class T>
static void normal_density(const T* value, i64 value_whole, const T* loc, i64 loc_whole, const T* scale, i64 scale_whole,
                           i64 n, i64 width, i64 dim, T* out) {
    constexpr double HALF_LOG_2PI = 0.91893853320467274178;
    const i64 copies = width < 256 ? 256 / width : 1, tile = copies * width, count = n * width;
    Operand<T> v(value, value_whole, width, tile), m(loc, loc_whole, width, tile), s(scale, scale_whole, width, tile);
    std::unique_ptr<T[]> constants(new T[(size_t)tile]), inverses(new T[(size_t)tile]), terms(new T[(size_t)tile]);
    T *constant = constants.get(), *inverse = inverses.get(), *term = terms.get();
    const bool shared = !s.whole && ordinary(s.at, tile);
    if (shared)
        for (i64 i = 0; i < tile; ++i) {
            inverse[i] = i < width ? 1 / s.at[i] : inverse[i - width];
            constant[i] = i < width ? (T)(-HALF_LOG_2PI - std::log((double)s.at[i])) : constant[i - width];
        }
    for (i64 i = 0; i < count; i += tile) {
        const i64 num = count - i < tile ? count - i : tile;
        const T *y = v.from(i), *mean = m.from(i), *sd = s.from(i);
        T* to = dim == 1 ? out + i : term;
        if (shared)
            for (i64 l = 0; l < num; ++l) {
                const T white = (y[l] - mean[l]) * inverse[l];
                to[l] = constant[l] - (T)0.5 * (white * white);
            }
        else
            density_of_each(y, mean, sd, num, to);
        if (dim == 1) continue;
        for (i64 r = 0; r < num / dim; ++r) {
            T sum = 0;
            for (i64 c = 0; c < dim; ++c) sum += term[r * dim + c];
            out[i / dim + r] = sum;
        }
    }
}
