// What the particle operators need for each instruction set, and the numbers that both sides of them agree on.
#pragma once

#include "library.h"

constexpr i64 NORMALS_CHUNK = 1 << 16;  // normals drawn from one start of the generator

struct ParticleCode {
    // See normalise.h; a and b (or null): (n, series); total and ess: (series).
    void (*normalise_f32)(const float* a, const float* b, i64 n, i64 series, float* log_w, float* w, float* total,
                          float* ess);
    void (*normalise_f64)(const double* a, const double* b, i64 n, i64 series, double* log_w, double* w, double* total,
                          double* ess);
    // See random.h; at most NORMALS_CHUNK numbers.
    void (*normals)(uint64_t seed, i64 chunk, i64 count, float* out);
    // See gaussian.h.
    void (*affine_draw_f32)(const float* x, const float* e, const float* A, const float* b, const float* s, i64 rows,
                            i64 dim, float* out);
    void (*affine_draw_f64)(const double* x, const double* e, const double* A, const double* b, const double* s,
                            i64 rows, i64 dim, double* out);
    void (*normal_density_f32)(const float* value, i64 value_whole, const float* loc, i64 loc_whole, const float* scale,
                               i64 scale_whole, i64 n, i64 width, i64 dim, float* out);
    void (*normal_density_f64)(const double* value, i64 value_whole, const double* loc, i64 loc_whole,
                               const double* scale, i64 scale_whole, i64 n, i64 width, i64 dim, double* out);
};
