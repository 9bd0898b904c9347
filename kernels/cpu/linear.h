// Weights of a linear layer, and the product with them.
#pragma once

#include "vectors.h"

enum Kind : int64_t { FP32, BF16, INT8, INT4 };

// What Python fills in as numbers of 64 bits.
struct Matrix {
    const void* values;   // [outputs, inputs], row-major
    const void* scale;    // INT8: fp32 [outputs]; INT4: bf16 [groups, outputs]
    const int8_t* zero;   // INT4: [groups, outputs]
    int64_t kind, group, outputs, inputs;
};

// y = x W^T, or y += x W^T; x [rows, inputs] and y [rows, outputs] are contiguous.
void linear(const float* x, const Matrix& weight, float* y, int64_t rows, bool add);
