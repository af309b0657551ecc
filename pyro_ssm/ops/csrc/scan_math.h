// The arithmetic of one step of a linear recurrence h' = a h + b, and of its gradient; for a number, a register of
// numbers, or a thread of a GPU (T is any type with + - *). No headers: a run-time compiler takes it as it is.
#pragma once

#if defined(__CUDACC__)
#define PYRO_SSM_HD __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define PYRO_SSM_HD __forceinline
#else
#define PYRO_SSM_HD inline __attribute__((always_inline))
#endif

// R numbers that stand one after the other in memory: a state or a matrix of one lane, or R registers of many lanes.
template <class T, int R> struct Planes { T p[R]; };

template <class T, int R> PYRO_SSM_HD Planes<T, R> plus(const Planes<T, R>& x, const Planes<T, R>& y) {
    Planes<T, R> z;
    for (int r = 0; r < R; ++r) z.p[r] = x.p[r] + y.p[r];
    return z;
}

// STATE and MATRIX: how many numbers each has. adjoint(a, x) = a* x; outer(x, h) = x h*, the gradient of a;
// compose(a, c) = a c; one = the matrix that changes nothing.
struct RealKind {
    enum { STATE = 1, MATRIX = 1 };
    template <class T>
    static PYRO_SSM_HD Planes<T, 1> advance(const Planes<T, 1>& a, const Planes<T, 1>& h, const Planes<T, 1>& b) {
        return {{a.p[0] * h.p[0] + b.p[0]}};
    }
    template <class T> static PYRO_SSM_HD Planes<T, 1> adjoint(const Planes<T, 1>& a, const Planes<T, 1>& x) {
        return {{a.p[0] * x.p[0]}};
    }
    template <class T> static PYRO_SSM_HD Planes<T, 1> outer(const Planes<T, 1>& x, const Planes<T, 1>& h) {
        return {{x.p[0] * h.p[0]}};
    }
    template <class T> static PYRO_SSM_HD Planes<T, 1> compose(const Planes<T, 1>& a, const Planes<T, 1>& c) {
        return {{a.p[0] * c.p[0]}};
    }
    template <class T> static PYRO_SSM_HD Planes<T, 1> one() { return {{T(1)}}; }
};

struct ComplexKind {
    enum { STATE = 2, MATRIX = 2 };
    template <class T>
    static PYRO_SSM_HD Planes<T, 2> advance(const Planes<T, 2>& a, const Planes<T, 2>& h, const Planes<T, 2>& b) {
        return {{(b.p[0] + a.p[0] * h.p[0]) - a.p[1] * h.p[1], (b.p[1] + a.p[0] * h.p[1]) + a.p[1] * h.p[0]}};
    }
    template <class T> static PYRO_SSM_HD Planes<T, 2> adjoint(const Planes<T, 2>& a, const Planes<T, 2>& x) {
        return {{a.p[0] * x.p[0] + a.p[1] * x.p[1], a.p[0] * x.p[1] - a.p[1] * x.p[0]}};
    }
    template <class T> static PYRO_SSM_HD Planes<T, 2> outer(const Planes<T, 2>& x, const Planes<T, 2>& h) {
        return adjoint(h, x);
    }
    template <class T> static PYRO_SSM_HD Planes<T, 2> compose(const Planes<T, 2>& a, const Planes<T, 2>& c) {
        return {{a.p[0] * c.p[0] - a.p[1] * c.p[1], a.p[0] * c.p[1] + a.p[1] * c.p[0]}};
    }
    template <class T> static PYRO_SSM_HD Planes<T, 2> one() { return {{T(1), T(0)}}; }
};

// A real 2 x 2 matrix, row by row, and a pair.
struct PairKind {
    enum { STATE = 2, MATRIX = 4 };
    template <class T>
    static PYRO_SSM_HD Planes<T, 2> advance(const Planes<T, 4>& a, const Planes<T, 2>& h, const Planes<T, 2>& b) {
        return {{(b.p[0] + a.p[0] * h.p[0]) + a.p[1] * h.p[1], (b.p[1] + a.p[2] * h.p[0]) + a.p[3] * h.p[1]}};
    }
    template <class T> static PYRO_SSM_HD Planes<T, 2> adjoint(const Planes<T, 4>& a, const Planes<T, 2>& x) {
        return {{a.p[0] * x.p[0] + a.p[2] * x.p[1], a.p[1] * x.p[0] + a.p[3] * x.p[1]}};
    }
    template <class T> static PYRO_SSM_HD Planes<T, 4> outer(const Planes<T, 2>& x, const Planes<T, 2>& h) {
        return {{x.p[0] * h.p[0], x.p[0] * h.p[1], x.p[1] * h.p[0], x.p[1] * h.p[1]}};
    }
    template <class T> static PYRO_SSM_HD Planes<T, 4> compose(const Planes<T, 4>& a, const Planes<T, 4>& c) {
        return {{a.p[0] * c.p[0] + a.p[1] * c.p[2], a.p[0] * c.p[1] + a.p[1] * c.p[3],
                 a.p[2] * c.p[0] + a.p[3] * c.p[2], a.p[2] * c.p[1] + a.p[3] * c.p[3]}};
    }
    template <class T> static PYRO_SSM_HD Planes<T, 4> one() { return {{T(1), T(0), T(0), T(1)}}; }
};
