// The functions of the particle operators that Python calls, and the choice of code for this processor.
#include "particles.h"
#include "isa.h"

#include <new>

namespace particles_base { extern const ParticleCode code; }
namespace particles_avx2 { extern const ParticleCode code; }
namespace particles_avx512 { extern const ParticleCode code; }

static const ParticleCode& code() {
#if PYRO_SSM_X86
    if (isa_level() == ISA_AVX512) return particles_avx512::code;
    if (isa_level() == ISA_AVX2) return particles_avx2::code;
#endif
    return particles_base::code;
}

struct Normals {
    uint64_t seed;
    i64 count;
    float* out;
    static void chunks(i64 begin, i64 end, void* self) {
        const Normals& job = *(const Normals*)self;
        for (i64 c = begin; c < end; ++c) {
            const i64 at = c * NORMALS_CHUNK, left = job.count - at;
            code().normals(job.seed, c, left < NORMALS_CHUNK ? left : NORMALS_CHUNK, job.out + at);
        }
    }
};
EXPORT void pyro_ssm_normals(i64 seed, i64 count, float* out, void* parallel_for) {
    typedef int32_t (*ParallelFor)(i64, i64, i64, void (*)(i64, i64, void*), void*);
    Normals job{(uint64_t)seed, count, out};
    const i64 num = (count + NORMALS_CHUNK - 1) / NORMALS_CHUNK;
    if (parallel_for && num > 1)
        ((ParallelFor)parallel_for)(0, num, 1, Normals::chunks, &job);
    else
        Normals::chunks(0, num, &job);
}

EXPORT void pyro_ssm_ancestors_of_counts(const i64* upto, i64 n, i64 series, i64* out) {
    code().ancestors_of_counts(upto, n, series, out);
}
EXPORT int pyro_ssm_take(const char* x, const i64* at, i64 n, i64 rows, i64 series, i64 bytes, char* out) {
    return code().take(x, at, n, rows, series, bytes, out);
}

// The functions that there are for floats and for doubles.
#define ENTRIES(T, end) \
    EXPORT void pyro_ssm_normalise_##end(const T* a, const T* b, i64 n, i64 series, T* log_w, T* w, T* total, \
                                           T* ess) { \
        code().normalise_##end(a, b, n, series, log_w, w, total, ess); \
    } \
    EXPORT int pyro_ssm_ancestors_##end(i64 scheme, const T* w, const double* u, const uint8_t* need, i64 n, \
                                        i64 series, i64* out) { \
        return code().ancestors_##end(scheme, w, u, need, n, series, out); \
    } \
    EXPORT void pyro_ssm_affine_draw_##end(const T* x, const T* e, const T* A, const T* b, const T* s, i64 rows, \
                                           i64 dim, T* out) { \
        code().affine_draw_##end(x, e, A, b, s, rows, dim, out); \
    } \
    EXPORT int pyro_ssm_normal_density_##end(const T* value, i64 value_whole, const T* loc, i64 loc_whole, \
                                             const T* scale, i64 scale_whole, i64 n, i64 width, i64 dim, T* out) { \
        try { \
            code().normal_density_##end(value, value_whole, loc, loc_whole, scale, scale_whole, n, width, dim, out); \
        } catch (const std::bad_alloc&) { return 1; } \
        return 0; \
    } \
    EXPORT int pyro_ssm_particle_step_##end(ParticleStep<T>* job) { return code().step_##end(job); }
ENTRIES(float, f32)
ENTRIES(double, f64)
