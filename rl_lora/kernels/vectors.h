// What the C++ here has in common: vectors of the width that the processor has, written for AVX2 and AVX-512.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int MOST = 14;  // rows of a block: two sums for each, two vectors to multiply, and one x fill the 32 registers
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int LANES = 8;
constexpr int MOST = 6;  // of 16 registers
#else
#error "written for AVX2 and AVX-512"
#endif
constexpr int PANEL = 2 * LANES;  // numbers of a row that are computed together: of a product's outputs, or of queries

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

static inline Floats load(const float* at) {
    Floats x;
    std::memcpy(&x, at, sizeof x);
    return x;
}

static inline void store(float* at, Floats x) { std::memcpy(at, &x, sizeof x); }

struct BFloat16 {  // the upper half of a float
    uint16_t bits;
};
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

static inline Words widened(Halves x) {
#if defined(__AVX512BW__)  // GCC would take it apart
    return (Words)_mm512_cvtepu16_epi32((__m256i)x);
#else
    return __builtin_convertvector(x, Words);
#endif
}

static inline Floats load(const BFloat16* at) {
    Halves x;
    std::memcpy(&x, at, sizeof x);
    return (Floats)(widened(x) << 16);
}

// To the nearest, of two as near to the even one; NaN stays NaN.
static inline Halves rounded(Floats x) {
#if defined(__AVX512BF16__)
    return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
    const Words bits = (Words)x, upper = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return __builtin_convertvector(x == x ? upper : (Words)(Ints{} + 0x7fc0), Halves);
#endif
}

static inline void store(BFloat16* at, Floats x) {
    const Halves halves = rounded(x);
    std::memcpy(at, &halves, sizeof halves);
}

// Each lane holds one of both: a's in its lower half.
static inline Words pairs(Halves a, Halves b) {
    return widened(a) | (widened(b) << 16);
}

// sum + a b of two neighbours each: a lane holds two bfloat16, and one product of both is added to one float.
static inline Floats add_pairs(Floats sum, Words a, Words b) {
#if defined(__AVX512BF16__)
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum += (Floats)(a << 16) * (Floats)(b << 16);
    return sum + (Floats)(a & 0xffff0000u) * (Floats)(b & 0xffff0000u);
#endif
}

// e^x for x <= 0: 2^n e^r with |r| <= log(2) / 2, and a polynomial for e^r (Cephes).
static inline Floats exponential(Floats x) {
    constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: added, it leaves no bits for what is behind the point
    const Floats shifted = x * 1.44269504088896341f + ROUND;
    const Floats n = shifted - ROUND;
    const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const Ints power = ((Ints)shifted - (Ints)(Floats{} + ROUND) + 127) << 23;
    return x < -87.0f ? Floats{} : p * (Floats)power;
}

static inline Floats tangent(Floats x) {  // hyperbolic
    const Floats e = exponential(x < 0.0f ? 2.0f * x : -2.0f * x), t = (1.0f - e) / (1.0f + e);
    return x < 0.0f ? -t : t;
}
