// What the particle operators need for each instruction set, and the numbers that both sides of them agree on.
#pragma once

#include "library.h"

constexpr i64 NORMALS_CHUNK = 1 << 16;  // normals drawn from one start of the generator

enum ResamplingScheme { SYSTEMATIC = 0, STRATIFIED = 1, POINTS = 2 };

// See particle_step.h; every field has eight bytes, as in ops/particle_step.py. Pointers that may be null say so.
template <class T> struct ParticleStep {
    i64 k, n, series, dim;
    i64 fresh;                 // 1: all log-weights are -log n, whatever stands there; 1 at first
    T *log_weights, *weights;  // (n, series): of total 1 after the last step, in between see particle_step.h; memory
    T* pending;                // (2, series), 0 at first
    T *total, *ess;            // (time, series)
    // the log potential of step k (n, series): given, or a normal density, or null for a step without observation
    const T *potential, *value, *density_loc, *density_scale;
    i64 value_whole, loc_whole, scale_whole, obs_dim;
    T* densities;           // (n * series + SPARE), memory for them, and for numbers of the ancestors
    const uint8_t* active;  // (series): 0 where nothing was observed; null: no such series
    // what a caller wants to keep of the cloud of step k (n, series), or null
    T* kept_log_weights;
    i64* kept_ancestors;  // of step k + 1; written where a series is resampled
    // resampling before step k + 1
    i64 always;
    double least_ess;
    i64 resampling;
    const double* uniforms;  // (rows, series); null: drawn here
    double* drawn;           // (rows, series), memory for them
    const uint8_t* alive;    // (series): 0 where a series has ended by step k + 1; null: no such series
    uint8_t* resampled;      // (time, series)
    int32_t* ancestors;      // (n * series + SPARE), memory for them
    // the move to step k + 1; moved is null at the last step
    const T *state, *noise;            // (n, series, dim); without noise, float32 normals are drawn here
    const T *mean, *matrix, *offset;   // mean (n, series, dim), or null: then matrix and offset
    const T* scale;
    i64 own;         // 1: matrix (series, dim, dim), offset and scale (series, dim); 0: one for all series
    i64 each_scale;  // 1: scale (n, series, dim)
    T* moved;
    i64 seed, uniform_seed;  // of the run, for what is drawn here
    void* parallel_for;      // of torch; null: one thread
};

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
    // See resampling.h.
    int (*ancestors_f32)(i64 scheme, const float* w, const double* u, const uint8_t* need, i64 n, i64 series, i64* out);
    int (*ancestors_f64)(i64 scheme, const double* w, const double* u, const uint8_t* need, i64 n, i64 series, i64* out);
    void (*ancestors_of_counts)(const i64* upto, i64 n, i64 series, i64* out);
    int (*take)(const char* x, const i64* at, i64 n, i64 rows, i64 series, i64 bytes, char* out);
    // See particle_step.h.
    int (*step_f32)(ParticleStep<float>* job);
    int (*step_f64)(ParticleStep<double>* job);
};
