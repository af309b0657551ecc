// e^x - 1 of complex numbers, one or a register of them, to the last digits where x is small. A phase is reduced by three
// parts of pi / 2: exact for some thousands of turns.

template <class T> struct Phase;
template <> struct Phase<float> {
    static constexpr float high = 1.5703125f, middle = 4.837512969970703125e-4f, low = 7.54978995489188216e-8f;
    static constexpr float smallest = -80.0f, largest = 88.0f;  // of exponents: e^-80 counts as 0
    static constexpr int terms = 4;
};
template <> struct Phase<double> {
    static constexpr double high = 1.57079632673412561417, middle = 6.07710050630396597660e-11;
    static constexpr double low = 2.02226624879595063154e-21, smallest = -700.0, largest = 709.0;
    static constexpr int terms = 9;
};

template <class T> struct ComplexExponential {
    typedef typename Simd<T>::V V;
    typedef typename Simd<T>::I I;
    typedef Constants<T> K;
    typedef Phase<T> P;

    // e^x - 1 = 2^k (e^r - 1) + (2^k - 1)
    SIMD_INLINE V minus_one(V x) {
        const V zero = V{};
        x = choose(x < zero + P::smallest, zero + P::smallest, x);  // NaN stays
        x = choose(x > zero + P::largest, zero + P::largest, x);
        const V shifted = x * K::log2e + K::round, k = shifted - K::round;
        const V r = x - k * K::ln2_high - k * K::ln2_low;
        V p = zero + K::exp_series(0);
        for (int i = 1; i < K::exp_terms; ++i) p = p * r + K::exp_series(i);
        const V two = bits<V>((bits<I>(shifted) - bits<I>(zero + K::round) + K::bias) << K::mantissa);
        return two * (p * (r * r) + r) + (two - T(1));
    }
    // sin x and cos x - 1, by the series about the nearest multiple of pi / 2
    SIMD_INLINE void turn(V x, V* sine, V* cosine_minus_one) {
        const V zero = V{}, shifted = x * T(0.636619772367581343076) + K::round, k = shifted - K::round;
        const V r = x - k * P::high - k * P::middle - k * P::low, square = r * r;
        V s = zero + T(1), c = zero + T(1);
        for (int i = P::terms; i > 0; --i) {
            s = T(1) - square * T(1.0 / (2 * i * (2 * i + 1))) * s;
            c = T(1) - square * T(1.0 / ((2 * i + 1) * (2 * i + 2))) * c;
        }
        s = s * r;
        c = T(-0.5) * square * c;
        const I quarter = bits<I>(shifted) - bits<I>(zero + K::round);
        const auto odd = (quarter & 1) != 0, below = (quarter & 2) != 0, left = ((quarter + 1) & 2) != 0;
        const V up = choose(odd, c + T(1), s);
        *sine = choose(below, -up, up);
        *cosine_minus_one = choose(odd, choose(left, -s, s) - T(1), choose(left, -c - T(2), c));
    }
    SIMD_INLINE void minus_one(V real, V imaginary, V* out) {
        V sine, less;
        turn(imaginary, &sine, &less);
        const V grown = minus_one(real);
        out[0] = grown + less + grown * less;
        out[1] = (grown + T(1)) * sine;
    }
};
