// W numbers side by side, and the few operations that the language does not give them.
//
// Included once for each instruction set, inside a namespace of its own. PYRO_SSM_BYTES is the size of a register. The
// functions of elementary.h and of the scans are written for any type with + - * / and these operations: a register of
// the CPU, or one number (a CUDA thread, a compiler without vector types).

#if defined(__CUDACC__)
#define SIMD_INLINE static __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define SIMD_INLINE static __forceinline
#else
#define SIMD_INLINE static inline __attribute__((always_inline))
#endif

template <class T> struct Integer;
template <> struct Integer<float> { typedef int32_t type; };
template <> struct Integer<double> { typedef i64 type; };

#if defined(__GNUC__) && PYRO_SSM_BYTES > 8
template <class T> struct Native {
    static constexpr int width = PYRO_SSM_BYTES / (int)sizeof(T);
    typedef T type __attribute__((vector_size(PYRO_SSM_BYTES), aligned(sizeof(T)), may_alias));
    typedef typename Integer<T>::type whole;
    typedef whole integer __attribute__((vector_size(PYRO_SSM_BYTES), aligned(sizeof(T)), may_alias));
};
// x0 y0 x1 y1 ... of the lower, of the upper halves of x and y.
template <int UPPER, class V, class I> SIMD_INLINE V interleave(V x, V y, I) {
    constexpr int W = sizeof(V) / sizeof(x[0]);
#if defined(__clang__)
    V z;
    for (int l = 0; l < W; ++l) z[l] = (l % 2 ? y : x)[l / 2 + UPPER * (W / 2)];
    return z;
#else
    I from;
    for (int l = 0; l < W; ++l) from[l] = l % 2 * W + l / 2 + UPPER * (W / 2);
    return __builtin_shuffle(x, y, from);
#endif
}
#if PYRO_SSM_BYTES == 64
// The first `count` < W lanes by a mask: a loop's narrow stores would hold up the wide load that follows them.
#define PYRO_SSM_MASKED 1
SIMD_INLINE __mmask16 first(i64 count) { return (__mmask16)((1 << count) - 1); }
SIMD_INLINE __m512 load_part(const float* p, i64 count) { return _mm512_maskz_loadu_ps(first(count), p); }
SIMD_INLINE __m512d load_part(const double* p, i64 count) { return _mm512_maskz_loadu_pd((__mmask8)first(count), p); }
SIMD_INLINE void store_part(float* p, __m512 x, i64 count) { _mm512_mask_storeu_ps(p, first(count), x); }
SIMD_INLINE void store_part(double* p, __m512d x, i64 count) { _mm512_mask_storeu_pd(p, (__mmask8)first(count), x); }
#endif
// where(c) a else b, lane by lane; c is what a comparison of two such gives.
template <class C, class V> SIMD_INLINE V choose(C c, V a, V b) { return c ? a : b; }
template <class To, class From> SIMD_INLINE To bits(From x) { return (To)x; }
#else
template <class T> struct Native {
    static constexpr int width = 1;
    typedef T type;
    typedef typename Integer<T>::type integer;
};
template <class V> SIMD_INLINE V choose(bool c, V a, V b) { return c ? a : b; }
template <class To, class From> SIMD_INLINE To bits(From x) { To y; std::memcpy(&y, &x, sizeof(To)); return y; }
#endif

template <class T> struct Simd {
    typedef typename Native<T>::type V;
    typedef typename Native<T>::integer I;
    static constexpr int W = Native<T>::width;

    SIMD_INLINE V all(T x) { return V{} + x; }
    SIMD_INLINE V load(const T* p) { return *(const V*)p; }
    SIMD_INLINE void store(T* p, V x) { *(V*)p = x; }
    // The first `count` lanes; the others are 0.
    SIMD_INLINE V load(const T* p, i64 count) {
        if (count >= W) return load(p);
#if defined(PYRO_SSM_MASKED)
        return (V)load_part(p, count);
#else
        T x[W] = {};
        for (i64 l = 0; l < count; ++l) x[l] = p[l];
        return load(x);
#endif
    }
    SIMD_INLINE void store(T* p, V v, i64 count) {
        if (count >= W) { store(p, v); return; }
#if defined(PYRO_SSM_MASKED)
        store_part(p, v, count);
#else
        T x[W];
        store(x, v);
        for (i64 l = 0; l < count; ++l) p[l] = x[l];
#endif
    }
    // p[index[l]] for the first `count` lanes.
    SIMD_INLINE V gather(const T* p, const i64* index, i64 count) {
        T x[W] = {};
        for (i64 l = 0; l < count; ++l) x[l] = p[index[l]];
        return load(x);
    }
    // Of W registers, the sums over their lanes: lane r of the result is that of x[r]. The registers are used up.
    template <int HALF = W / 2> SIMD_INLINE V totals(V* x) {
#if defined(__GNUC__) && PYRO_SSM_BYTES > 8
        for (int i = 0; i < HALF; ++i)
            x[i] = interleave<0>(x[i], x[i + HALF], I{}) + interleave<1>(x[i], x[i + HALF], I{});
        if constexpr (HALF > 1) return totals<HALF / 2>(x);
#endif
        return x[0];
    }
    SIMD_INLINE void add_to(double* sum, V v) {
        T x[W];
        store(x, v);
        for (int l = 0; l < W; ++l) sum[l] += (double)x[l];
    }
    SIMD_INLINE T sum(V v) {
        T x[W];
        store(x, v);
        for (int width = W / 2; width > 0; width /= 2)
            for (int l = 0; l < width; ++l) x[l] += x[l + width];
        return x[0];
    }
};
