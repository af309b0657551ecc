// exp (within 2 units in the last place), softplus and the logistic function (within 4) of one number or of a register
// of them: tests/ops/test_selective_kernels.py. Polynomials: minimax fits made for this file.

template <class T> struct Constants;
template <> struct Constants<float> {
    static constexpr float low = -104.0f, high = 89.0f;       // beyond, exp is 0 or infinite
    static constexpr float round = 12582912.0f;               // 1.5 2^23: adding it rounds to an integer
    static constexpr float log2e = 1.44269504088896341f, ln2 = 0.693147180559945309f;
    static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440054690583e-4f;  // integers times high: exact
    static constexpr int mantissa = 23, bias = 127, exp_terms = 5, power_terms = 6, log_terms = 4;
    // (exp(r) - 1 - r) / r^2 on |r| <= log(2) / 2, the highest power first
    static constexpr float exp_series(int i) {
        constexpr float c[] = {0.00139261835877f, 0.00836317905272f, 0.0416665546172f, 0.166665769897f, 0.5f};
        return c[i];
    }
    // (2^r - 1) / r on |r| <= 1/2
    static constexpr float power_series(int i) {
        constexpr float c[] = {0.0001535336676f, 0.001339887368f, 0.009618437345f,
                               0.05550332474f,   0.2402264791f,   0.6931472029f};
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
    static constexpr double ln2 = 0.693147180559945309417;
    static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
    static constexpr int mantissa = 52, bias = 1023, exp_terms = 10, power_terms = 11, log_terms = 10;
    static constexpr double exp_series(int i) {
        constexpr double c[] = {
            2.5100385495510319078e-8, 2.7620088445409748161e-7, 2.7557268459997064772e-6, 0.000024801521295954375131,
            0.00019841269863053616878, 0.0013888888917213716901, 0.0083333333333300618325, 0.041666666666624127873,
            0.16666666666666667453, 0.50000000000000010221};
        return c[i];
    }
    static constexpr double power_series(int i) {
        constexpr double c[] = {
            4.4347654445445994496e-10, 7.0737829670346492267e-9, 1.0178199613129042513e-7, 1.3215435283933465149e-6,
            0.000015252733493021978641, 0.00015403530457108885689, 0.0013333558146774739996, 0.009618129107594122564,
            0.055504108664820082624, 0.24022650695910131254, 0.69314718055994532582};
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

// Whole numbers k and what is above them, where the processor knows of them: x = k + above(x), scale(p, k) = p 2^k.
#if PYRO_SSM_X86 && PYRO_SSM_BYTES == 64
#define PYRO_SSM_SCALES 1
template <class T> struct Whole;
template <> struct Whole<float> {
    typedef Simd<float>::V V;
    SIMD_INLINE V above(V x) { return (V)_mm512_maskz_reduce_ps(0xffff, (__m512)x, 8); }
    SIMD_INLINE V scale(V p, V k) { return (V)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)k); }
};
template <> struct Whole<double> {
    typedef Simd<double>::V V;
    SIMD_INLINE V above(V x) { return (V)_mm512_maskz_reduce_pd(0xff, (__m512d)x, 8); }
    SIMD_INLINE V scale(V p, V k) { return (V)_mm512_maskz_scalef_pd(0xff, (__m512d)p, (__m512d)k); }
};
#else
#define PYRO_SSM_SCALES 0
#endif

template <class T> struct Elementary {
    typedef typename Simd<T>::V V;
    typedef typename Simd<T>::I I;
    typedef Constants<T> K;

    // e^x = 2^k e^r; it fades out through the subnormal numbers and overflows to infinity.
    SIMD_INLINE V exp(V x) {
        const V zero = V{};
        x = choose(x < zero + K::low, zero + K::low, x);  // NaN stays
        x = choose(x > zero + K::high, zero + K::high, x);
        const V shifted = x * K::log2e + K::round, k = shifted - K::round;
        const V r = x - k * K::ln2_high - k * K::ln2_low;
        V p = zero + K::exp_series(0);
        for (int i = 1; i < K::exp_terms; ++i) p = p * r + K::exp_series(i);
        p = p * (r * r) + r + T(1);
#if PYRO_SSM_SCALES
        return Whole<T>::scale(p, k);
#else
        const I power = bits<I>(shifted) - bits<I>(zero + K::round), half = power >> 1;
        return p * bits<V>((half + K::bias) << K::mantissa) * bits<V>((power - half + K::bias) << K::mantissa);
#endif
    }
    // 2^x with about half the instructions, 0 below the normal numbers; and (2^x - 1) / x, where that is wanted. Both
    // are as good near x = 0, where 2^x - 1 is lost, as elsewhere.
    SIMD_INLINE V exp2(V x, V* slope = nullptr) {
        const V zero = V{};
#if PYRO_SSM_SCALES
        const V r = Whole<T>::above(x), k = x - r;
#else
        x = choose(x < zero - T(K::bias), zero - T(K::bias), x);
        x = choose(x > zero + T(K::bias + 1), zero + T(K::bias + 1), x);
        const V shifted = x + K::round, k = shifted - K::round, r = x - k;
#endif
        V q = zero + K::power_series(0);
        for (int i = 1; i < K::power_terms; ++i) q = q * r + K::power_series(i);
        const V p = q * r + T(1);
#if PYRO_SSM_SCALES
        const V power = Whole<T>::scale(p, k);
#else
        const V power = p * bits<V>((bits<I>(shifted) - bits<I>(zero + K::round) + K::bias) << K::mantissa);
#endif
        if (slope) *slope = choose(k == zero, q, (power - T(1)) / x);
        return power;
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
