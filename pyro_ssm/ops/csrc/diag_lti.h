// A bank of systems whose coefficients do not change in time, one input and one output a channel, and its gradient; diagonal ones
//     h_t = a h_{t-1} + b u_t,   y_t = Re sum over states of C h_t,
// or diagonal plus low rank, with real k_t of `rank` numbers,
//     h_t = a h_{t-1} + b u_t - sum_j W_j k_tj,   k_tj = Re sum over states of Q_j h_{t-1},
// or diagonal ones in continuous time whose steps differ, with e(x) = e^x - 1 or x / (1 - x / 2),
//     h_t = h_{t-1} + e(step_t a) (h_{t-1} + b u_t).
#pragma once

#include "rows.h"

// Strides count real numbers (bytes for reset); channels are contiguous in u, channels and states in the coefficients,
// which are complex. Every field is eight bytes wide: Python fills the struct as one array of integers, in this order.
struct BankArgs {
    i64 doubles;          // 1: doubles, 0: floats
    i64 steps, width, states;
    i64 rank;             // 0 to BANK_RANK; 0 = diagonal
    i64 method;           // BankMethod; read where steps differ
    i64 threads;
    void* parallel_for;
    Rows rows;
    Array u;              // (rows, steps, width)
    Array a, b, C;        // (rows, width, states)
    Array W, Q;           // (rows, width, rank, states); null where the rank is 0
    Array initial;        // (rows, width, states); null = zero
    Array reset;          // (rows, steps) bytes, 1 = the state before the step counts as zero; null = never
    Array step;           // (rows, steps, width); null = a and b are of one step, the same for all times
    Array grad_y;         // backward: (rows, steps, width); null = zero
    Array grad_final;     // backward: (rows, width, states); null = zero
    void* y;              // (rows, steps, width)
    void* final;          // (rows, width, states)
    void* tape;           // the states before every segment of steps, for the backward pass; null = not wanted
    void* grad_u;         // (rows, steps, width); null = not wanted, as below
    void* grad_a;         // these (rows, width, states)
    void* grad_b;
    void* grad_C;
    void* grad_W;         // (rows, width, rank, states)
    void* grad_Q;
    void* grad_initial;
    void* grad_step;      // (rows, steps, width); written where steps differ, and wanted
};

enum BankMethod { BANK_ZOH, BANK_BILINEAR };

// Known to Python: steps of a segment, of diagonal systems and of others (all of whose states the backward pass has at
// once); bytes of a block of lanes, a register of the widest kind; the largest rank.
enum { BANK_STEPS = 64, LOW_RANK_STEPS = 32, BANK_BYTES = 64, BANK_RANK = 2 };
