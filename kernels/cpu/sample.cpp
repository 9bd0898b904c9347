// The next token of each row of logits: what umedtrain.kernels.sampling describes, in the same integers, so that a CPU
// and a GPU draw the same token from the same logits. No product is fused with a sum (see the compiler's flags).

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "vectors.h"

namespace {

// Tokens in order of falling key, then rising id; this one is the first that is no longer inside.
struct Edge {
    int32_t key;
    int64_t before;

    bool holds(int32_t other, int64_t id) const { return other > key || (other == key && id < before); }
};

struct Mass {
    int64_t count, weight;
};

inline uint64_t derived_key(uint64_t key, uint64_t index) {
    uint64_t z = key + (index + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// floor(total * fraction / 2^62) without words of 128 bits.
inline int64_t share(int64_t total, int64_t fraction) {
    int64_t total_high = total >> 31, total_low = total & 0x7FFFFFFF;
    int64_t high = fraction >> 31, low = fraction & 0x7FFFFFFF;
    return total_high * high + ((total_high * low + total_low * high + ((total_low * low) >> 31)) >> 31);
}

// floor(2^43 w) of the weight whose bits are the key.
inline int64_t fixed_point(int32_t key) {
    int64_t mantissa = int64_t((key & 0x7FFFFF) | 0x800000) << 20;
    return mantissa >> std::min(127 - (key >> 23), 63);
}

class Row {
  public:
    Row(int64_t vocabulary) : vocabulary(vocabulary), keys(vocabulary), bins(1 << 15) {}

    void set_keys(const float* logits, float peak, float temperature) {
        float scale = std::min(1.4426950408889634f / temperature, 3.0e38f);
        for (int64_t i = 0; i < vocabulary; i++) {
            float x = (logits[i] - peak) * scale;
            bool large_enough = x >= -43.0f;
            x = large_enough ? x : 0.0f;
            float whole = std::floor(x + 0.5f), f = x - whole;
            float p = f * 0.00015353361959569156f;
            p = (p + 0.0013398873852565885f) * f;
            p = (p + 0.00961843691766262f) * f;
            p = (p + 0.055503323674201965f) * f;
            p = (p + 0.24022647738456726f) * f;
            p = (p + 0.6931471824645996f) * f;
            p = p + 1.0f;
            int32_t bits;
            std::memcpy(&bits, &p, 4);
            int32_t key = int32_t(uint32_t(int32_t(whole)) << 23) + bits;
            keys[i] = large_enough ? key : 0;
        }
    }

    // What top-k, then top-p, then min-p keep, and the key above which to draw.
    Edge kept(int64_t top_k, double top_p, float min_p, int32_t* draw_above) {
        fill_bins();
        top_k = top_k > 0 ? std::min(top_k, vocabulary) : vocabulary;
        Mass above;
        int32_t key = threshold([&](Mass mass) { return mass.count < top_k; }, &above);
        int64_t total = above.weight + (top_k - above.count) * fixed_point(key);
        *draw_above = key - 1;

        double fraction = std::max(top_p < 1 ? top_p : 1.0, 0.0);
        int64_t limit = std::max<int64_t>(share(total, int64_t(fraction * 2147483648.0) << 31), 1);
        key = threshold([&](Mass mass) { return mass.weight < limit; }, &above);
        int64_t last = std::max<int64_t>(fixed_point(key), 1);
        int64_t ties = (limit - above.weight + last - 1) / last, before = 0;
        while (before < vocabulary && ties > 0) ties -= keys[before++] == key;
        if (ties > 0) before = vocabulary + 1;

        float floor_weight = std::min(min_p > 0 ? min_p : 0.0f, 1.0f);
        int32_t floor_key;
        std::memcpy(&floor_key, &floor_weight, 4);
        floor_key -= 1;
        if (floor_key >= key) before = 0;
        *draw_above = std::max(floor_key, *draw_above);
        return {std::max(floor_key, key), before};
    }

    // The token, and in `kept_mass` the weight of all that could have been drawn.
    int64_t draw(Edge edge, int32_t draw_above, uint64_t stream, int64_t* kept_mass) {
        Edge among = {draw_above, 0};
        *kept_mass = 0;
        int64_t mass = 0;
        for (int64_t i = 0; i < vocabulary; i++) {
            int64_t weight = keys[i] > draw_above ? fixed_point(keys[i]) : 0;
            mass += weight;
            *kept_mass += edge.holds(keys[i], i) ? weight : 0;
        }
        for (uint64_t attempt = 0;; attempt++) {
            int64_t target = share(mass, int64_t(derived_key(stream, attempt) >> 2));
            int64_t token = find(among, target);
            if (mass == 0 || edge.holds(keys[token], token)) return token;
            among = {keys[token], token};
            mass = 0;
            for (int64_t i = 0; i < vocabulary; i++) mass += among.holds(keys[i], i) ? fixed_point(keys[i]) : 0;
        }
    }

  private:
    int64_t vocabulary;
    std::vector<int32_t> keys, members;
    std::vector<Mass> bins;

    void fill_bins() {
        std::fill(bins.begin(), bins.end(), Mass{0, 0});
        for (int32_t key : keys) {
            Mass& bin = bins[key >> 15];
            bin.count++;
            bin.weight += fixed_point(key);
        }
    }

    // The smallest key for which `few` says that little enough lies above it, and what lies above it.
    template <typename Few>
    int32_t threshold(Few few, Mass* above) {
        Mass sum = {0, 0};
        int32_t bin = (1 << 15) - 1;
        for (; bin > 0; bin--) {
            Mass next = {sum.count + bins[bin].count, sum.weight + bins[bin].weight};
            if (!few(next)) break;
            sum = next;
        }
        members.clear();
        for (int32_t key : keys) {
            if (key >> 15 == bin) members.push_back(key);
        }
        std::sort(members.begin(), members.end(), std::greater<int32_t>());
        // Between two members nothing changes, so the smallest key is a member, or the bin's first.
        for (size_t i = 0; i < members.size();) {
            size_t end = i;
            Mass next = sum;
            for (; end < members.size() && members[end] == members[i]; end++) {
                next = {next.count + 1, next.weight + fixed_point(members[i])};
            }
            if (!few(next)) {
                *above = sum;
                return members[i];
            }
            sum = next;
            i = end;
        }
        *above = sum;
        return bin << 15;
    }

    // The first token by id whose cumulative weight, among those inside the edge, exceeds the target.
    int64_t find(Edge among, int64_t target) const {
        int64_t mass = 0;
        for (int64_t i = 0; i < vocabulary; i++) {
            mass += among.holds(keys[i], i) ? fixed_point(keys[i]) : 0;
            if (mass > target) return i;
        }
        return vocabulary - 1;
    }
};

// Maximum of the row, NaN if it holds one, and the sum of exponentials below it.
void statistics(const float* logits, int64_t vocabulary, float* peak, float* log_sum) {
    Floats largest = broadcast(-std::numeric_limits<float>::infinity());
    bool is_number = true;
    for (int64_t i = 0; i < vocabulary; i += LANES) {
        Floats x = largest;
        if (i + LANES <= vocabulary) {
            x = load(logits + i);
        } else {
            std::memcpy(&x, logits + i, (vocabulary - i) * sizeof(float));
        }
        largest = x > largest || x != x ? x : largest;
    }
    *peak = largest[0];
    for (int lane = 1; lane < LANES; lane++) {
        if (largest[lane] > *peak) *peak = largest[lane];
    }
    for (int64_t i = 0; i < vocabulary; i++) is_number &= logits[i] == logits[i];
    if (!is_number) *peak = std::numeric_limits<float>::quiet_NaN();
    Floats sum = {};
    for (int64_t i = 0; i < vocabulary; i += LANES) {
        Floats x = broadcast(-std::numeric_limits<float>::infinity());
        if (i + LANES <= vocabulary) {
            x = load(logits + i);
        } else {
            std::memcpy(&x, logits + i, (vocabulary - i) * sizeof(float));
        }
        sum += exponential(x - *peak);
    }
    *log_sum = std::log(total(sum));
}

}  // namespace

// Of each row: the maximum, and the logarithm of the sum of exponentials below it.
extern "C" void softmax_statistics(
    const float* logits, float* peaks, float* log_sums, int64_t rows, int64_t vocabulary
) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) statistics(logits + r * vocabulary, vocabulary, peaks + r, log_sums + r);
}

