// What adapters add to a product, row by row: y += sum over k of (x . A[k]) B[k], for the rows of A and B that are the row's own.

#pragma once

#include <algorithm>

#include "vectors.h"

struct Deltas {
    const char* A;         // (all ranks, n_in), of the dtype of x
    const char* B;         // (all ranks, n_out), with the scale in it; a row is a number of whole panels
    int64_t A_stride, B_stride;
    const int64_t* first;  // of each row of x: where its adapter's ranks begin
    const int64_t* count;  // of each row of x: how many they are; 0: it carries no adapter
    float* z;              // (rows, most): x A^T
    int64_t most;          // of the counts
};

static inline float total(Floats x) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

// RANKS products of one row of x.
template <int RANKS>
static inline void dots(const float* x, const float* A, int64_t stride, int64_t n, float* z) {
    Floats sum[RANKS] = {};
    const int64_t whole = n / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES)
        for (int k = 0; k < RANKS; k++) sum[k] += load(x + i) * load(A + k * stride + i);
    for (int k = 0; k < RANKS; k++) {
        z[k] = total(sum[k]);
        for (int64_t i = whole; i < n; i++) z[k] += x[i] * A[k * stride + i];
    }
}

static inline float single(BFloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

template <int RANKS>
static inline void dots(const BFloat16* x, const BFloat16* A, int64_t stride, int64_t n, float* z) {
    Floats sum[RANKS] = {};
    const int64_t whole = n / (2 * LANES) * (2 * LANES);
    for (int64_t i = 0; i < whole; i += 2 * LANES) {
        Words a, b;
        std::memcpy(&a, x + i, sizeof a);
        for (int k = 0; k < RANKS; k++) {
            std::memcpy(&b, A + k * stride + i, sizeof b);
            sum[k] = add_pairs(sum[k], a, b);
        }
    }
    for (int k = 0; k < RANKS; k++) {
        z[k] = total(sum[k]);
        for (int64_t i = whole; i < n; i++) z[k] += single(x[i]) * single(A[k * stride + i]);
    }
}

template <class T>
static void project(const Deltas& deltas, const T* x, int64_t n_in, int64_t row) {
    const T* A = reinterpret_cast<const T*>(deltas.A) + deltas.first[row] * deltas.A_stride;
    float* z = deltas.z + row * deltas.most;
    const int64_t n = deltas.count[row];
    int64_t k = 0;
    for (; k + 4 <= n; k += 4) dots<4>(x, A + k * deltas.A_stride, deltas.A_stride, n_in, z + k);
    for (; k < n; k++) dots<1>(x, A + k * deltas.A_stride, deltas.A_stride, n_in, z + k);
}

// One vector of a row's outputs, from column `column` on.
template <class T>
static inline Floats expand(const Deltas& deltas, int64_t row, int64_t column, Floats y) {
    const T* B = reinterpret_cast<const T*>(deltas.B) + deltas.first[row] * deltas.B_stride + column;
    const float* z = deltas.z + row * deltas.most;
    for (int64_t k = 0, n = deltas.count[row]; k < n; k++) y += z[k] * load(B + k * deltas.B_stride);
    return y;
}
