// Vectors of floats as wide as the machine's registers, for any CPU that GCC or Clang compiles for.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef float UnalignedFloats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int8_t Bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

struct bfloat16 {
    uint16_t bits;
};

static inline Floats load(const float* source) { return *reinterpret_cast<const UnalignedFloats*>(source); }

static inline Floats load(const bfloat16* source) {
    // GCC 12 makes eight instructions of the conversion that AVX2 has as one.
#if defined(__AVX512F__)
    Words words = (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#elif defined(__AVX2__)
    Words words = (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#else
    Words words = __builtin_convertvector(*reinterpret_cast<const Halves*>(source), Words);
#endif
    return (Floats)(words << 16);
}

static inline Floats load(const int8_t* source) {
#if defined(__AVX512F__)
    Ints integers = (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#elif defined(__AVX2__)
    Ints integers = (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source)));
#else
    Ints integers = __builtin_convertvector(*reinterpret_cast<const Bytes*>(source), Ints);
#endif
    return __builtin_convertvector(integers, Floats);
}

// The first `count` elements, then zeros.
template <typename T>
static inline Floats load_some(const T* source, int64_t count) {
    T padded[LANES];
    std::memset(padded, 0, sizeof padded);
    std::memcpy(padded, source, count * sizeof(T));
    return load(padded);
}

static inline void store(float* target, Floats values) { *reinterpret_cast<UnalignedFloats*>(target) = values; }

static inline void store_some(float* target, Floats values, int64_t count) {
    std::memcpy(target, &values, count * sizeof(float));
}

// a * b + c, rounded once where the machine can. The compiler would decide anew at each place, and a row's bits with it.
static inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// Keeps a value that is used several times in a register; GCC would read it from memory again for each use.
static inline void keep(Floats& value) {
#if defined(__AVX512F__)
    asm("" : "+v"(value));
#elif defined(__AVX2__)
    asm("" : "+x"(value));
#endif
}

static inline Floats broadcast(float value) { return value - Floats{}; }

// In every run of 2 * HALF lanes of a, then of b, the lower half plus the upper half.
template <int HALF>
static inline Floats fold(Floats a, Floats b) {
    Ints lower, upper;
    for (int lane = 0; lane < LANES; lane++) {
        lower[lane] = lane / HALF * 2 * HALF + lane % HALF;
        upper[lane] = lower[lane] + HALF;
    }
#if defined(__clang__)
    Floats low, high;
    for (int lane = 0; lane < LANES; lane++) {
        low[lane] = lower[lane] < LANES ? a[lower[lane]] : b[lower[lane] - LANES];
        high[lane] = upper[lane] < LANES ? a[upper[lane]] : b[upper[lane] - LANES];
    }
    return low + high;
#else
    return __builtin_shuffle(a, b, lower) + __builtin_shuffle(a, b, upper);
#endif
}

// Lane i is the sum of the lanes of vectors[i], added in an order that depends on nothing.
static inline Floats lane_sums(const Floats* vectors) {
    Floats sums[LANES];
    for (int i = 0; i < LANES; i++) sums[i] = vectors[i];
#if defined(__AVX512F__)
    for (int i = 0; i < 8; i++) sums[i] = fold<8>(sums[2 * i], sums[2 * i + 1]);
#endif
    for (int i = 0; i < 4; i++) sums[i] = fold<4>(sums[2 * i], sums[2 * i + 1]);
    for (int i = 0; i < 2; i++) sums[i] = fold<2>(sums[2 * i], sums[2 * i + 1]);
    return fold<1>(sums[0], sums[1]);
}

static inline float total(Floats values) {
    Floats vectors[LANES] = {values};
    return lane_sums(vectors)[0];
}

// exp(x) for x <= 0, to 2 units in the last place; 0 below -87, NaN of NaN (Cephes: degree-5 polynomial after reduction by ln 2).
static inline Floats exponential(Floats x) {
    Floats given = x;
    Floats floor_at = broadcast(-87.0f);
    x = x > floor_at ? x : floor_at;
    // Adding and taking off 1.5 * 2^23 rounds to the nearest whole number.
    Floats magic = broadcast(12582912.0f);
    Floats whole = multiply_add(x, broadcast(1.44269504088896341f), magic) - magic;
    Floats rest = multiply_add(whole, broadcast(-0.693359375f), x);
    rest = multiply_add(whole, broadcast(2.12194440e-4f), rest);
    const float coefficients[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    Floats p = broadcast(1.9875691500e-4f);
    for (float coefficient : coefficients) p = multiply_add(p, rest, broadcast(coefficient));
    p = multiply_add(p, rest * rest, rest + 1.0f);
    Ints exponent = (__builtin_convertvector(whole, Ints) + 127) << 23;
    Floats result = p * (Floats)exponent;
    result = given > floor_at ? result : Floats{};
    return given != given ? given : result;
}
