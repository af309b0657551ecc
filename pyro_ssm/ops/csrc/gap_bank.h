// A bank of diagonal systems in continuous time whose steps differ, and its gradient: with e(x) = e^x - 1 or x / (1 - x / 2),
//     h_t = h_{t-1} + e(step_t a) (h_{t-1} + b u_t),   y_t = Re sum over states of C h_t.
#pragma once

#include "diag_lti.h"

enum BankMethod { BANK_ZOH, BANK_BILINEAR };

// As BankArgs.
struct GapArgs {
    enum { STEPS = BANK_STEPS };
    i64 doubles;
    i64 batch, times, channels, n;
    i64 method;                         // BankMethod
    const void* u; i64 u_b, u_t;
    const void* step; i64 step_b, step_t;  // (channels)
    const void* a; i64 a_b;
    const void* b; i64 b_b;
    const void* C; i64 C_b;
    const void* initial; i64 initial_b;
    const uint8_t* reset; i64 reset_b;
    void* y;
    void* final;
    void* kept;
    void* parallel_for;
    const void* grad_y;
    const void* grad_final;
    void* grad_u;
    void* grad_step;                    // (batch, times, channels)
    void* grad_a;
    void* grad_b;
    void* grad_C;
    void* grad_initial;
};
