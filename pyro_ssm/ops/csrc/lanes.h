// Registers of N numbers, and R planes of them from memory where the R numbers of a lane stand together.
//
// Included once for each instruction set, inside a namespace of its own. PYRO_SSM_WIDTH is the number of doubles in a
// register.

#if defined(_MSC_VER)
#define INLINE static __forceinline
#else
#define INLINE static inline __attribute__((always_inline))
#endif
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define UNROLL _Pragma("GCC unroll 16")
#else
#define UNROLL
#endif

template <class T> struct Full { enum { value = PYRO_SSM_WIDTH == 1 ? 1 : PYRO_SSM_WIDTH * 8 / (int)sizeof(T) }; };

template <class T, int N> struct Register;
template <class T> struct Register<T, 1> { typedef T type; };

// even, odd: of x then y; low, high: halves of x and y, their numbers in turn
template <class V> struct Mix;

#if defined(__GNUC__) && PYRO_SSM_WIDTH > 1
#if defined(__clang__)
#define SHUFFLE(x, y, I, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, I, ...) __builtin_shuffle(x, y, I{__VA_ARGS__})
#endif
#define REGISTER(T, I, N, EVEN, ODD, LOW, HIGH)                                                                        \
    template <> struct Register<T, N> {                                                                                \
        typedef T type __attribute__((vector_size(N * sizeof(T))));                                                    \
    };                                                                                                                 \
    template <> struct Mix<Register<T, N>> {                                                                           \
        typedef Register<T, N>::type V;                                                                                \
        typedef I M __attribute__((vector_size(N * sizeof(T))));                                                       \
        static PYRO_SSM_HD V even(V x, V y) { return SHUFFLE(x, y, M, EVEN); }                                       \
        static PYRO_SSM_HD V odd(V x, V y) { return SHUFFLE(x, y, M, ODD); }                                         \
        static PYRO_SSM_HD V low(V x, V y) { return SHUFFLE(x, y, M, LOW); }                                         \
        static PYRO_SSM_HD V high(V x, V y) { return SHUFFLE(x, y, M, HIGH); }                                       \
    };
#define LIST(...) __VA_ARGS__
#define REGISTERS_OF_2(T, I) REGISTER(T, I, 2, LIST(0, 2), LIST(1, 3), LIST(0, 2), LIST(1, 3))
#define REGISTERS_OF_4(T, I)                                                                                           \
    REGISTER(T, I, 4, LIST(0, 2, 4, 6), LIST(1, 3, 5, 7), LIST(0, 4, 1, 5), LIST(2, 6, 3, 7))
#define REGISTERS_OF_8(T, I)                                                                                           \
    REGISTER(T, I, 8, LIST(0, 2, 4, 6, 8, 10, 12, 14), LIST(1, 3, 5, 7, 9, 11, 13, 15),                                \
             LIST(0, 8, 1, 9, 2, 10, 3, 11), LIST(4, 12, 5, 13, 6, 14, 7, 15))
#define REGISTERS_OF_16(T, I)                                                                                          \
    REGISTER(T, I, 16, LIST(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),                                \
             LIST(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31),                                          \
             LIST(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),                                             \
             LIST(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31))
REGISTERS_OF_2(float, int32_t)
REGISTERS_OF_4(float, int32_t)
REGISTERS_OF_2(double, int64_t)
#if PYRO_SSM_WIDTH >= 4
REGISTERS_OF_8(float, int32_t)
REGISTERS_OF_4(double, int64_t)
#endif
#if PYRO_SSM_WIDTH >= 8
REGISTERS_OF_16(float, int32_t)
REGISTERS_OF_8(double, int64_t)
#endif
#endif

