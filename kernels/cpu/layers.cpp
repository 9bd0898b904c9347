// The layers of a Llama, for a stream of tokens of many sequences over a paged cache.
//
// The cache is [pages, slots, key-value heads, head dimension], fp32 or bf16. Position j of sequence s is slot
// j % slots of page table[s, j / slots]. A token's results depend on its own sequence only, in every bit: its keys are
// visited position by position, in steps that begin at position 0.

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "linear.h"

namespace {

inline void put(float* target, float value) { *target = value; }

inline void put(bfloat16* target, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    // To nearest, ties to even; NaN stays NaN.
    target->bits = value != value ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <typename Cache>
void rotate_and_store(
    float* q, const float* k, const float* v, const float* cosine, const float* sine, const int64_t* sequence,
    const int64_t* position, const int32_t* table, Cache* keys, Cache* values, int64_t tokens, int64_t heads,
    int64_t kv_heads, int64_t head_dim, int64_t slots, int64_t table_width
) {
    int64_t half = head_dim / 2;
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        const float *c = cosine + t * half, *s = sine + t * half;
        for (int64_t h = 0; h < heads; h++) {
            float* head = q + (t * heads + h) * head_dim;
            for (int64_t i = 0; i < half; i++) {
                float low = head[i], high = head[i + half];
                head[i] = low * c[i] - high * s[i];
                head[i + half] = high * c[i] + low * s[i];
            }
        }
        int64_t page = table[sequence[t] * table_width + position[t] / slots];
        int64_t cell = (page * slots + position[t] % slots) * kv_heads * head_dim;
        for (int64_t g = 0; g < kv_heads; g++) {
            const float* head = k + (t * kv_heads + g) * head_dim;
            Cache* key = keys + cell + g * head_dim;
            for (int64_t i = 0; i < half; i++) {
                float low = head[i], high = head[i + half];
                put(key + i, low * c[i] - high * s[i]);
                put(key + i + half, high * c[i] + low * s[i]);
            }
            for (int64_t i = 0; i < head_dim; i++) put(values + cell + g * head_dim + i, v[(t * kv_heads + g) * head_dim + i]);
        }
    }
}

constexpr int ROWS = 4;
constexpr int64_t STEP = LANES;  // positions whose scores make up a vector

// Sums of values over the positions of some rows, for N vectors of the head dimension.
// Of the head dimension `rest` elements are left at `first`; only a single vector may reach beyond them.
template <int R, int N, typename Cache>
void add_values(
    float* const* out, const int64_t* limit, const Cache* values, const int64_t* cells, const float* weights,
    int64_t room, const float* inverse, int64_t first, int64_t rest
) {
    bool whole = rest >= LANES;
    Floats sums[R][N] = {};
    int64_t shortest = *std::min_element(limit, limit + R), longest = *std::max_element(limit, limit + R);
    auto add = [&](int64_t j, int r) {
        for (int n = 0; n < N; n++) {
            const Cache* value = values + cells[j] + first + n * LANES;
            Floats part = whole ? load(value) : load_some(value, rest);
            sums[r][n] = multiply_add(part, broadcast(weights[r * room + j]), sums[r][n]);
        }
    };
    for (int64_t j = 0; j < shortest; j++) {
        for (int r = 0; r < R; r++) add(j, r);
    }
    for (int64_t j = shortest; j < longest; j++) {
        for (int r = 0; r < R; r++) {
            // Not by a weight of 0: that would spread a NaN of a position after the row's last.
            if (j < limit[r]) add(j, r);
        }
    }
    for (int r = 0; r < R; r++) {
        for (int n = 0; n < N; n++) {
            Floats result = sums[r][n] * inverse[r];
            float* target = out[r] + first + n * LANES;
            whole ? store(target, result) : store_some(target, result, rest);
        }
    }
}

// Queries of some rows (a token and a query head each) of one key-value head over positions 0..limit of a sequence;
// `cells` says where in the cache each position lies.
template <int R, typename Cache>
void attend_rows(
    const float* const* q, float* const* out, const int64_t* limit, const Cache* keys, const Cache* values,
    const int64_t* cells, int64_t head_dim, float scale, float* weights, int64_t room
) {
    int64_t longest = *std::max_element(limit, limit + R);
    // Scores of all positions first: their maximum is known before any exponential.
    for (int64_t start = 0; start < longest; start += STEP) {
        Floats sums[R][STEP];
        for (int64_t j = 0; j < STEP; j++) {
            // A head's part of a position is too short for the machine to guess the next one.
            const int64_t at = cells[std::min(start + j, longest - 1)];
            const int64_t ahead = cells[std::min(start + j + 2 * STEP, longest - 1)];
            for (int64_t i = 0; i < head_dim; i += 64 / int64_t(sizeof(Cache))) {
                __builtin_prefetch(keys + ahead + i);
                __builtin_prefetch(values + at + i, 0, 2);
            }
            const Cache* key = keys + at;
            Floats own[R] = {};
            for (int64_t i = 0; i < head_dim; i += LANES) {
                bool whole = i + LANES <= head_dim;
                Floats part = whole ? load(key + i) : load_some(key + i, head_dim - i);
                for (int r = 0; r < R; r++) {
                    Floats query = whole ? load(q[r] + i) : load_some(q[r] + i, head_dim - i);
                    own[r] = multiply_add(part, query, own[r]);
                }
            }
            for (int r = 0; r < R; r++) sums[r][j] = own[r];
        }
        for (int r = 0; r < R; r++) store(weights + r * room + start, lane_sums(sums[r]) * scale);
    }
    float inverse[R];
    for (int r = 0; r < R; r++) {
        float* row = weights + r * room;
        int64_t end = (longest + STEP - 1) / STEP * STEP;
        float peak = row[0];
        for (int64_t j = 1; j < limit[r]; j++) peak = std::max(peak, row[j]);
        Floats sum = {};
        for (int64_t j = 0; j < end; j += STEP) {
            Floats part = exponential(load(row + j) - peak);
            for (int64_t lane = std::max<int64_t>(limit[r] - j, 0); lane < STEP; lane++) part[lane] = 0.0f;
            store(row + j, part);
            sum += part;
        }
        inverse[r] = 1.0f / total(sum);
    }
    constexpr int VECTORS = 8 / R;  // as many sums as stay in registers
    int64_t i = 0;
    for (; i + VECTORS * LANES <= head_dim; i += VECTORS * LANES) {
        add_values<R, VECTORS>(out, limit, values, cells, weights, room, inverse, i, VECTORS * LANES);
    }
    for (; i < head_dim; i += LANES) {
        add_values<R, 1>(out, limit, values, cells, weights, room, inverse, i, head_dim - i);
    }
}

template <typename Cache>
void attend(
    const float* q, float* out, const int64_t* sequence, const int64_t* position, const int32_t* table,
    const Cache* keys, const Cache* values, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim,
    int64_t slots, int64_t table_width, float scale
) {
    int64_t group = heads / kv_heads, stride = kv_heads * head_dim;
    // Tokens that follow one another in a sequence share what is read of the cache.
    std::vector<int64_t> starts;
    for (int64_t t = 0; t < tokens; t++) {
        if (t == 0 || sequence[t] != sequence[t - 1] || t - starts.back() == std::max<int64_t>(1, 2 * ROWS / group)) {
            starts.push_back(t);
        }
    }
    starts.push_back(tokens);
    int64_t runs = int64_t(starts.size()) - 1;
#pragma omp parallel
    {
        std::vector<float> weights;
        std::vector<int64_t> cells;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < runs * kv_heads; task++) {
            int64_t run = task / kv_heads, g = task % kv_heads, first = starts[run];
            int64_t rows = (starts[run + 1] - first) * group;
            const int32_t* pages = table + sequence[first] * table_width;
            int64_t last = position[starts[run + 1] - 1], room = (last + STEP) / STEP * STEP;
            weights.resize(ROWS * room);
            cells.resize(last / slots * slots + slots);
            for (int64_t page = 0; page <= last / slots; page++) {
                for (int64_t slot = 0; slot < slots; slot++) {
                    cells[page * slots + slot] = (pages[page] * slots + slot) * stride + g * head_dim;
                }
            }
            for (int64_t row = 0; row < rows; row += ROWS) {
                const float* q_rows[ROWS];
                float* out_rows[ROWS];
                int64_t limit[ROWS];
                int count = int(std::min<int64_t>(ROWS, rows - row));
                for (int r = 0; r < count; r++) {
                    int64_t t = first + (row + r) / group, h = g * group + (row + r) % group;
                    q_rows[r] = q + (t * heads + h) * head_dim;
                    out_rows[r] = out + (t * heads + h) * head_dim;
                    limit[r] = position[t] + 1;
                }
                auto go = count == 4   ? attend_rows<4, Cache>
                          : count == 3 ? attend_rows<3, Cache>
                          : count == 2 ? attend_rows<2, Cache>
                                       : attend_rows<1, Cache>;
                go(q_rows, out_rows, limit, keys, values, cells.data(), head_dim, scale, weights.data(), room);
            }
        }
    }
}

