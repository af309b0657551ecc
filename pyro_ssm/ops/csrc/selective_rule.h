// How a state takes a step: h' = a h + w (step u) B, where a and w depend on x = step A.
//
//     euler     a = exp(x), w = 1                            (Mamba's)
//     zoh       a = exp(x), w = (exp(x) - 1) / x
//     bilinear  a = (1 + x/2) / (1 - x/2), w = 1 / (1 - x/2)
// A step of 0 leaves a state as it is.

constexpr int SHARED = -1;  // euler, with one decay for all states of a channel: it is worked out once a step

template <class T, int RULE> struct Rule {  // euler
    typedef typename Simd<T>::V V;
    static constexpr bool weighted = false;
    static constexpr T unit = Constants<T>::log2e, of_unit = Constants<T>::ln2;  // rates are kept as unit * A
    SIMD_INLINE V decay(V x, V*) { return Elementary<T>::exp2(x); }
    // The gradient of x (not of scaled = unit * x), where g is that of the next state, h the state, and of_w that of w.
    SIMD_INLINE V exponent(V, V a, V, V g, V h, V) { return g * a * h; }
};
template <class T> struct Rule<T, SELECTIVE_ZOH> {
    typedef typename Simd<T>::V V;
    static constexpr bool weighted = true;
    static constexpr T unit = Constants<T>::log2e, of_unit = Constants<T>::ln2;
    SIMD_INLINE V decay(V x, V* w) {
        const V a = Elementary<T>::exp2(x, w);
        *w = *w * unit;
        return a;
    }
    // w' = (a - w) / x, near 0 the sum of (i + 1) / (i + 2)! x^i
    SIMD_INLINE V exponent(V scaled, V a, V w, V g, V h, V of_w) {
        const V zero = V{}, x = scaled * of_unit, far = zero + T(0.35);
        const auto near = (x < far) & (x > -far);
        constexpr int terms = sizeof(T) == 4 ? 7 : 14;
        V p = zero + coefficient(terms - 1);
        for (int i = terms - 2; i >= 0; --i) p = p * x + coefficient(i);
        return g * a * h + of_w * choose(near, p, (a - w) / x);
    }
    static constexpr T coefficient(int i) {
        double factorial = 1;
        for (int k = 2; k <= i + 2; ++k) factorial *= k;
        return T((i + 1) / factorial);
    }
};
template <class T> struct Rule<T, SELECTIVE_BILINEAR> {
    typedef typename Simd<T>::V V;
    static constexpr bool weighted = true;
    static constexpr T unit = T(0.5), of_unit = T(2);
    SIMD_INLINE V decay(V half, V* w) {
        *w = T(1) / (T(1) - half);
        return (T(1) + half) * *w;
    }
    SIMD_INLINE V exponent(V, V, V w, V g, V h, V of_w) { return (g * h + of_w * T(0.5)) * (w * w); }
};