extern "C" void sample(
    const float* logits, const float* temperature, const int64_t* top_k, const double* top_p, const float* min_p,
    const int64_t* seeds, const int64_t* positions, int64_t* tokens, float* logprobs, float* truncated_logprobs,
    int64_t rows, int64_t vocabulary
) {
#pragma omp parallel
    {
        Row scratch(vocabulary);
#pragma omp for schedule(dynamic, 1)
        for (int64_t r = 0; r < rows; r++) {
            const float* row = logits + r * vocabulary;
            float peak, log_sum;
            statistics(row, vocabulary, &peak, &log_sum);
            truncated_logprobs[r] = 0.0f;
            if (temperature[r] > 0) {
                scratch.set_keys(row, peak, temperature[r]);
                bool cut = (top_k[r] > 0 && top_k[r] < vocabulary) || top_p[r] < 1 || min_p[r] > 0;
                int32_t draw_above = -1;
                Edge edge = cut ? scratch.kept(top_k[r], top_p[r], min_p[r], &draw_above) : Edge{-1, 0};
                int64_t mass;
                tokens[r] = scratch.draw(edge, draw_above, derived_key(seeds[r], positions[r]), &mass);
                float weight = float(mass) * std::ldexp(1.0f, -43);
                truncated_logprobs[r] = (row[tokens[r]] - peak) / temperature[r] - std::log(weight);
            } else {
                tokens[r] = std::find(row, row + vocabulary, peak) - row;
                if (tokens[r] == vocabulary) tokens[r] = vocabulary - 1;
            }
            logprobs[r] = row[tokens[r]] - peak - log_sum;
        }
    }
}
