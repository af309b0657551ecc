// A small network of each coordinate of a vector, and its gradient: plain C, nothing of torch or Python.
//
//     a_ri = c_i + sum_h v_ih softplus(w_ih z_ri + b_ih)
#pragma once

#include "library.h"

// Every field is eight bytes wide: Python fills the struct as one array of integers, in this order. Arrays are
// contiguous.
struct CoordinateArgs {
    i64 doubles;                 // 1: all numbers are doubles; 0: floats
    i64 rows, coordinates, hidden;
    void* parallel_for;          // torch_parallel_for, or null for one thread
    const void* z;               // (rows, coordinates)
    const void *slope, *shift, *weight;  // w, b, v: (coordinates, hidden)
    const void* bias;            // c: (coordinates)
    void* a;                     // result, (rows, coordinates)
    // backward: the gradient of a; those of the others, to which it is added
    const void* grad_a;
    void* grad_z;
    void *grad_slope, *grad_shift, *grad_weight;
    void* grad_bias;
};

// One for each instruction set; selective_scan.cpp chooses.
struct CoordinateCode {
    int (*forward)(const CoordinateArgs&);
    int (*backward)(const CoordinateArgs&);
};
