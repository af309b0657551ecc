// A depthwise convolution with the last `taps` inputs, and its gradient: plain C, nothing of torch or Python.
//
//     y_tc = bias_c + sum_k w_c,taps-1-k x_t-k,c
// Steps that are skipped are not there: the window passes over them. Strides count elements; 0 repeats.
#pragma once

#include "library.h"

// Every field is eight bytes wide: Python fills the struct as one array of integers, in this order.
struct ConvolveArgs {
    i64 doubles;                        // 1: all numbers are doubles; 0: floats
    i64 batch, times, channels, taps;
    const void* x; i64 x_b, x_t;        // (channels)
    const void* weight; i64 weight_b;   // (channels, taps)
    const void* bias; i64 bias_b;       // (channels), or null
    const void* initial; i64 initial_b; // (taps - 1, channels), the oldest first; or null
    const uint8_t* mask; i64 mask_b;    // (times), 0 = the step is skipped; or null
    const uint8_t* reset; i64 reset_b;  // (times), 1 = what came before counts as 0; or null
    // results, contiguous
    void* y;                            // (batch, times, channels)
    void* final;                        // (batch, taps - 1, channels)
    void* parallel_for;                 // torch_parallel_for, or null for one thread
    // backward: gradients of y and final, contiguous, or null; those of the arguments, contiguous, of every row of the
    // batch, or null where they are not wanted
    const void* grad_y;
    const void* grad_final;
    void* grad_x;       // (batch, times, channels)
    void* grad_weight;  // (batch, channels, taps)
    void* grad_bias;    // (batch, channels)
    void* grad_initial; // (batch, taps - 1, channels)
};

struct ConvolveCode {
    int (*forward)(const ConvolveArgs&);
    int (*backward)(const ConvolveArgs&);
};
