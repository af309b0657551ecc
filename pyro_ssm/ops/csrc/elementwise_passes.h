// The loops of elementwise.h. Included once for each instruction set, inside a namespace of its own.

template <class T, int WHAT> static void elementwise_pass(const ElementwiseArgs& a) {
    typedef Simd<T> S;
    typedef Elementary<T> E;
    auto piece = [&](i64 begin, i64 end) {
        for (i64 i = begin; i < end; i += S::W) {
            const i64 left = end - i;
            const typename S::V x = S::load((const T*)a.x + i, left);
            typename S::V y;
            if (WHAT == ELEMENTWISE_EXP) y = E::exp(x);
            if (WHAT == ELEMENTWISE_LOGISTIC) y = E::logistic(x);
            if (WHAT == ELEMENTWISE_SOFTPLUS) y = E::softplus(x);
            if (WHAT == ELEMENTWISE_SOFTPLUS_GRAD) y = S::load((const T*)a.other + i, left) * E::one_minus_exp(x);
            S::store((T*)a.out + i, y, left);
        }
    };
    parallel(a.parallel_for, a.count, 1 << 15, piece);
}

template <class T> static int elementwise_of(const ElementwiseArgs& a) {
    switch (a.what) {
        case ELEMENTWISE_EXP: elementwise_pass<T, ELEMENTWISE_EXP>(a); break;
        case ELEMENTWISE_LOGISTIC: elementwise_pass<T, ELEMENTWISE_LOGISTIC>(a); break;
        case ELEMENTWISE_SOFTPLUS: elementwise_pass<T, ELEMENTWISE_SOFTPLUS>(a); break;
        case ELEMENTWISE_SOFTPLUS_GRAD: elementwise_pass<T, ELEMENTWISE_SOFTPLUS_GRAD>(a); break;
        default: return ELEMENTWISE_UNKNOWN;
    }
    return ELEMENTWISE_OK;
}
