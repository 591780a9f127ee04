// Products of few rows with a weight: out = x W^T + b in float32, as a decoding step asks for.
//
// It waits for the weight to come from memory, so the weight is laid out in the order in which it is read,
// asked for ahead of time, and half as long where bfloat16 holds it exactly. Every element is summed in the same order
// whatever the number of rows and threads: a row's result does not depend on its neighbours, to the bit.

#include <algorithm>
#include <utility>

#include <omp.h>

#include "vectors.h"

constexpr int64_t CHUNK = 768;    // inputs of a panel that stay in the first cache while the blocks of rows go by
constexpr int64_t TASKS = 4;      // a thread, at least, so that none is left waiting for long

// One input's weights for a panel. Of bfloat16, a word holds two: output j in its low half, j + LANES in its high half.
struct Float32Weight {
    static constexpr int64_t BYTES = 8 * LANES;
    static void read(const char* at, Floats& low, Floats& high) {
        std::memcpy(&low, at, sizeof low);
        std::memcpy(&high, at + sizeof low, sizeof high);
    }
};

struct BFloat16Weight {
    static constexpr int64_t BYTES = 4 * LANES;
    static void read(const char* at, Floats& low, Floats& high) {
        Words words;
        std::memcpy(&words, at, sizeof words);
        low = (Floats)(words << 16);
        high = (Floats)(words & 0xffff0000u);
    }
};

struct Block {
    const float* x;       // the first row's first input of the chunk
    int64_t stride;       // between rows of x
    const char* weights;  // of the chunk
    int64_t n_in;         // of the chunk
    const char* ahead;    // weights that will be wanted next
    int64_t n_ahead;      // inputs' worth
    float* out;
    int64_t out_stride;
    const float* bias;  // of the panel, or null
    bool first;         // of the chunks: the others add to it
};

template <int ROWS, class Weight, bool ASK>
inline __attribute__((always_inline)) void add(Floats (&sum)[ROWS][2], const Block& block, int64_t from, int64_t to) {
    const float* x[(ROWS + 2) / 3];  // of every third row: the two behind it are an addition away, not a pointer each
#pragma GCC unroll 16
    for (int i = 0; i < (ROWS + 2) / 3; i++) x[i] = block.x + 3 * i * block.stride + from;
    const int64_t stride = block.stride;
    const char* weights = block.weights;
    const char* ahead = block.ahead;
#pragma GCC unroll 1
    for (int64_t k = from; k < to; k++) {
        Floats low, high;
        Weight::read(weights + k * Weight::BYTES, low, high);
        if (ASK)
            for (int64_t b = 0; b < Weight::BYTES; b += 64) __builtin_prefetch(ahead + k * Weight::BYTES + b, 0, 2);
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; m++) {
            const float a = x[m / 3][m % 3 * stride];
            sum[m][0] += a * low;
            sum[m][1] += a * high;
        }
#pragma GCC unroll 16
        for (int i = 0; i < (ROWS + 2) / 3; i++) x[i]++;
    }
}

template <int ROWS, class Weight>
void run(const Block& block) {
    Floats sum[ROWS][2];
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++) sum[m][0] = sum[m][1] = Floats{};
    add<ROWS, Weight, true>(sum, block, 0, block.n_ahead);
    add<ROWS, Weight, false>(sum, block, block.n_ahead, block.n_in);
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++)
        for (int half = 0; half < 2; half++) {
            float* out = block.out + m * block.out_stride + half * LANES;
            const float* before = !block.first ? out : block.bias ? block.bias + half * LANES : nullptr;
            store(out, (before ? load(before) : Floats{}) + sum[m][half]);
        }
}

template <class Weight, int... N>
void run_rows(int64_t rows, const Block& block, std::integer_sequence<int, N...>) {
    static constexpr void (*of[])(const Block&) = {run<N + 1, Weight>...};
    of[rows - 1](block);
}

template <class Weight>
void multiply(const float* x, const char* weights, const float* bias, float* out, int64_t out_stride, int64_t rows,
              int64_t n_panels, int64_t n_in) {
    const int64_t n_blocks = (rows + MOST - 1) / MOST, n_chunks = (n_in + CHUNK - 1) / CHUNK;
    const int64_t wanted = (TASKS * omp_get_max_threads() + n_panels - 1) / n_panels;
    const int64_t n_parts = std::min(n_blocks, wanted);  // of the rows, which several threads may then share out
    for (int64_t chunk = 0; chunk < n_chunks; chunk++) {
        const int64_t k = n_in * chunk / n_chunks, n = n_in * (chunk + 1) / n_chunks - k;
#pragma omp parallel for schedule(static)
        for (int64_t task = 0; task < n_panels * n_parts; task++) {
            const int64_t panel = task / n_parts, part = task % n_parts;
            const int64_t from = n_blocks * part / n_parts, to = n_blocks * (part + 1) / n_parts;
            const char* of_panel = weights + (panel * n_in + k) * Weight::BYTES;
            for (int64_t block = from; block < to; block++) {
                const int64_t row = rows * block / n_blocks, end = rows * (block + 1) / n_blocks;
                // Each block asks for its share of the next panel.
                const int64_t asked = n * (block - from) / (to - from), ask = n * (block - from + 1) / (to - from);
                run_rows<Weight>(
                    end - row,
                    {x + row * n_in + k, n_in, of_panel, n, of_panel + (n_in + asked) * Weight::BYTES, ask - asked,
                     out + row * out_stride + panel * PANEL, out_stride, bias ? bias + panel * PANEL : nullptr,
                     chunk == 0},
                    std::make_integer_sequence<int, MOST>{});
            }
        }
    }
}

extern "C" {
int lanes() { return LANES; }

// x: (rows, n_in); weights: (n_panels, n_in, PANEL), see above; bias: (n_panels * PANEL) or null; out: (rows, >= n_panels
// * PANEL).
void multiply_float32(const float* x, const char* weights, const float* bias, float* out, int64_t out_stride,
                      int64_t rows, int64_t n_panels, int64_t n_in) {
    multiply<Float32Weight>(x, weights, bias, out, out_stride, rows, n_panels, n_in);
}
void multiply_bfloat16(const float* x, const char* weights, const float* bias, float* out, int64_t out_stride,
                       int64_t rows, int64_t n_panels, int64_t n_in) {
    multiply<BFloat16Weight>(x, weights, bias, out, out_stride, rows, n_panels, n_in);
}
}
