// y = x W^T for a few rows of x, on weights as they lie in memory: row-major, in fp32, bf16, 8 or 4 bits.
//
// Every product of a row of x and a row of W is summed in the same order, LANES partial sums over steps of LANES inputs
// and then those in a fixed tree, whatever rows stand beside it: a row's results have the same bits in every batch.
// Weights come from memory once: while the first rows of x use a block of outputs, the block after it is fetched.

#include "linear.h"

#include <algorithm>
#include <vector>

namespace {

// Rows of x and outputs of a tile: accumulators for each pair, and registers left for the operands.
constexpr int ROWS = 4;
constexpr int OUTPUTS = LANES == 16 ? 4 : 3;
constexpr int VECTOR_OUTPUTS = 8;  // with a single row
constexpr int64_t BLOCK = 48;      // outputs that stay in the cache while all rows pass
constexpr int64_t AHEAD = 48;      // outputs between what is used and what is fetched

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
        for (int n = 0; n < N; n++) {
            weights[n] = load(weight + n * inputs + k);
            if (M > 1) keep(weights[n]);
        }
        for (int m = 0; m < M; m++) {
            Floats row = load(x + m * inputs + k);
            keep(row);
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
    const float* x, const Weight* weight, const float* scale, float* y, int64_t inputs, int64_t outputs, int64_t count,
    bool add
) {
    int64_t n = 0;
    for (; n + N <= count; n += N) {
        tile<M, N, FETCH>(x, weight + n * inputs, scale ? scale + n : scale, y + n, inputs, outputs, add);
    }
    for (; n < count; n++) {
        tile<M, 1, false>(x, weight + n * inputs, scale ? scale + n : scale, y + n, inputs, outputs, add);
    }
}

// All rows of x with the outputs of one block.
template <typename Weight>
void block_of_outputs(
    const float* x, const Weight* weight, const float* scale, float* y, int64_t rows, int64_t outputs, int64_t inputs,
    int64_t count, bool add
) {
    int64_t m = 0;
    for (; m + ROWS <= rows; m += ROWS) {
        auto run = m == 0 ? strip<ROWS, OUTPUTS, true, Weight> : strip<ROWS, OUTPUTS, false, Weight>;
        run(x + m * inputs, weight, scale, y + m * outputs, inputs, outputs, count, add);
    }
    for (; m < rows; m++) {
        auto run = m == 0 ? strip<1, VECTOR_OUTPUTS, true, Weight> : strip<1, VECTOR_OUTPUTS, false, Weight>;
        run(x + m * inputs, weight, scale, y + m * outputs, inputs, outputs, count, add);
    }
}

float float_of(bfloat16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

// One row of a weight in 4 bits: byte j of a group holds inputs j and j + group / 2.
void decode_row(const Matrix& weight, int64_t n, float* target) {
    int64_t half = weight.group / 2;
    const uint8_t* bytes = static_cast<const uint8_t*>(weight.values) + n * weight.inputs / 2;
    for (int64_t g = 0; g < weight.inputs / weight.group; g++) {
        float scale = float_of(static_cast<const bfloat16*>(weight.scale)[g * weight.outputs + n]);
        float zero = weight.zero[g * weight.outputs + n];
        float* group = target + g * weight.group;
        for (int64_t j = 0; j < half; j++) {
            group[j] = (float(bytes[g * half + j] & 15) - zero) * scale;
            group[j + half] = (float(bytes[g * half + j] >> 4) - zero) * scale;
        }
    }
}

}  // namespace

void linear(const float* x, const Matrix& weight, float* y, int64_t rows, bool add) {
    int64_t outputs = weight.outputs, inputs = weight.inputs, blocks = (outputs + BLOCK - 1) / BLOCK;
#pragma omp parallel
    {
        std::vector<float> decoded(weight.kind == INT4 ? BLOCK * inputs : 0);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            int64_t first = block * BLOCK, count = std::min(outputs - first, BLOCK), at = first * inputs;
            auto run = [&](const auto* values, const float* scale) {
                block_of_outputs(x, values, scale, y + first, rows, outputs, inputs, count, add);
            };
            if (weight.kind == FP32) run(static_cast<const float*>(weight.values) + at, nullptr);
            if (weight.kind == BF16) run(static_cast<const bfloat16*>(weight.values) + at, nullptr);
            if (weight.kind == INT8) {
                const float* scale = static_cast<const float*>(weight.scale) + first;
                run(static_cast<const int8_t*>(weight.values) + at, scale);
            }
            if (weight.kind == INT4) {
                for (int64_t n = 0; n < count; n++) decode_row(weight, first + n, decoded.data() + n * inputs);
                run(decoded.data(), nullptr);
            }
        }
    }
}

extern "C" void linear(const float* x, const int64_t* weight, float* y, int64_t rows, int64_t add) {
    linear(x, *reinterpret_cast<const Matrix*>(weight), y, rows, add);
}
