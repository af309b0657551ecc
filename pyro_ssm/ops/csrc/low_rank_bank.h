// A bank of systems that are diagonal plus low rank and do not change in time, and its gradient: with real k_t of `rank`
// numbers,
//     h_t = a h_{t-1} + b u_t - sum_j W_j k_tj,   k_tj = Re sum over states of Q_j h_{t-1},
//     y_t = Re sum over states of C h_t.
#pragma once

#include "diag_lti.h"

enum { LOW_RANK_STEPS = 32, BANK_RANK = 2 };  // the largest rank; known to Python

// As BankArgs.
struct LowRankArgs {
    enum { STEPS = LOW_RANK_STEPS };    // of a segment: the backward pass has all their states at once
    i64 doubles;
    i64 batch, times, channels, n;
    i64 rank;                           // 1 to BANK_RANK
    const void* u; i64 u_b, u_t;
    const void* a; i64 a_b;
    const void* b; i64 b_b;
    const void* C; i64 C_b;
    const void* W; i64 W_b;             // (channels, rank, n, 2)
    const void* Q; i64 Q_b;
    const void* initial; i64 initial_b;
    const uint8_t* reset; i64 reset_b;
    void* y;
    void* final;
    void* kept;
    void* parallel_for;
    const void* grad_y;
    const void* grad_final;
    void* grad_u;
    void* grad_a;
    void* grad_b;
    void* grad_C;
    void* grad_W;                       // (batch, channels, rank, n, 2)
    void* grad_Q;
    void* grad_initial;
};
