// y = x W^T for a few rows of x, on weights as they lie in memory: row-major, fp32, bf16 or int8 with a scale per output.
//
// Every product of a row of x and a row of W is summed in the same order, LANES partial sums over steps of LANES inputs
// and then those in a fixed tree, whatever rows stand beside it: a row's results have the same bits in every batch.
// Weights come from memory once: while the first rows of x use a block of outputs, the block after it is fetched.

#include <algorithm>

#include "vectors.h"

namespace {

// Rows of x and outputs of a tile: accumulators for each pair, and registers left for the operands.
constexpr int ROWS = 4;
constexpr int OUTPUTS = LANES == 16 ? 4 : 2;
constexpr int VECTOR_OUTPUTS = 8;  // with a single row
constexpr int64_t BLOCK = 32;      // outputs that stay in the cache while all rows pass
constexpr int64_t AHEAD = 32;      // outputs between what is used and what is fetched

template <int M, int N, bool FETCH, typename Weight>
inline void tile(
    const float* x, const Weight* weight, const float* scale, float* y, int64_t inputs, int64_t outputs, bool add
) {
    constexpr int VECTORS = (M * N + LANES - 1) / LANES * LANES;
    Floats sums[VECTORS] = {};
    int64_t k = 0;
    for (; k + LANES <= inputs; k += LANES) {
        // In the order of addresses, not of use: memory answers runs faster than strides.
        if (FETCH && k % (64 / sizeof(Weight)) == 0) {
            const char* ahead = reinterpret_cast<const char*>(weight + AHEAD * inputs + k * N);
            for (int n = 0; n < N; n++) __builtin_prefetch(ahead + 64 * n, 0, 2);
        }
        Floats weights[N];
        for (int n = 0; n < N; n++) weights[n] = load(weight + n * inputs + k);
        for (int m = 0; m < M; m++) {
            Floats row = load(x + m * inputs + k);
            for (int n = 0; n < N; n++) sums[m * N + n] = multiply_add(row, weights[n], sums[m * N + n]);
        }
    }
    if (k < inputs) {
        for (int m = 0; m < M; m++) {
            Floats row = load_some(x + m * inputs + k, inputs - k);
            for (int n = 0; n < N; n++) {
                Floats weights = load_some(weight + n * inputs + k, inputs - k);
                sums[m * N + n] = multiply_add(row, weights, sums[m * N + n]);
            }
        }
    }
    float results[VECTORS];
    for (int first = 0; first < VECTORS; first += LANES) store(results + first, lane_sums(sums + first));
    for (int m = 0; m < M; m++) {
        for (int n = 0; n < N; n++) {
            float result = results[m * N + n], *target = y + m * outputs + n;
            if (scale) result *= scale[n];
            *target = add ? *target + result : result;
        }
    }
}

template <int M, int N, bool FETCH, typename Weight>
inline void strip(
    const float* x, const Weight* weight, const float* scale, float* y, int64_t inputs, int64_t outputs,
    int64_t first, int64_t last, bool add
) {
    int64_t n = first;
    for (; n + N <= last; n += N) {
        tile<M, N, FETCH>(x, weight + n * inputs, scale ? scale + n : scale, y + n, inputs, outputs, add);
    }
    for (; n < last; n++) {
        tile<M, 1, false>(x, weight + n * inputs, scale ? scale + n : scale, y + n, inputs, outputs, add);
    }
}

template <typename Weight>
void linear(
    const float* x, const Weight* weight, const float* scale, float* y, int64_t rows, int64_t outputs, int64_t inputs,
    bool add
) {
    int64_t blocks = (outputs + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        int64_t first = block * BLOCK, last = std::min(outputs, first + BLOCK), m = 0;
        for (; m + ROWS <= rows; m += ROWS) {
            auto run = m == 0 ? strip<ROWS, OUTPUTS, true, Weight> : strip<ROWS, OUTPUTS, false, Weight>;
            run(x + m * inputs, weight, scale, y + m * outputs, inputs, outputs, first, last, add);
        }
        for (; m < rows; m++) {
            auto run = m == 0 ? strip<1, VECTOR_OUTPUTS, true, Weight> : strip<1, VECTOR_OUTPUTS, false, Weight>;
            run(x + m * inputs, weight, scale, y + m * outputs, inputs, outputs, first, last, add);
        }
    }
}

}  // namespace

extern "C" {

void linear_fp32(
    const float* x, const float* weight, float* y, int64_t rows, int64_t outputs, int64_t inputs, int64_t add
) {
    linear(x, weight, nullptr, y, rows, outputs, inputs, add);
}

void linear_bf16(
    const float* x, const bfloat16* weight, float* y, int64_t rows, int64_t outputs, int64_t inputs, int64_t add
) {
    linear(x, weight, nullptr, y, rows, outputs, inputs, add);
}

void linear_int8(
    const float* x, const int8_t* weight, const float* scale, float* y, int64_t rows, int64_t outputs, int64_t inputs,
    int64_t add
) {
    linear(x, weight, scale, y, rows, outputs, inputs, add);
}

}
