// Rows of arrays whose leading dims were merged as far as they could be (pyro_ssm/ops/operator.py: rows_of).
#pragma once

#include "library.h"

constexpr i64 MAX_DIMS = 6;

// The sizes of the leading dims, the innermost first.
struct Rows { i64 size[MAX_DIMS]; };

// One array: where it begins, and its strides over the leading dims and over time; 0 repeats.
struct Array { const void* data; i64 of[MAX_DIMS]; i64 t; };

static inline DEVICE_TOO i64 row_count(const Rows& rows) {
    i64 count = 1;
    for (i64 d = 0; d < MAX_DIMS; ++d) count *= rows.size[d];
    return count;
}
static inline DEVICE_TOO i64 row_offset(const Rows& rows, const Array& array, i64 row) {
    i64 offset = 0;
    for (i64 d = 0; d < MAX_DIMS && row; ++d) {
        offset += row % rows.size[d] * array.of[d];
        row /= rows.size[d];
    }
    return offset;
}
