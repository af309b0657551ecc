// The loops of coordinate.h: rows side by side, hidden units one after another, nothing of them in memory. Included once
// for each instruction set, inside a namespace of its own.

template <class T> struct Coordinate {
    typedef Simd<T> S;
    typedef Elementary<T> E;
    typedef typename S::V V;

    const CoordinateArgs& a;
    const i64 i;  // which coordinate
    const T *slope, *shift, *weight;

    Coordinate(const CoordinateArgs& args, i64 coordinate) : a(args), i(coordinate) {
        slope = (const T*)a.slope + i * a.hidden;
        shift = (const T*)a.shift + i * a.hidden;
        weight = (const T*)a.weight + i * a.hidden;
    }
    // That coordinate of the rows from r on; beyond the last, 0.
    V column(const void* x, i64 r) const {
        T lanes[S::W] = {};
        for (i64 l = 0; l < S::W && r + l < a.rows; ++l) lanes[l] = ((const T*)x)[(r + l) * a.coordinates + i];
        return S::load(lanes);
    }
    void put(void* x, i64 r, V v, bool add) const {
        T lanes[S::W];
        S::store(lanes, v);
        for (i64 l = 0; l < S::W && r + l < a.rows; ++l) {
            T& to = ((T*)x)[(r + l) * a.coordinates + i];
            to = add ? to + lanes[l] : lanes[l];
        }
    }
    void forward() const {
        for (i64 r = 0; r < a.rows; r += S::W) {
            const V z = column(a.z, r);
            V sum = S::all(((const T*)a.bias)[i]);
            for (i64 h = 0; h < a.hidden; ++h) sum += weight[h] * E::softplus(slope[h] * z + shift[h]);
            put(a.a, r, sum, false);
        }
    }
    // Units in the outer loop of a block of them, so that what their parameters get stays in registers.
    void backward() const {
        T *to_slope = (T*)a.grad_slope + i * a.hidden, *to_shift = (T*)a.grad_shift + i * a.hidden;
        T *to_weight = (T*)a.grad_weight + i * a.hidden, total = 0;
        constexpr i64 BLOCK = 32;  // registers of rows whose states and gradients are kept at hand
        for (i64 first = 0; first < a.rows; first += BLOCK * S::W) {
            V z[BLOCK], g[BLOCK], back[BLOCK];
            i64 n = 0;
            for (i64 r = first; n < BLOCK && r < a.rows; r += S::W, ++n) {
                z[n] = column(a.z, r);
                g[n] = column(a.grad_a, r);
                back[n] = V{};
                total += S::sum(g[n]);
            }
            for (i64 h = 0; h < a.hidden; ++h) {
                V of_weight = V{}, of_slope = V{}, of_shift = V{};
                for (i64 k = 0; k < n; ++k) {
                    V steep;
                    const V unit = E::softplus(slope[h] * z[k] + shift[h], &steep);
                    const V inner = g[k] * (weight[h] * steep);
                    of_weight += g[k] * unit;
                    of_shift += inner;
                    of_slope += inner * z[k];
                    back[k] += inner * slope[h];
                }
                to_weight[h] += S::sum(of_weight);
                to_shift[h] += S::sum(of_shift);
                to_slope[h] += S::sum(of_slope);
            }
            for (i64 k = 0; k < n; ++k) put(a.grad_z, first + k * S::W, back[k], true);
        }
        ((T*)a.grad_bias)[i] += total;
    }
};

template <class T> static int coordinate_of(const CoordinateArgs& a, bool back) {
    auto piece = [&](i64 begin, i64 end) {
        for (i64 i = begin; i < end; ++i) back ? Coordinate<T>(a, i).backward() : Coordinate<T>(a, i).forward();
    };
    const i64 each = a.rows * a.hidden;
    parallel(a.parallel_for, a.coordinates, each > (1 << 15) ? 1 : (1 << 15) / (each + 1) + 1, piece);
    return 0;
}
