// A bank of diagonal systems that do not change in time, one input and one output a channel, and its gradient:
//     h_t = a h_{t-1} + b u_t,   y_t = Re sum over states of C h_t.
#pragma once

#include "rows.h"

// Strides count real numbers (bytes for reset); channels are contiguous in u, channels and states in the coefficients,
// which are complex. Every field is eight bytes wide: Python fills the struct as one array of integers, in this order.
struct BankArgs {
    i64 doubles;          // 1: doubles, 0: floats
    i64 steps, width, states;
    i64 threads;
    void* parallel_for;
    Rows rows;
    Array u;              // (rows, steps, width)
    Array a, b, C;        // (rows, width, states)
    Array initial;        // (rows, width, states); null = zero
    Array reset;          // (rows, steps) bytes, 1 = the state before the step counts as zero; null = never
    Array grad_y;         // backward: (rows, steps, width); null = zero
    Array grad_final;     // backward: (rows, width, states); null = zero
    void* y;              // (rows, steps, width)
    void* final;          // (rows, width, states)
    void* tape;           // the states before every BANK_STEPS steps, for the backward pass: bank_tape_size; null = not wanted
    void* grad_u;         // (rows, steps, width); null = not wanted, as below
    void* grad_a;         // these (rows, width, states)
    void* grad_b;
    void* grad_C;
    void* grad_initial;
};

enum { BANK_STEPS = 64, BANK_BYTES = 64 };  // of a block of lanes, a register of the widest kind; known to Python