inline float float_of(float value) { return value; }

inline float float_of(bfloat16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

template <typename Weight>
void norm(const float* x, const Weight* weight, float* out, int64_t rows, int64_t width, float eps) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const float* source = x + row * width;
        Floats squares = {};
        for (int64_t i = 0; i < width; i += LANES) {
            Floats part = i + LANES <= width ? load(source + i) : load_some(source + i, width - i);
            squares = multiply_add(part, part, squares);
        }
        float factor = 1.0f / std::sqrt(total(squares) / float(width) + eps);
        for (int64_t i = 0; i < width; i++) out[row * width + i] = source[i] * factor * float_of(weight[i]);
    }
}

// silu(gate) * up, into gate.
void silu_product(float* gate, const float* up, int64_t count) {
    constexpr int64_t CHUNK = 4096;
#pragma omp parallel for schedule(static)
    for (int64_t start = 0; start < count; start += CHUNK) {
        int64_t end = std::min(count, start + CHUNK);
        for (int64_t i = start; i < end; i += LANES) {
            bool whole = i + LANES <= end;
            Floats x = whole ? load(gate + i) : load_some(gate + i, end - i);
            Floats y = whole ? load(up + i) : load_some(up + i, end - i);
            // exp of the negative magnitude never overflows.
            Floats e = exponential(x < Floats{} ? x : -x);
            Floats result = x * y * (x < Floats{} ? e : broadcast(1.0f)) / (e + 1.0f);
            whole ? store(gate + i, result) : store_some(gate + i, result, end - i);
        }
    }
}

