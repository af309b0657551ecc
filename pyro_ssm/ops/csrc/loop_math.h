// Elementary functions without branches, so that a loop over them becomes vector instructions. Errors are about one unit
// in the last place.

template <class To, class From> static inline To bits_of(From x) {
    static_assert(sizeof(To) == sizeof(From), "of one size");
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

// e^x = 2^n e^r with |r| <= log(2) / 2; 0 where the result would be denormal, infinity from about log(max) on.
static inline float exponential(float x) {
    const float whole = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which stands in the last bits
    const float shifted = x * 1.44269504f + whole, n = shifted - whole;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const uint32_t y = bits_of<uint32_t>(p) + (bits_of<uint32_t>(shifted) << 23);
    const float inside = x < -87.0f ? 0.0f : bits_of<float>(y), found = x > 88.0f ? INFINITY : inside;
    return x != x ? x : found;
}
static inline double exponential(double x) {
    const double whole = 6755399441055744.0;  // 1.5 * 2^52
    const double shifted = x * 1.4426950408889634 + whole, n = shifted - whole;
    const double r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
    double p = 1.0 / 6227020800.0;
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    const uint64_t y = bits_of<uint64_t>(p) + (bits_of<uint64_t>(shifted) << 52);
    const double inside = x < -708.0 ? 0.0 : bits_of<double>(y), found = x > 709.0 ? (double)INFINITY : inside;
    return x != x ? x : found;
}

// log x of a positive normal number: x = 2^n (1 + r) with 1 + r near 1, log(1 + r) = r - r^2 / 2 + r^3 p(r) with a minimax
// fit p made for this file. No division, which costs more than the whole polynomial.
static inline float logarithm(float x) {
    const int32_t b = bits_of<int32_t>(x), whole = (b - 0x3f3504f3) >> 23;  // 1 + r in [sqrt(1/2), sqrt(2))
    const float r = bits_of<float>(b - (int32_t)((uint32_t)whole << 23)) - 1.0f, r2 = r * r, n = (float)whole;
    float p = -7.634493e-02f;
    p = p * r + 1.2761575e-01f;
    p = p * r - 1.3160183e-01f;
    p = p * r + 1.4201759e-01f;
    p = p * r - 1.6623357e-01f;
    p = p * r + 2.0001227e-01f;
    p = p * r - 2.5000820e-01f;
    p = p * r + 3.3333330e-01f;
    const float rest = (r * r2) * p - 0.5f * r2 - n * 2.12194440e-4f;
    return (r + rest) + n * 0.693359375f;
}

static inline float logarithm_of_any(float x) {
    const bool small = x < 1.17549435e-38f;
    const float found = logarithm(small ? x * 8388608.0f : x) - (small ? 15.9423851f : 0.0f);
    const float positive = x < INFINITY ? found : x;  // also NaN
    return x > 0.0f ? positive : x == 0.0f ? -INFINITY : NAN;
}
static inline double logarithm_of_any(double x) { return std::log(x); }

// 1 / x of a positive number far from the ends of the range: three steps of Newton's from a guess within 12 %.
static inline float reciprocal(float x) {
    float r = bits_of<float>(0x7ef311c3u - bits_of<uint32_t>(x));
    for (int i = 0; i < 3; ++i) r += r * (1.0f - x * r);
    return r;
}

// Sine and cosine of |x| <= pi / 4.
static inline float sine(float x) {
    const float q = x * x;
    float p = 1.0f / 362880;
    p = p * q - 1.0f / 5040;
    p = p * q + 1.0f / 120;
    p = p * q - 1.0f / 6;
    return x + x * (p * q);
}
static inline float cosine(float x) {
    const float q = x * x;
    float p = -1.0f / 3628800;
    p = p * q + 1.0f / 40320;
    p = p * q - 1.0f / 720;
    p = p * q + 1.0f / 24;
    p = p * q - 0.5f;
    return 1.0f + p * q;
}
