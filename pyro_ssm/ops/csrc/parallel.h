// Included once for each instruction set, inside a namespace of its own.

// fn(begin, end) over [0, count) in pieces, on the threads of torch where it lends them.
template <class Fn>
static void parallel(void* parallel_for, i64 count, i64 grain, Fn& fn) {
    typedef int32_t (*ParallelFor)(i64, i64, i64, void (*)(i64, i64, void*), void*);
    if (!parallel_for || count <= grain) {
        if (count > 0) fn(0, count);
        return;
    }
    ((ParallelFor)parallel_for)(0, count, grain, [](i64 begin, i64 end, void* f) { (*(Fn*)f)(begin, end); }, &fn);
}
