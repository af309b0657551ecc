// Some steps of some lanes: the state is in registers. Offsets and strides count numbers, and are negative where time
// runs back.

template <class T> struct Walk {
    const T* at; i64 t;
    const T* operator()(i64 k, i64 lane) const { return at + k * t + lane; }
};

template <class T> struct ForwardSteps {
    i64 count;
    Walk<T> a, b;
    bool shared;                        // one a for all lanes
    const uint8_t* reset; i64 reset_t;  // null = never
    T* out; i64 out_t;                  // null = not wanted
    T* state;                           // of all lanes, in and out
};

// Lanes [lane, lane + N * NV).
template <class Kind, class T, int N, int NV> static void forward_block(const ForwardSteps<T>& s, i64 lane) {
    constexpr int S = Kind::STATE, M = Kind::MATRIX;
    typedef Lanes<T, N, S> States;
    typedef Lanes<T, N, M> Matrices;
    decltype(States::zero()) h[NV];
    decltype(Matrices::zero()) a[NV];
    const auto fetch = [&](i64 k) {
        UNROLL for (int v = 0; v < NV; ++v)
            a[v] = s.shared ? Matrices::repeat(s.a(k, 0)) : Matrices::load(s.a(k, (lane + v * N) * M));
    };
    UNROLL for (int v = 0; v < NV; ++v) h[v] = States::load(s.state + (lane + v * N) * S);
    fetch(0);
    for (i64 k = 0; k < s.count; ++k) {
        if (k && s.a.t) fetch(k);
        const bool fresh = s.reset && s.reset[k * s.reset_t];
        UNROLL for (int v = 0; v < NV; ++v) {
            const auto b = States::load(s.b(k, (lane + v * N) * S));
            h[v] = fresh ? b : Kind::advance(a[v], h[v], b);
            if (s.out) States::store(s.out + k * s.out_t + (lane + v * N) * S, h[v]);
        }
    }
    UNROLL for (int v = 0; v < NV; ++v) States::store(s.state + (lane + v * N) * S, h[v]);
}

// Against the direction of the forward pass: x = grad + carry, carry' = a* x, grad_a = x h_before*.
template <class T> struct BackwardSteps {
    i64 count;
    Walk<T> a, grad, before;            // grad and before may be null: zero
    bool shared;
    const uint8_t* reset; i64 reset_t;
    T* grad_b; i64 grad_b_t;            // null = not wanted
    T* grad_a; i64 grad_a_t;            // null = not wanted
    T* sum;                             // of grad_a over the steps is added here; null = not wanted
    T* carry;                           // of all lanes, in and out
};

template <class Kind, class T, int N, int NV> static void backward_block(const BackwardSteps<T>& s, i64 lane) {
    constexpr int S = Kind::STATE, M = Kind::MATRIX;
    typedef Lanes<T, N, S> States;
    typedef Lanes<T, N, M> Matrices;
    decltype(States::zero()) carry[NV];
    decltype(Matrices::zero()) a[NV], sum[NV];
    const auto fetch = [&](i64 k) {
        UNROLL for (int v = 0; v < NV; ++v)
            a[v] = s.shared ? Matrices::repeat(s.a(k, 0)) : Matrices::load(s.a(k, (lane + v * N) * M));
    };
    UNROLL for (int v = 0; v < NV; ++v) {
        carry[v] = States::load(s.carry + (lane + v * N) * S);
        sum[v] = Matrices::zero();
    }
    fetch(0);
    for (i64 k = 0; k < s.count; ++k) {
        if (k && s.a.t) fetch(k);
        const bool fresh = s.reset && s.reset[k * s.reset_t];
        UNROLL for (int v = 0; v < NV; ++v) {
            const i64 at = (lane + v * N) * S;
            const auto x = s.grad.at ? plus(carry[v], States::load(s.grad(k, at))) : carry[v];
            if (s.grad_b) States::store(s.grad_b + k * s.grad_b_t + at, x);
            carry[v] = fresh ? States::zero() : Kind::adjoint(a[v], x);
            if (s.grad_a || s.sum) {
                auto outer = Matrices::zero();
                if (!fresh && s.before.at) outer = Kind::outer(x, States::load(s.before(k, at)));
                if (s.sum) sum[v] = plus(sum[v], outer);
                else Matrices::store(s.grad_a + k * s.grad_a_t + (lane + v * N) * M, outer);
            }
        }
    }
    UNROLL for (int v = 0; v < NV; ++v) {
        const i64 at = lane + v * N;
        States::store(s.carry + at * S, carry[v]);
        if (s.sum) Matrices::store(s.sum + at * M, plus(sum[v], Matrices::load(s.sum + at * M)));
    }
}

template <class Kind, class T> struct Forward {
    typedef ForwardSteps<T> Steps;
    template <int N, int NV> static void block(const Steps& s, i64 lane) { forward_block<Kind, T, N, NV>(s, lane); }
};
template <class Kind, class T> struct Backward {
    typedef BackwardSteps<T> Steps;
    template <int N, int NV> static void block(const Steps& s, i64 lane) { backward_block<Kind, T, N, NV>(s, lane); }
};

// What is left of the lanes after whole registers: N = 8, 4, 2, 1 of them.
template <class Pass, int N> static void rest(const typename Pass::Steps& s, i64 lane, i64 lanes) {
    if (lanes - lane >= N) { Pass::template block<N, 1>(s, lane); lane += N; }
    if constexpr (N > 1) rest<Pass, N / 2>(s, lane, lanes);
}

// All lanes.
template <class Pass, class Kind, class T> static void every_lane(const typename Pass::Steps& s, i64 lanes) {
    constexpr int N = Full<T>::value, NV = 4 / Kind::MATRIX;
    i64 lane = 0;
    if constexpr (NV > 1)
        for (; lane + NV * N <= lanes; lane += NV * N) Pass::template block<N, NV>(s, lane);
    for (; lane + N <= lanes; lane += N) Pass::template block<N, 1>(s, lane);
    if constexpr (N > 1) rest<Pass, N / 2>(s, lane, lanes);
}