// N lanes of R numbers each, from and to memory where the R numbers of a lane stand together.
template <class T, int N, int R> struct Lanes {
    typedef typename Register<T, N>::type V;
    typedef Mix<Register<T, N>> M;
    static PYRO_SSM_HD Planes<V, R> load(const T* from) {
        V x[R];
        std::memcpy(x, from, sizeof(x));  // from any address
        if constexpr (R == 1) return {{x[0]}};
        else if constexpr (R == 2) return {{M::even(x[0], x[1]), M::odd(x[0], x[1])}};
        else {
            const V e0 = M::even(x[0], x[1]), o0 = M::odd(x[0], x[1]), e1 = M::even(x[2], x[3]), o1 = M::odd(x[2], x[3]);
            return {{M::even(e0, e1), M::even(o0, o1), M::odd(e0, e1), M::odd(o0, o1)}};
        }
    }
    static PYRO_SSM_HD void store(T* to, const Planes<V, R>& x) {
        V y[R];
        if constexpr (R == 1) y[0] = x.p[0];
        else if constexpr (R == 2) { y[0] = M::low(x.p[0], x.p[1]); y[1] = M::high(x.p[0], x.p[1]); }
        else {
            const V e0 = M::low(x.p[0], x.p[2]), e1 = M::high(x.p[0], x.p[2]);
            const V o0 = M::low(x.p[1], x.p[3]), o1 = M::high(x.p[1], x.p[3]);
            y[0] = M::low(e0, o0); y[1] = M::high(e0, o0); y[2] = M::low(e1, o1); y[3] = M::high(e1, o1);
        }
        std::memcpy(to, y, sizeof(y));
    }
    // one for all lanes
    static PYRO_SSM_HD Planes<V, R> repeat(const T* from) {
        Planes<V, R> x;
        UNROLL for (int r = 0; r < R; ++r) x.p[r] = V{} + from[r];
        return x;
    }
    static PYRO_SSM_HD Planes<V, R> zero() {
        Planes<V, R> x;
        UNROLL for (int r = 0; r < R; ++r) x.p[r] = V{};
        return x;
    }
};
template <class T, int R> struct Lanes<T, 1, R> {
    static PYRO_SSM_HD Planes<T, R> load(const T* from) {
        Planes<T, R> x;
        UNROLL for (int r = 0; r < R; ++r) x.p[r] = from[r];
        return x;
    }
    static PYRO_SSM_HD void store(T* to, const Planes<T, R>& x) { UNROLL for (int r = 0; r < R; ++r) to[r] = x.p[r]; }
    static PYRO_SSM_HD Planes<T, R> repeat(const T* from) { return load(from); }
    static PYRO_SSM_HD Planes<T, R> zero() {
        Planes<T, R> x;
        UNROLL for (int r = 0; r < R; ++r) x.p[r] = T(0);
        return x;
    }
};

// Numbers that will not be read again soon go past the caches: half the traffic of a store that reads its line first.
#if PYRO_SSM_X86 && PYRO_SSM_WIDTH == 8
constexpr bool STREAMS = true;
INLINE void stream_line(char* to, const char* from) { _mm512_stream_si512((__m512i*)to, _mm512_loadu_si512(from)); }
#elif PYRO_SSM_X86 && PYRO_SSM_WIDTH == 4
constexpr bool STREAMS = true;
INLINE void stream_line(char* to, const char* from) {
    UNROLL for (int k = 0; k < 64; k += 32)
        _mm256_stream_si256((__m256i*)(to + k), _mm256_loadu_si256((const __m256i*)(from + k)));
}
#elif PYRO_SSM_X86
constexpr bool STREAMS = true;
INLINE void stream_line(char* to, const char* from) {
    UNROLL for (int k = 0; k < 64; k += 16)
        _mm_stream_si128((__m128i*)(to + k), _mm_loadu_si128((const __m128i*)(from + k)));
}
#else
constexpr bool STREAMS = false;
INLINE void stream_line(char*, const char*) {}
#endif

static void stream(void* target, const void* source, i64 bytes) {
    char* to = (char*)target;
    const char* from = (const char*)source;
    const i64 head = -(i64)(uintptr_t)to & 63;
    if (head < bytes) {
        std::memcpy(to, from, (size_t)head);
        for (to += head, from += head, bytes -= head; bytes >= 64; to += 64, from += 64, bytes -= 64)
            stream_line(to, from);
    }
    std::memcpy(to, from, (size_t)bytes);
}
INLINE void stream_end() {
#if PYRO_SSM_X86
    _mm_sfence();
#endif
}
