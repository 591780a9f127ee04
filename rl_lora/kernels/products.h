// Products of small matrices of float32 or bfloat16, with sums in float32, and the layouts that they read.

#pragma once

#include <type_traits>
#include <utility>
#include <vector>

#include "vectors.h"

// ELEMENT, float or BFloat16, is given when this is compiled. Scores, softmax and sums are float32 for either; products
// take what they multiply STEP elements of k at a time: `One` for all lanes, or one of `All` for each.
using Element = ELEMENT;
using One = std::conditional_t<std::is_same_v<Element, float>, float, uint32_t>;
using All = std::conditional_t<std::is_same_v<Element, float>, Floats, Words>;
constexpr int STEP = sizeof(One) / sizeof(Element);

static inline Floats add_products(Floats sum, float x, Floats w) { return sum + x * w; }
static inline Floats add_products(Floats sum, uint32_t x, Words w) { return add_pairs(sum, Words{} + x, w); }

template <class To>
static inline To read(const Element* at) {
    To x;
    std::memcpy(&x, at, sizeof x);
    return x;
}

// out[m][c] (+)= sum over k of x[m * row + k * step] * w[k * w_stride + STEP * c], and of the STEP - 1 behind each
struct Product {
    const Element* x;
    int64_t row, step;
    const Element* w;
    int64_t w_stride;
    int64_t n;  // of k
    float* out;
    int64_t out_stride;
    bool add;
};

template <int ROWS, int VECTORS>
static void tile(const Product& p) {
    Floats sum[ROWS][VECTORS];
    const Element* x[(ROWS + 2) / 3];  // of every third row: the two behind it are an addition away, not a pointer each
    const Element* w = p.w;
#pragma GCC unroll 16
    for (int i = 0; i < (ROWS + 2) / 3; i++) x[i] = p.x + 3 * i * p.row;
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++)
        for (int v = 0; v < VECTORS; v++) sum[m][v] = Floats{};
    const int64_t row = p.row, step = p.step, w_stride = p.w_stride, out_stride = p.out_stride;
    float* out = p.out;
    const bool add = p.add;
#pragma GCC unroll 1
    for (int64_t k = p.n; k > 0; k--) {
        All of_w[VECTORS];
        for (int v = 0; v < VECTORS; v++) of_w[v] = read<All>(w + v * LANES * STEP);
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; m++) {
            const One a = read<One>(x[m / 3] + m % 3 * row);
            for (int v = 0; v < VECTORS; v++) sum[m][v] = add_products(sum[m][v], a, of_w[v]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < (ROWS + 2) / 3; i++) x[i] += step;
        w += w_stride;
    }
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++, out += out_stride)
        for (int v = 0; v < VECTORS; v++)
            store(out + v * LANES, add ? load(out + v * LANES) + sum[m][v] : sum[m][v]);
}

using Tile = decltype(&tile<1, 1>);

template <int VECTORS, int... N>
static Tile of_rows(int64_t rows, std::integer_sequence<int, N...>) {
    static constexpr Tile of[] = {tile<N + 1, VECTORS>...};
    return of[rows - 1];
}

static void multiply(const Product& p, int64_t rows, int64_t columns) {
    const int64_t n_blocks = (rows + MOST - 1) / MOST;
    constexpr auto sizes = std::make_integer_sequence<int, MOST>{};
    for (int64_t column = 0; column < columns; column += PANEL)
        for (int64_t block = 0; block < n_blocks; block++) {
            const int64_t from = rows * block / n_blocks, n = rows * (block + 1) / n_blocks - from;
            Product part = p;
            part.x += from * p.row;
            part.w += STEP * column;
            part.out += from * p.out_stride + column;
            (columns - column < PANEL ? of_rows<1>(n, sizes) : of_rows<2>(n, sizes))(part);
        }
}

// What products take STEP of at a time, of neighbouring rows: to (width, STEP). STEP of 1: a copy of a.
static inline void interleave(const Element* a, const Element* b, int64_t width, Element* to) {
    for (int64_t d = 0; d < width; d += LANES) {
        if constexpr (STEP == 1) {
            std::memcpy(to + d, a + d, LANES * sizeof *to);
        } else {
            const Words both = pairs(read<Halves>(a + d), read<Halves>(b + d));
            std::memcpy(to + STEP * d, &both, sizeof both);
        }
    }
}

// What was lane j of vector i becomes lane i of vector j.
template <int STRIDE = LANES / 2>
static inline void transpose(Words (&x)[LANES]) {
    Ints low, high;
    for (int i = 0; i < LANES; i++) {
        low[i] = i & STRIDE ? LANES + i - STRIDE : i;
        high[i] = i & STRIDE ? LANES + i : i + STRIDE;
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        if (!(i & STRIDE)) {
            const Words a = x[i], b = x[i + STRIDE];
            x[i] = __builtin_shuffle(a, b, low), x[i + STRIDE] = __builtin_shuffle(a, b, high);
        }
    if constexpr (STRIDE > 1) transpose<STRIDE / 2>(x);
}

// Weights (keys, PANEL) as products read them: unchanged, or rounded.
static inline const float* in_rows(const std::vector<float>& x, int64_t, std::vector<float>&) { return x.data(); }
static inline const float* in_pairs(const std::vector<float>& x, int64_t, std::vector<float>&) { return x.data(); }

static inline const BFloat16* in_rows(const std::vector<float>& x, int64_t n_keys, std::vector<BFloat16>& to) {
    for (int64_t i = 0; i < n_keys * PANEL; i += LANES) store(&to[i], load(&x[i]));
    return to.data();
}

// (keys / 2, PANEL, 2), with nothing for a last one's neighbour that is not there.
static inline const BFloat16* in_pairs(const std::vector<float>& x, int64_t n_keys, std::vector<BFloat16>& to) {
    for (int64_t key = 0; key < n_keys; key += 2)
        for (int64_t r = 0; r < PANEL; r += LANES) {
            const float* at = &x[key * PANEL + r];
            const Words both = pairs(rounded(load(at)), rounded(key + 1 < n_keys ? load(at + PANEL) : Floats{}));
            std::memcpy(&to[key * PANEL + 2 * r], &both, sizeof both);
        }
    return to.data();
}
