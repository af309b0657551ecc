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

EXPORT void pyro_ssm_normalise_f32(const float* a, const float* b, i64 n, i64 series, float* log_w, float* w,
                                   float* total, float* ess) {
    code().normalise_f32(a, b, n, series, log_w, w, total, ess);
}
EXPORT void pyro_ssm_normalise_f64(const double* a, const double* b, i64 n, i64 series, double* log_w, double* w,
                                   double* total, double* ess) {
    code().normalise_f64(a, b, n, series, log_w, w, total, ess);
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

EXPORT int pyro_ssm_ancestors_f32(i64 scheme, const float* w, const double* u, const uint8_t* need, i64 n, i64 series,
                                  i64* out) {
    return code().ancestors_f32(scheme, w, u, need, n, series, out);
}
EXPORT int pyro_ssm_ancestors_f64(i64 scheme, const double* w, const double* u, const uint8_t* need, i64 n, i64 series,
                                  i64* out) {
    return code().ancestors_f64(scheme, w, u, need, n, series, out);
}
EXPORT void pyro_ssm_ancestors_of_counts(const i64* upto, i64 n, i64 series, i64* out) {
    code().ancestors_of_counts(upto, n, series, out);
}
EXPORT int pyro_ssm_take(const char* x, const i64* at, i64 n, i64 rows, i64 series, i64 bytes, char* out) {
    return code().take(x, at, n, rows, series, bytes, out);
}
EXPORT void pyro_ssm_affine_draw_f32(const float* x, const float* e, const float* A, const float* b, const float* s, i64 rows,
                                     i64 dim, float* out) {
    code().affine_draw_f32(x, e, A, b, s, rows, dim, out);
}
EXPORT int pyro_ssm_normal_density_f32(const float* value, i64 value_whole, const float* loc, i64 loc_whole,
                                       const float* scale, i64 scale_whole, i64 n, i64 width, i64 dim, float* out) {
    try {
        code().normal_density_f32(value, value_whole, loc, loc_whole, scale, scale_whole, n, width, dim, out);
    } catch (const std::bad_alloc&) { return 1; }
    return 0;
}
EXPORT void pyro_ssm_affine_draw_f64(const double* x, const double* e, const double* A, const double* b, const double* s, i64 rows,
                                     i64 dim, double* out) {
    code().affine_draw_f64(x, e, A, b, s, rows, dim, out);
}
EXPORT int pyro_ssm_normal_density_f64(const double* value, i64 value_whole, const double* loc, i64 loc_whole,
                                       const double* scale, i64 scale_whole, i64 n, i64 width, i64 dim, double* out) {
    try {
        code().normal_density_f64(value, value_whole, loc, loc_whole, scale, scale_whole, n, width, dim, out);
    } catch (const std::bad_alloc&) { return 1; }
    return 0;
}
EXPORT int pyro_ssm_particle_step_f32(ParticleStep<float>* job) { return code().step_f32(job); }
EXPORT int pyro_ssm_particle_step_f64(ParticleStep<double>* job) { return code().step_f64(job); }