// What Python fills in as numbers of 64 bits.
struct Layer {
    const void *attention_norm, *mlp_norm;  // in the cache's dtype
    void *keys, *values;
    Matrix q, k, v, o, gate, up, down;
};

struct Pass {
    int64_t layers, tokens, hidden, heads, kv_heads, head_dim, slots, table_width;
    const float *cosine, *sine;
    const int64_t *sequence, *position;
    const int32_t* table;
};

template <typename Cache>
void run_layers(const Layer* layers, const Pass& pass, float* x, float eps) {
    int64_t tokens = pass.tokens, q_width = pass.heads * pass.head_dim, k_width = pass.kv_heads * pass.head_dim;
    int64_t widest = pass.layers ? layers[0].gate.outputs : 0;
    auto room = [&](int64_t width) { return std::unique_ptr<float[]>(new float[tokens * width]); };
    auto h = room(pass.hidden), q = room(q_width), k = room(k_width), v = room(k_width), out = room(q_width);
    auto gate = room(widest), up = room(widest);
    for (int64_t index = 0; index < pass.layers; index++) {
        const Layer& layer = layers[index];
        auto *keys = static_cast<Cache*>(layer.keys), *values = static_cast<Cache*>(layer.values);
        norm(x, static_cast<const Cache*>(layer.attention_norm), h.get(), tokens, pass.hidden, eps);
        linear(h.get(), layer.q, q.get(), tokens, false);
        linear(h.get(), layer.k, k.get(), tokens, false);
        linear(h.get(), layer.v, v.get(), tokens, false);
        rotate_and_store(
            q.get(), k.get(), v.get(), pass.cosine, pass.sine, pass.sequence, pass.position, pass.table, keys, values,
            tokens, pass.heads, pass.kv_heads, pass.head_dim, pass.slots, pass.table_width
        );
        attend(
            q.get(), out.get(), pass.sequence, pass.position, pass.table, keys, values, tokens, pass.heads,
            pass.kv_heads, pass.head_dim, pass.slots, pass.table_width, 1.0f / std::sqrt(float(pass.head_dim))
        );
        linear(out.get(), layer.o, x, tokens, true);
        norm(x, static_cast<const Cache*>(layer.mlp_norm), h.get(), tokens, pass.hidden, eps);
        linear(h.get(), layer.gate, gate.get(), tokens, false);
        linear(h.get(), layer.up, up.get(), tokens, false);
        silu_product(gate.get(), up.get(), tokens * widest);
        linear(gate.get(), layer.down, x, tokens, true);
    }
}

}  // namespace

extern "C" {

// x / rms(x) * weight for each row.
void rms_norm(const float* x, const void* weight, int64_t kind, float* out, int64_t rows, int64_t width, float eps) {
    if (kind == BF16) {
        norm(x, static_cast<const bfloat16*>(weight), out, rows, width, eps);
    } else {
        norm(x, static_cast<const float*>(weight), out, rows, width, eps);
    }
}

// x, [tokens, hidden], goes through all layers in place. `kind` is the dtype of caches and norms.
void llama_layers(const int64_t* layers, const int64_t* pass, int64_t kind, float* x, float eps) {
    auto run = kind == BF16 ? run_layers<bfloat16> : run_layers<float>;
    run(reinterpret_cast<const Layer*>(layers), *reinterpret_cast<const Pass*>(pass), x, eps);
}

}
