// The linear recurrence h_t = a_t h_{t-1} + b_t, one lane a channel, and its gradient: plain C, nothing of torch.
#pragma once

#include "diag_lti.h"
#include "gap_bank.h"
#include "low_rank_bank.h"
#include "rows.h"

enum ScanKind { SCAN_F32, SCAN_F64, SCAN_C64, SCAN_C128, SCAN_PAIR_F32, SCAN_PAIR_F64 };

// Strides count real numbers (bytes for reset); a state is one number or two (complex, pair), a matrix of a one, two
// (complex) or four (2 x 2). Lanes are contiguous. Every field is eight bytes wide: Python fills the struct as one array
// of integers, in this order.
struct ScanArgs {
    i64 kind;             // ScanKind
    i64 steps, lanes;
    i64 reverse;          // 1: from the last time to the first
    i64 threads;          // that there are
    void* parallel_for;   // torch_parallel_for, or null for one thread
    Rows rows;
    Array a; i64 a_lane;  // a_lane: 1, or 0 where all lanes share one
    Array b;
    Array initial;        // null = zero
    Array reset;          // bytes; 1 = the state before the step counts as zero; null = never
    Array grad;           // backward: of the states; null = zero
    Array grad_last;      // backward: of the last state; null = zero
    void* states;         // (rows, steps, lanes), contiguous: a result of the forward pass, read by the backward pass where
                          // grad_a is wanted; null = not wanted
    void* last;           // (rows, lanes): the state after the last step; null = not wanted
    void* grad_a; i64 grad_a_steps;  // (rows, steps or 1, lanes), summed over time where it is 1; null = not wanted
    void* grad_b;         // (rows, steps, lanes)
    void* grad_initial;   // (rows, lanes)
};

enum ScanStatus { SCAN_OK = 0, SCAN_UNKNOWN_KIND = 1, SCAN_NO_MEMORY = 2 };

// One set of functions for each instruction set; linear_scan.cpp chooses.
struct ScanCode {
    int (*forward)(const ScanArgs&);
    int (*backward)(const ScanArgs&);
    int (*bank_forward)(const BankArgs&);
    int (*bank_backward)(const BankArgs&);
    int (*low_rank_forward)(const LowRankArgs&);
    int (*low_rank_backward)(const LowRankArgs&);
    int (*gap_forward)(const GapArgs&);
    int (*gap_backward)(const GapArgs&);
};
