// A function of every number of an array: plain C, nothing of torch.
#pragma once

#include "library.h"

enum Elementwise { ELEMENTWISE_EXP, ELEMENTWISE_LOGISTIC, ELEMENTWISE_SOFTPLUS, ELEMENTWISE_SOFTPLUS_GRAD };

// Every field is eight bytes wide. Arrays are contiguous; `out` may be `x` or `other`.
struct ElementwiseArgs {
    i64 doubles;         // 1: double, 0: float
    i64 what;            // Elementwise
    i64 count;
    void* parallel_for;  // torch_parallel_for, or null for one thread
    const void* x;       // of SOFTPLUS_GRAD: the result of the softplus
    const void* other;   // of SOFTPLUS_GRAD: the gradient of that result
    void* out;
};

enum ElementwiseStatus { ELEMENTWISE_OK = 0, ELEMENTWISE_UNKNOWN = 1 };

// One for each instruction set; selective_scan.cpp chooses.
struct ElementwiseCode { int (*apply)(const ElementwiseArgs&); };
