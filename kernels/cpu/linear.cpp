// y = x W^T for a few rows of x, on weights as they lie in memory: row-major, in fp32, bf16, 8 or 4 bits.
//
// Every product of a row of x and a row of W is summed in the same order, LANES partial sums over steps of LANES inputs
// and then those in a fixed tree, whatever rows stand beside it: a row's results have the same bits in every batch.
// Weights come from memory once: while the rows of x use a block of outputs, the block after it is fetched, the same
// share of it beside each few rows, for memory and arithmetic take about as long as each other.

#include "linear.h"

#include <algorithm>
#include <vector>

namespace {

// Rows of x and outputs of a tile: accumulators for each pair, and registers left for the operands.
constexpr int ROWS = 4;
constexpr int OUTPUTS = LANES == 16 ? 4 : 3;
constexpr int VECTOR_OUTPUTS = 8;  // with a single row
constexpr int64_t BLOCK = 48;      // outputs that stay in the cache while all rows pass; half if they are long
constexpr int64_t LONG = 4096;     // bytes
constexpr int64_t LINE = 64;       // bytes that memory hands over at once

// With FETCH, a line for each output is fetched at every `every`-th input, a power of two, from `next` on.
template <int M, int N, bool FETCH, typename Weight>
inline void tile(
    const float* x, const Weight* weight, const float* scale, float* y, int64_t inputs, int64_t outputs, bool add,
    const char* next, int64_t every
) {
    constexpr int VECTORS = (M * N + LANES - 1) / LANES * LANES;
    Floats sums[VECTORS] = {};
    int64_t k = 0;
    for (; k + LANES <= inputs; k += LANES) {
        // In the order of addresses, not of use: memory answers runs faster than strides.
        if (FETCH && (k & (every - 1)) == 0) {
            for (int n = 0; n < N; n++) __builtin_prefetch(next + LINE * n, 0, 2);
            next += LINE * N;
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
    if (scale) {
        for (int i = 0; i < M * N; i++) results[i] *= scale[i % N];
    }
    if (add) {
        for (int i = 0; i < M * N; i++) results[i] += y[i / N * outputs + i % N];
    }
    for (int m = 0; m < M; m++) std::memcpy(y + m * outputs, results + m * N, N * sizeof(float));
}

template <int M, int N, bool FETCH, typename Weight>
inline void strip(
    const float* x, const Weight* weight, const float* scale, float* y, int64_t inputs, int64_t outputs, int64_t count,
    bool add, const char* next, int64_t every
) {
    int64_t n = 0, fetched = FETCH ? (inputs + every - 1) / every * LINE * N : 0;
    for (; n + N <= count; n += N, next += fetched) {
        tile<M, N, FETCH>(x, weight + n * inputs, scale ? scale + n : scale, y + n, inputs, outputs, add, next, every);
    }
    for (; n < count; n++) {
        tile<M, 1, false>(x, weight + n * inputs, scale ? scale + n : scale, y + n, inputs, outputs, add, next, every);
    }
}

// All rows of x with the outputs of one block.
template <typename Weight>
void block_of_outputs(
    const float* x, const Weight* weight, const float* scale, float* y, int64_t rows, int64_t outputs, int64_t inputs,
    int64_t count, int64_t block, bool add
) {
    // As many strips fetch as pass each output, up to a power of two: a tile has only so many lines to fetch.
    int64_t per_line = LINE / int64_t(sizeof(Weight)), strips = rows / ROWS + rows % ROWS, fetching = 1;
    while (2 * fetching <= strips && 2 * fetching * per_line <= inputs) fetching *= 2;
    const char* next = reinterpret_cast<const char*>(weight + block * inputs);
    int64_t m = 0, every = fetching * per_line, share = block * inputs * int64_t(sizeof(Weight)) / fetching;
    for (int64_t done = 0; m < rows; done++, next += share) {
        bool some = m + ROWS <= rows, fetch = done < fetching;
        auto run = some ? (fetch ? strip<ROWS, OUTPUTS, true, Weight> : strip<ROWS, OUTPUTS, false, Weight>)
                        : (fetch ? strip<1, VECTOR_OUTPUTS, true, Weight> : strip<1, VECTOR_OUTPUTS, false, Weight>);
        run(x + m * inputs, weight, scale, y + m * outputs, inputs, outputs, count, add, next, every);
        m += some ? ROWS : 1;
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
    constexpr int64_t SIZES[] = {4, 2, 1, 4};  // of a value, once 4 bits are unpacked
    int64_t outputs = weight.outputs, inputs = weight.inputs;
    int64_t block = inputs * SIZES[weight.kind] > LONG ? BLOCK / 2 : BLOCK, blocks = (outputs + block - 1) / block;
#pragma omp parallel
    {
        std::vector<float> decoded(weight.kind == INT4 ? block * inputs : 0);
#pragma omp for schedule(static)
        for (int64_t index = 0; index < blocks; index++) {
            int64_t first = index * block, count = std::min(outputs - first, block), at = first * inputs;
            auto run = [&](const auto* values, const float* scale) {
                block_of_outputs(x, values, scale, y + first, rows, outputs, inputs, count, block, add);
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
