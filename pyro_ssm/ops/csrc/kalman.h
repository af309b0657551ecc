// The Kalman filter and its gradient: plain C, nothing of torch or Python.
//
// Model, for series i of group g (a group shares one covariance recursion):
//     z_1 ~ N(m, L L'),  z_{k+1} = F z_k + b + Q e,  y_k = H z_k + d + R e'.
// All numbers are doubles. Strides count elements; 0 repeats (a shared parameter, one value for all times). The last
// dims of every array are contiguous.
#pragma once

#include "library.h"

// Every field is eight bytes wide: Python fills the struct as one array of integers, in this order.
struct KalmanArgs {
    i64 groups, series, times, seen, n, p;  // series in a group; observed times; state and observation size
    const double* y; i64 y_g, y_i, y_t;     // (seen, p)
    const uint8_t* mask; i64 mask_g;        // (seen, p), 1 = observed; null = everything is
    const uint8_t* move; i64 move_g;        // (times), 0 = the state does not move into this time; null = always
    const i64* lengths;                     // (groups, series): from this time on a series stands still; null = never
    const i64* at;                          // (seen) ascending times of the observations; null = all times
    const double* m; i64 m_g, m_i;          // (n)
    const double* L; i64 L_g;               // (n, n)
    const double* F; i64 F_g, F_t;          // (times - 1, n, n)
    const double* b; i64 b_g, b_i, b_t;     // (times - 1, n)
    const double* Q; i64 Q_g, Q_t;          // (times - 1, n, n)
    const double* H; i64 H_g, H_t;          // (seen, p, n)
    const double* d; i64 d_g, d_i, d_t;     // (seen, p)
    const double* R; i64 R_g, R_t;          // (seen, p, p)
    // results, contiguous; null = not wanted
    double* log_likelihood;                 // (groups, series, times)
    double* filtered_mean;                  // (groups, series, times, n)
    double* predicted_mean;
    double* filtered_root;                  // (groups, times, n, n)
    double* predicted_root;
    double* tape;                           // kalman_tape_size(...) doubles, read by the backward pass; there null
                                            // = filter again, a group at a time
    i64* failed;                            // (2): group and time of a singular innovation covariance
    void* parallel_for;                     // torch_parallel_for, or null for one thread
    // backward: gradients of the results, contiguous but for the first; null = zero
    const double* grad_log_likelihood; i64 grad_g, grad_i, grad_t;  // strides, which may be 0
    const double* grad_filtered_mean;
    const double* grad_predicted_mean;
    // backward: gradients of the arguments. Null = not wanted. Where a stride of the argument is 0, its gradient is
    // summed over that dim; grad_y, grad_b and grad_m are per series and time: their caller sums.
    double* grad_y;                         // (groups, series, seen, p)
    double* grad_m;                         // (groups, series, n)
    double* grad_L;                         // (groups or 1, n, n)
    double* grad_F;                         // (groups or 1, times - 1 or 1, n, n)
    double* grad_b;                         // (groups, series, times - 1, n)
    double* grad_b_sum;                     // (groups, series, n): its sum over times
    double* grad_Q;                         // (groups or 1, times - 1 or 1, n, n)
    double* grad_H;                         // (groups or 1, seen or 1, p, n)
    double* grad_d_sum;                     // (groups, series, p): the sum over times of minus grad_y
    double* grad_R;                         // (groups or 1, seen or 1, p, p)
};

// A sequence of matrices or vectors for each row: row r at time k reads data + of[r] * stride + k * step.
struct Sequence { const double* data; const i64* of; i64 stride, step; };

// Recursions back over time, a row each. What: 0 = the laws N(G z' + c, D D') of each state given the next one; 1 =
// roots of the smoothed covariances; 2 = x_k = G x_{k+1} + c. Eight bytes a field, as above.
struct BackwardArgs {
    i64 what, rows, moves, n;
    Sequence first;   // 0: F; 1 and 2: G
    Sequence second;  // 0: Q; 1: D; 2: c
    Sequence third;   // 0: filtered roots; 1: the last root; 2: the last x
    double* out;      // 0: G (rows, moves, n, n); 1: roots (rows, moves + 1, n, n); 2: x (rows, moves + 1, n)
    double* out_root; // 0: D (rows, moves, n, n)
    void* parallel_for;
};

enum KalmanStatus { KALMAN_OK = 0, KALMAN_SINGULAR = 1, KALMAN_NO_MEMORY = 2 };

// One set of functions for each instruction set; kalman.cpp chooses.
struct KalmanCode {
    int (*forward)(const KalmanArgs&);
    int (*backward)(const KalmanArgs&);
    i64 (*tape_size)(const KalmanArgs&);
    int (*backwards)(const BackwardArgs&);
};
