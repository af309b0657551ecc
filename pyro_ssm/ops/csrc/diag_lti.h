// A bank of diagonal systems that do not change in time, one input and one output a channel, and its gradient: plain C,
// nothing of torch or Python.
//     h_t = a h_{t-1} + b u_t,   y_t = Re sum over states of C h_t.
#pragma once

#include "library.h"

enum { BANK_STEPS = 64, BANK_BYTES = 64 };  // of a block of lanes, a register of the widest kind; known to Python

// a, b, C and states are complex: pairs of numbers. Strides count numbers; 0 repeats. The dims named in brackets are
// contiguous. Every field is eight bytes wide: Python fills the struct as one array of integers, in this order.
struct BankArgs {
    enum { STEPS = BANK_STEPS };        // of a segment
    i64 doubles;                        // 1: all numbers are doubles; 0: floats
    i64 batch, times, channels, n;      // n states a channel
    const void* u; i64 u_b, u_t;        // (channels)
    const void* a; i64 a_b;             // (channels, n, 2)
    const void* b; i64 b_b;
    const void* C; i64 C_b;
    const void* initial; i64 initial_b; // (channels, n, 2), or null
    const uint8_t* reset; i64 reset_b;  // (times), 1 = the state before the step counts as 0; or null
    // results, contiguous
    void* y;                            // (batch, times, channels)
    void* final;                        // (batch, channels, n, 2)
    void* kept;                         // for the backward pass, the states before every STEPS steps; null = not wanted
    void* parallel_for;                 // torch_parallel_for, or null for one thread
    // backward: gradients of y and final, contiguous, or null; those of the arguments, contiguous, of every row of the
    // batch, or null where they are not wanted
    const void* grad_y;
    const void* grad_final;
    void* grad_u;                       // (batch, times, channels)
    void* grad_a;                       // (batch, channels, n, 2), as those below
    void* grad_b;
    void* grad_C;
    void* grad_initial;
};
