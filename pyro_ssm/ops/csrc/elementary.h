// exp (within 2 units in the last place), softplus and the logistic function (within 4) of one number or of a register of
// them: tests/ops/test_selective_scan.py. Polynomials: minimax fits made for this file.

template <class T> struct Constants;
template <> struct Constants<float> {
    static constexpr float low = -104.0f, high = 89.0f;       // beyond, exp is 0 or infinite
    static constexpr float round = 12582912.0f;               // 1.5 2^23: adding it rounds to an integer
    static constexpr float log2e = 1.44269504088896341f;
    static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440054690583e-4f;  // integers times high are exact
    static constexpr int mantissa = 23, bias = 127, exp_terms = 5, log_terms = 4;
    // (exp(r) - 1 - r) / r^2 on |r| <= log(2) / 2, the highest power first
    static constexpr float exp_series(int i) {
        constexpr float c[] = {0.00139261835877f, 0.00836317905272f, 0.0416665546172f, 0.166665769897f, 0.5f};
        return c[i];
    }
    // (atanh(s) / s - 1) / s^2 in s^2 <= 1/9
    static constexpr float log_series(int i) {
        constexpr float c[] = {0.134257490114f, 0.141183099027f, 0.200037803225f, 0.333333201683f};
        return c[i];
    }
};
template <> struct Constants<double> {
    static constexpr double low = -746.0, high = 710.0, round = 6755399441055744.0, log2e = 1.44269504088896340736;
    static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
    static constexpr int mantissa = 52, bias = 1023, exp_terms = 10, log_terms = 10;
    static constexpr double exp_series(int i) {
        constexpr double c[] = {
            2.5100385495510319078e-8, 2.7620088445409748161e-7, 2.7557268459997064772e-6, 0.000024801521295954375131,
            0.00019841269863053616878, 0.0013888888917213716901, 0.0083333333333300618325, 0.041666666666624127873,
            0.16666666666666667453, 0.50000000000000010221};
        return c[i];
    }
    static constexpr double log_series(int i) {
        constexpr double c[] = {
            0.080820228059717661105, 0.044003692430723369411, 0.060005364047953562676, 0.066570721048274680752,
            0.076927850324793115517, 0.090908947180664290846, 0.11111111358713931495, 0.14285714283554378581,
            0.20000000000007291337, 0.33333333333333329281};
        return c[i];
    }
};

template <class T> struct Elementary {
    typedef typename Simd<T>::V V;
    typedef typename Simd<T>::I I;
    typedef Constants<T> K;

    // e^x = 2^k e^r; in two factors 2^k, so that it fades out through the subnormal numbers and overflows to infinity.
    SIMD_INLINE V exp(V x) {
        const V zero = V{};
        x = choose(x < zero + K::low, zero + K::low, x);  // NaN stays
        x = choose(x > zero + K::high, zero + K::high, x);
        const V shifted = x * K::log2e + K::round, k = shifted - K::round;
        const V r = x - k * K::ln2_high - k * K::ln2_low;
        V p = zero + K::exp_series(0);
        for (int i = 1; i < K::exp_terms; ++i) p = p * r + K::exp_series(i);
        p = p * (r * r) + r + T(1);
        const I power = bits<I>(shifted) - bits<I>(zero + K::round), half = power >> 1;
        return p * bits<V>((half + K::bias) << K::mantissa) * bits<V>((power - half + K::bias) << K::mantissa);
    }
    // 1 - e^-y for y >= 0, to the last digits where y is small
    SIMD_INLINE V one_minus_exp(V y) {
        const V zero = V{}, r = choose(y > zero + T(0.34), zero, -y);
        V p = zero + K::exp_series(0);
        for (int i = 1; i < K::exp_terms; ++i) p = p * r + K::exp_series(i);
        return choose(y > zero + T(0.34), T(1) - exp(-y), -(p * (r * r) + r));
    }
    SIMD_INLINE V logistic(V x) { return T(1) / (T(1) + exp(-x)); }
    // log(1 + e) for 0 <= e <= 1, where s = e / (2 + e)
    SIMD_INLINE V log1p_of(V s) {
        const V s2 = s * s;
        V p = V{} + K::log_series(0);
        for (int i = 1; i < K::log_terms; ++i) p = p * s2 + K::log_series(i);
        return T(2) * (s + s * s2 * p);
    }
    // As torch has it: x itself above 20. Its slope is the logistic function. (One division for both.)
    SIMD_INLINE V softplus(V x, V* slope = nullptr) {
        const V zero = V{}, large = zero + T(20), e = exp(choose(x > zero, -x, x));
        const V below = T(1) / ((e + T(1)) * (e + T(2)));
        if (slope) *slope = choose(x > large, zero + T(1), choose(x > zero, zero + T(1), e) * (below * (e + T(2))));
        return choose(x > large, x, choose(x > zero, x, zero) + log1p_of(e * (below * (e + T(1)))));
    }
};
