// All rows, lanes and steps: tasks for threads, and segments of time that stay in the first cache.

enum { LANES_OF_TASK = 1024, STAGE_BYTES = 16384, SEGMENT_BYTES = 4096, SUM_STEPS = 128 };
constexpr i64 STREAM_FROM = i64(1) << 24;  // bytes of results from which they go past the caches

// One row, some of its lanes.
struct Task { i64 row, lane, lanes; };

struct Tasks {
    i64 rows, blocks, block, lanes;
    Tasks(const ScanArgs& a) : rows(row_count(a.rows)), lanes(a.lanes) {
        block = lanes < LANES_OF_TASK ? lanes : (i64)LANES_OF_TASK;
        // enough tasks for the threads, none of them narrower than a few registers
        while (a.threads > 1 && block >= 128 && rows * ((lanes + block - 1) / block) < 4 * a.threads)
            block = (block / 2 + 31) / 32 * 32;
        blocks = (lanes + block - 1) / block;
    }
    i64 count() const { return rows * blocks; }
    Task operator()(i64 i) const {
        const i64 lane = i % blocks * block;
        return {i / blocks, lane, lane + block <= lanes ? block : lanes - lane};
    }
};

// Steps of a segment: as many as fit, `bytes` each.
static inline i64 segment_steps(i64 bytes, bool narrow) {
    const i64 fit = (narrow ? STAGE_BYTES : SEGMENT_BYTES) / bytes;
    return fit > 1 ? fit : 1;
}

// A result of (rows, steps, lanes), R numbers each, seen by one task: straight, or by a stage of which whole lines go out.
template <class T, int R> struct Result {
    T* row = nullptr;     // where the task's lanes of the first time stand
    i64 step = 0;         // numbers from time to time
    i64 width = 0;        // numbers of the task's lanes
    T* stage = nullptr;
    Result(void* data, const ScanArgs& a, const Task& task, T* buffer, bool streamed) {
        if (!data) return;
        step = a.lanes * R;
        width = task.lanes * R;
        row = (T*)data + task.row * a.steps * step + task.lane * R;
        stage = streamed ? buffer : nullptr;
    }
    // Times [low, low + count) are about to be written: where `first` of them goes, and the way from one to the next.
    T* open(i64 low, i64 first, i64 sign, i64& t) const {
        if (!row) return nullptr;
        t = sign * (stage ? width : step);
        return stage ? stage + (first - low) * width : row + first * step;
    }
    void close(i64 low, i64 count) const {
        if (!stage) return;
        if (width == step) { stream(row + low * step, stage, count * width * (i64)sizeof(T)); return; }
        for (i64 k = 0; k < count; ++k)
            stream(row + (low + k) * step, stage + k * width, width * (i64)sizeof(T));
    }
};

template <class Kind, class T> struct Problem {
    enum { S = Kind::STATE, M = Kind::MATRIX };
    const ScanArgs& a;
    Tasks tasks;
    bool streamed;
    i64 direction;  // of the forward pass
    explicit Problem(const ScanArgs& args) : a(args), tasks(args), direction(args.reverse ? -1 : 1) {
        const i64 bytes = tasks.rows * a.steps * a.lanes * S * (i64)sizeof(T);
        streamed = STREAMS && bytes >= STREAM_FROM;
    }
    // Of an array with R numbers an element: the task's lanes at time t, and the stride in time (forward).
    const T* at(const Array& x, const Task& task, i64 t, int R, bool shared = false) const {
        if (!x.data) return nullptr;
        return (const T*)x.data + row_offset(a.rows, x, task.row) + t * x.t + (shared ? 0 : task.lane * R);
    }
    const uint8_t* reset(const Task& task, i64 t) const {
        if (!a.reset.data) return nullptr;
        return (const uint8_t*)a.reset.data + row_offset(a.rows, a.reset, task.row) + t * a.reset.t;
    }
    i64 segment(const Task& task) const {
        const i64 bytes = task.lanes * (S > M ? S : M) * (i64)sizeof(T);
        return segment_steps(bytes, task.lanes <= Full<T>::value * 4 / M);
    }
    template <class One> void run(One one) const {
        auto some = [&](i64 begin, i64 end) {
            for (i64 i = begin; i < end; ++i) one(tasks(i));
            if (streamed) stream_end();
        };
        const i64 work = a.steps * tasks.block;
        parallel(a.threads > 1 ? a.parallel_for : nullptr, tasks.count(), work > 16384 ? 1 : 16384 / work, some);
    }
};

template <class T> static void copy(T* to, const T* from, i64 count) {
    if (from) std::memcpy(to, from, sizeof(T) * (size_t)count);
    else std::memset(to, 0, sizeof(T) * (size_t)count);
}

