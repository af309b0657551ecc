// What every pass needs to know: sizes, where things stand on the tape, scratch memory.

constexpr i64 BLOCK = 64;  // times in a block: covariances first, then the means of every tile
constexpr i64 STEPS = 32;  // times that the means go back over at once: what they need of them stays in the first cache

// Scratch memory, zeroed; freed at the end of the scope. (A list of its own: a std::vector here would put code for this
// instruction set into a function that the linker shares with all others.)
class Arena {
    struct Block { Block* next; char pad[56]; };
    Block* last = nullptr;
  public:
    Arena() {}
    Arena(const Arena&) = delete;
    ~Arena() {
        while (last) { Block* next = last->next; std::free(last); last = next; }
    }
    template <class T> T* take(i64 count) {
        Block* block = (Block*)std::calloc(1, sizeof(Block) + sizeof(T) * (size_t)(count > 0 ? count : 1));
        if (!block) throw std::bad_alloc();
        block->next = last;
        last = block;
        return (T*)(block + 1);
    }
    double* doubles(i64 count) { return take<double>(count); }
};

// One time of a covariance recursion, in doubles from the start of its record:
// P- (n x ld), E = W H P- (p x ld), W = S^{-1/2} (p x p, lower), the constant of the density, the number of rows seen,
// whether P (n x ld) follows: where it does not, it is P- - E' E. The gain is K = E' W: innovations are whitened first, e = W v, which keeps the digits of a vague prior.
struct Context {
    const KalmanArgs& a;
    i64 n, p, times, ld, lanes, tiles, record, kept_every, tile_size;
    i64 at_E, at_W, at_constant, at_rows, at_exact, at_P;
    std::vector<i64> seen_at;  // index of the observation at each time, or -1

    explicit Context(const KalmanArgs& args) : a(args), n(args.n), p(args.p), times(args.times) {
        ld = n <= 4 ? 4 : n <= 8 ? 8 : n <= 16 ? 16 : (n + 7) / 8 * 8;
        lanes = a.series == 1 ? 1 : 8;
        tiles = (a.series + lanes - 1) / lanes;
        at_E = n * ld; at_W = at_E + p * ld; at_constant = at_W + p * p; at_rows = at_constant + 1;
        at_exact = at_rows + 1; at_P = (at_exact + 8) / 8 * 8;
        record = at_P + (n * ld + 7) / 8 * 8;
        // Eight series are quicker filtered again, over a few times at once, than their means are fetched.
        kept_every = lanes == 1 ? 1 : STEPS;
        tile_size = ((times + kept_every - 1) / kept_every * n + times * p) * lanes;
        seen_at.assign((size_t)times, -1);
        for (i64 s = 0; s < a.seen; ++s) seen_at[(size_t)(a.at ? a.at[s] : s)] = s;
    }
    // Tape: for each group the time from which its covariance stands still, then its records; then for each tile the
    // predicted means of every `kept_every`th time, and the whitened innovations of all times.
    i64 tape_size() const { return a.groups * (8 + times * record + tiles * tile_size); }
    double* settled(double* tape, i64 g) const { return tape + g * 8; }
    double* records(double* tape, i64 g) const { return tape + a.groups * 8 + g * times * record; }
    double* of_tile(double* tape, i64 g, i64 tile) const {
        return tape + a.groups * (8 + times * record) + (g * tiles + tile) * tile_size;
    }
    double* kept_mean(double* of_tile, i64 t) const { return of_tile + t / kept_every * n * lanes; }
    double* innovation(double* of_tile, i64 t) const { return of_tile + tile_size - (times - t) * p * lanes; }
    bool moves(i64 g, i64 t) const { return t > 0 && (!a.move || a.move[g * a.move_g + t]); }
    // The rows observed at time t, into `rows`; their number.
    i64 rows_seen(i64 g, i64 t, i64* rows) const {
        const i64 s = seen_at[(size_t)t];
        if (s < 0) return 0;
        const uint8_t* mask = a.mask ? a.mask + g * a.mask_g + s * p : nullptr;
        i64 q = 0;
        for (i64 r = 0; r < p; ++r)
            if (!mask || mask[r]) rows[q++] = r;
        return q;
    }
    i64 length(i64 g, i64 i) const {
        if (i >= a.series) return 0;
        return a.lengths ? a.lengths[g * a.series + i] : times;
    }
    // The first time from which on every step is alike; `times` where there is none.
    i64 regular_from(i64 g) const {
        if (a.F_t || a.Q_t || a.H_t || a.R_t || a.at || a.seen != times) return times;
        i64 t = times;
        for (; t > 0; --t) {
            bool alike = !a.move || a.move[g * a.move_g + t - 1] || t == 1;
            if (a.mask)
                for (i64 r = 0; alike && r < p; ++r) alike = a.mask[g * a.mask_g + (t - 1) * p + r] != 0;
            if (!alike) break;
        }
        return t;
    }
};

// The problem of group g alone.
static KalmanArgs group_of(KalmanArgs a, i64 g) {
    const i64 all = g * a.series, moves = a.times > 1 ? a.times - 1 : 0;
    auto by = [](auto*& pointer, i64 count) { if (pointer) pointer += count; };
    by(a.y, g * a.y_g); by(a.mask, g * a.mask_g); by(a.move, g * a.move_g); by(a.lengths, all);
    by(a.m, g * a.m_g); by(a.L, g * a.L_g); by(a.F, g * a.F_g); by(a.b, g * a.b_g); by(a.Q, g * a.Q_g);
    by(a.H, g * a.H_g); by(a.d, g * a.d_g); by(a.R, g * a.R_g);
    by(a.log_likelihood, all * a.times);
    by(a.filtered_mean, all * a.times * a.n); by(a.predicted_mean, all * a.times * a.n);
    by(a.filtered_root, g * a.times * a.n * a.n); by(a.predicted_root, g * a.times * a.n * a.n);
    by(a.grad_log_likelihood, g * a.grad_g);
    by(a.grad_filtered_mean, all * a.times * a.n); by(a.grad_predicted_mean, all * a.times * a.n);
    by(a.grad_y, all * a.seen * a.p); by(a.grad_m, all * a.n); by(a.grad_b, all * moves * a.n);
    by(a.grad_b_sum, all * a.n); by(a.grad_d_sum, all * a.p);
    by(a.grad_L, a.L_g ? g * a.n * a.n : 0);
    by(a.grad_F, a.F_g ? g * (a.F_t ? moves : 1) * a.n * a.n : 0);
    by(a.grad_Q, a.Q_g ? g * (a.Q_t ? moves : 1) * a.n * a.n : 0);
    by(a.grad_H, a.H_g ? g * (a.H_t ? a.seen : 1) * a.p * a.n : 0);
    by(a.grad_R, a.R_g ? g * (a.R_t ? a.seen : 1) * a.p * a.p : 0);
    a.groups = 1;
    return a;
}
