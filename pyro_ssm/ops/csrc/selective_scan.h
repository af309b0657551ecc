// The selective scan and its gradient: plain C, nothing of torch or Python.
//
// For each row of the batch, channel c of head j = c / (channels / heads), group k = c / (channels / groups):
//     delta_t = gap_t s(dt_tj + bias_j),  h_t = a(delta_t A_j) h_{t-1} + delta_t u_tc w(delta_t A_j) B_tk,
//     y_tc = (C_tk . h_t + D_j u_tc) silu(z_tc),   s = softplus or the identity; a, w: selective_rule.h.
// One channel a head: Mamba. Several, with one A a head: the state-space duality of Mamba-2.
// Strides count elements; 0 repeats. The dims named in brackets are contiguous.
#pragma once

#include "library.h"

// Every field is eight bytes wide: Python fills the struct as one array of integers, in this order.
struct SelectiveArgs {
    i64 doubles;                                          // 1: all numbers are doubles; 0: floats
    i64 batch, times, channels, heads, groups, n, decays; // n states a channel; decays: n, or 1 for all of them
    i64 softplus, rule;
    const void* u; i64 u_b, u_t;        // (channels)
    const void* dt; i64 dt_b, dt_t;     // (heads)
    const void* A; i64 A_b;             // (heads, decays)
    const void* B; i64 B_b, B_t;        // (groups, n)
    const void* C; i64 C_b, C_t;        // (groups, n)
    const void* D; i64 D_b;             // (heads), or null
    const void* z; i64 z_b, z_t;        // (channels), or null
    const void* bias; i64 bias_b;       // (heads), or null
    const void* gap; i64 gap_b, gap_t;  // or null
    const uint8_t* mask; i64 mask_b;    // (times), 0 = the step is skipped; or null
    const uint8_t* reset; i64 reset_b;  // (times), 1 = the state before the step counts as 0; or null
    const void* initial; i64 initial_b; // (channels, n), or null
    // results, contiguous
    void* y;                            // (batch, times, channels)
    void* final;                        // (batch, channels, n)
    void* kept;                         // (batch, chunks - 1, n, channels): the state before each chunk but the first
    void* parallel_for;                 // torch_parallel_for, or null for one thread
    // backward: gradients of y and final, contiguous, or null; gradients of the arguments, contiguous, or null where
    // they are not wanted, each of every row of the batch
    const void* grad_y;
    const void* grad_final;
    void* grad_u;       // (batch, times, channels)
    void* grad_dt;      // (batch, times, heads)
    void* grad_A;       // (batch, heads, decays)
    void* grad_B;       // (batch, times, groups, n)
    void* grad_C;
    void* grad_D;       // (batch, heads)
    void* grad_z;       // (batch, times, channels)
    void* grad_bias;    // (batch, heads)
    void* grad_gap;     // (batch, times)
    void* grad_initial; // (batch, channels, n)
};

enum { SELECTIVE_CHUNK = 16 };  // steps between the states that are kept
// Rules; where one decay serves all states: euler alone.
enum { SELECTIVE_EULER = 0, SELECTIVE_ZOH = 1, SELECTIVE_BILINEAR = 2 };

// One set of functions for each instruction set; selective_scan.cpp chooses. They return 0, or 2 where memory ran out,
// or 3 for a rule that is not known.
struct SelectiveCode {
    int (*forward)(const SelectiveArgs&);
    int (*backward)(const SelectiveArgs&);
};