template <class Kind, class T> static void forward_all(const ScanArgs& a) {
    constexpr int S = Kind::STATE, M = Kind::MATRIX;
    const Problem<Kind, T> problem(a);
    problem.run([&](const Task& task) {
        alignas(64) T state[LANES_OF_TASK * S], stage[STAGE_BYTES / sizeof(T) + LANES_OF_TASK * S];
        copy(state, problem.at(a.initial, task, 0, S), task.lanes * S);
        const Result<T, S> out(a.states, a, task, stage, problem.streamed);
        const i64 segment = problem.segment(task), sign = problem.direction;
        const bool shared = !a.a_lane;
        for (i64 done = 0; done < a.steps; done += segment) {
            const i64 count = done + segment <= a.steps ? segment : a.steps - done;
            const i64 first = sign > 0 ? done : a.steps - 1 - done, low = sign > 0 ? first : first - count + 1;
            ForwardSteps<T> s;
            s.count = count;
            s.a = {problem.at(a.a, task, first, M, shared), sign * a.a.t};
            s.b = {problem.at(a.b, task, first, S), sign * a.b.t};
            s.shared = shared;
            s.reset = problem.reset(task, first); s.reset_t = sign * a.reset.t;
            s.out_t = 0;
            s.out = out.open(low, first, sign, s.out_t);
            s.state = state;
            every_lane<Forward<Kind, T>, Kind, T>(s, task.lanes);
            out.close(low, count);
        }
        if (a.last) copy((T*)a.last + (task.row * a.lanes + task.lane) * S, state, task.lanes * S);
    });
}

template <class Kind, class T> static void backward_all(const ScanArgs& a) {
    constexpr int S = Kind::STATE, M = Kind::MATRIX;
    const Problem<Kind, T> problem(a);
    const bool summed = a.grad_a && a.grad_a_steps == 1 && a.steps > 1;
    problem.run([&](const Task& task) {
        alignas(64) T carry[LANES_OF_TASK * S], sum[LANES_OF_TASK * M], total[LANES_OF_TASK * M];
        alignas(64) T stage_a[STAGE_BYTES / sizeof(T) + LANES_OF_TASK * M];
        alignas(64) T stage_b[STAGE_BYTES / sizeof(T) + LANES_OF_TASK * S];
        copy(carry, problem.at(a.grad_last, task, 0, S), task.lanes * S);
        copy(sum, (const T*)nullptr, task.lanes * M);
        copy(total, (const T*)nullptr, task.lanes * M);
        const Result<T, S> out_b(a.grad_b, a, task, stage_b, problem.streamed);
        const Result<T, M> out_a(summed ? nullptr : a.grad_a, a, task, stage_a, problem.streamed);
        const T* states = a.states ? (const T*)a.states + (task.row * a.steps * a.lanes + task.lane) * S : nullptr;
        const i64 segment = problem.segment(task), sign = -problem.direction, ends = sign > 0 ? a.steps - 1 : 0;
        const bool shared = !a.a_lane;
        i64 since = 0;
        for (i64 done = 0, count; done < a.steps; done += count) {
            count = done + segment < a.steps ? segment : a.steps - done;
            if (done + count == a.steps && count > 1) --count;  // before the first step stands the initial state
            const i64 first = sign > 0 ? done : a.steps - 1 - done, low = sign > 0 ? first : first - count + 1;
            BackwardSteps<T> s;
            s.count = count;
            s.a = {problem.at(a.a, task, first, M, shared), sign * a.a.t};
            s.grad = {problem.at(a.grad, task, first, S), sign * a.grad.t};
            if (first == ends) s.before = {problem.at(a.initial, task, 0, S), 0};
            else s.before = {states ? states + (first + sign) * a.lanes * S : nullptr, sign * a.lanes * S};
            s.shared = shared;
            s.reset = problem.reset(task, first); s.reset_t = sign * a.reset.t;
            s.grad_b_t = s.grad_a_t = 0;
            s.grad_b = out_b.open(low, first, sign, s.grad_b_t);
            s.grad_a = out_a.open(low, first, sign, s.grad_a_t);
            s.sum = summed ? sum : nullptr;
            s.carry = carry;
            every_lane<Backward<Kind, T>, Kind, T>(s, task.lanes);
            out_b.close(low, count);
            out_a.close(low, count);
            since += count;
            if (summed && (since >= SUM_STEPS || done + count == a.steps)) {  // in two levels: rounding grows slowly
                for (i64 i = 0; i < task.lanes * M; ++i) { total[i] += sum[i]; sum[i] = 0; }
                since = 0;
            }
        }
        if (summed) copy((T*)a.grad_a + (task.row * a.lanes + task.lane) * M, total, task.lanes * M);
        if (a.grad_initial) copy((T*)a.grad_initial + (task.row * a.lanes + task.lane) * S, carry, task.lanes * S);
    });
}
