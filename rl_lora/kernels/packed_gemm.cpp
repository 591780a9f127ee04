// Products with a weight that never changes: out = x W^T + b, and the deltas of adapters, in float32 or bfloat16.
//
// Few rows wait for the weight to come from memory, so it is laid out in the order in which it is read, asked for ahead
// of time, and half as long where bfloat16 holds it exactly. Sums are in float32, and every element is summed in the same
// order whatever the number of rows and threads: a row's result does not depend on its neighbours, to the bit.

#include <algorithm>
#include <utility>
#include <vector>

#include <omp.h>

#include "deltas.h"
#include "vectors.h"

constexpr int64_t TASKS = 4;       // a thread, at least, so that none is left waiting for long
constexpr int64_t TASK_ROWS = 256;  // of a task, at most: they stay in the second cache while the panels go by

// How x and the weights of a panel lie, and what is multiplied at a step: one input, or two neighbours.
struct Float32 {
    using Input = float;
    using Step = float;  // of a row of x
    using Weights = Floats;
    static constexpr int64_t INPUTS = 1, BYTES = 8 * LANES;
    static constexpr int64_t CHUNK = 768;  // steps of a panel that stay in the first cache while blocks of rows go by
    static void read(const char* at, Floats& low, Floats& high) {
        std::memcpy(&low, at, sizeof low);
        std::memcpy(&high, at + sizeof low, sizeof high);
    }
    static Floats add(Floats sum, float a, Floats weights) { return sum + a * weights; }
};

// The same weights in half the bytes: a word holds two, output j in its low half, j + LANES in its high half.
struct Float32Halved : Float32 {
    static constexpr int64_t BYTES = 4 * LANES;
    static void read(const char* at, Floats& low, Floats& high) {
        Words words;
        std::memcpy(&words, at, sizeof words);
        low = (Floats)(words << 16);
        high = (Floats)(words & 0xffff0000u);
    }
};

// A word holds the weights of two neighbouring inputs for one output, and two numbers of a row of x.
struct Pairs {
    using Input = BFloat16;
    using Step = uint32_t;
    using Weights = Words;
    static constexpr int64_t INPUTS = 2, BYTES = 8 * LANES;
    static constexpr int64_t CHUNK = 2048;
    static void read(const char* at, Words& low, Words& high) {
        std::memcpy(&low, at, sizeof low);
        std::memcpy(&high, at + sizeof low, sizeof high);
    }
    static Floats add(Floats sum, uint32_t a, Words weights) { return add_pairs(sum, Words{} + a, weights); }
};

struct Call {
    const char* x;        // (rows, n_in)
    const char* weights;  // (n_panels, steps, BYTES)
    const float* bias;    // (n_panels * PANEL), or null
    char* out;            // (rows, >= n_panels * PANEL)
    int64_t out_stride;   // in elements
    int64_t out_single;   // out is float32, whatever x is
    int64_t rows, n_panels, n_in;
    const Deltas* deltas;  // or null
};

// Rows of a panel, over a chunk of its inputs.
template <class Format>
struct Block {
    const typename Format::Step* x;  // the first row's first step of the chunk
    int64_t stride;                  // between rows of x
    const char* weights;             // of the chunk
    int64_t steps;                   // of the chunk
    const char* ahead;               // weights that will be wanted next
    int64_t rate;                    // bytes of them to ask for at a step: evenly, or memory could not follow
    float* partial;                  // (rows, PANEL): sums of the chunks before, which this one's are added to; or null
    bool last;                       // of the chunks
    int64_t row, panel;              // of the first row and output
};

template <int ROWS, class Format, int LINES>
inline __attribute__((always_inline)) void add(Floats (&sum)[ROWS][2], const Block<Format>& block) {
    const typename Format::Step* x[(ROWS + 2) / 3];  // of every third row: the two behind it are an addition away
#pragma GCC unroll 16
    for (int i = 0; i < (ROWS + 2) / 3; i++) x[i] = block.x + 3 * i * block.stride;
    const int64_t stride = block.stride, rate = block.rate;
    const char* weights = block.weights;
    const char* ahead = block.ahead;
#pragma GCC unroll 1
    for (int64_t k = block.steps; k > 0; k--) {
        typename Format::Weights low, high;
        Format::read(weights, low, high);
        weights += Format::BYTES;
#pragma GCC unroll 2
        for (int line = 0; line < LINES; line++) __builtin_prefetch(ahead + 64 * line, 0, 2);
        ahead += rate;
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; m++) {
            const typename Format::Step a = x[m / 3][m % 3 * stride];
            sum[m][0] = Format::add(sum[m][0], a, low);
            sum[m][1] = Format::add(sum[m][1], a, high);
        }
#pragma GCC unroll 16
        for (int i = 0; i < (ROWS + 2) / 3; i++) x[i]++;
    }
}

template <int ROWS, class Format>
void run(const Call& call, const Block<Format>& block, bool first) {
    Floats sum[ROWS][2];
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++) sum[m][0] = sum[m][1] = Floats{};
    if (block.rate > 64)
        add<ROWS, Format, 2>(sum, block);
    else
        add<ROWS, Format, 1>(sum, block);
    const float* const bias = call.bias ? call.bias + block.panel * PANEL : nullptr;
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++)
        for (int half = 0; half < 2; half++) {
            const int64_t row = block.row + m, column = block.panel * PANEL + half * LANES;
            float* const partial = block.partial + m * PANEL + half * LANES;
            Floats y = sum[m][half];
            if (first && bias) y += load(bias + half * LANES);
            if (!first) y = load(partial) + y;
            if (!block.last) {
                store(partial, y);
                continue;
            }
            if (call.deltas) y = expand<typename Format::Input>(*call.deltas, row, column, y);
            const int64_t at = row * call.out_stride + column;
            if (call.out_single)
                store(reinterpret_cast<float*>(call.out) + at, y);
            else
                store(reinterpret_cast<typename Format::Input*>(call.out) + at, y);
        }
}

template <class Format, int... N>
void run_rows(int64_t rows, const Call& call, const Block<Format>& block, bool first,
              std::integer_sequence<int, N...>) {
    static constexpr void (*of[])(const Call&, const Block<Format>&, bool) = {run<N + 1, Format>...};
    of[rows - 1](call, block, first);
}

// The sum of all chunks of a panel's inputs, for the rows of some blocks.
template <class Format>
void multiply_panel(const Call& call, int64_t panel, int64_t from, int64_t to, int64_t n_blocks, float* partial) {
    const int64_t steps = call.n_in / Format::INPUTS, n_chunks = (steps + Format::CHUNK - 1) / Format::CHUNK;
    const int64_t first_row = call.rows * from / n_blocks;
    for (int64_t chunk = 0; chunk < n_chunks; chunk++) {
        const int64_t k = steps * chunk / n_chunks, n = steps * (chunk + 1) / n_chunks - k;
        const char* of_panel = call.weights + (panel * steps + k) * Format::BYTES;
        const char* next = of_panel + steps * Format::BYTES;  // each block asks for its share of it
        const int64_t rate = (Format::BYTES + to - from - 1) / (to - from);
        for (int64_t block = from; block < to; block++) {
            const int64_t row = call.rows * block / n_blocks, end = call.rows * (block + 1) / n_blocks;
            run_rows<Format>(end - row, call,
                             {reinterpret_cast<const typename Format::Step*>(call.x) + row * steps + k, steps, of_panel, n,
                              next + (block - from) * n * rate, rate, partial + (row - first_row) * PANEL,
                              chunk + 1 == n_chunks, row, panel},
                             chunk == 0, std::make_integer_sequence<int, MOST>{});
        }
    }
}

// Several products with the same rows, in one parallel region.
template <class Format>
void multiply(const Call* calls, int64_t n_calls) {
    const int64_t rows = calls->rows, n_blocks = (rows + MOST - 1) / MOST;
    const int64_t of_size = (rows + TASK_ROWS - 1) / TASK_ROWS, n_threads = omp_get_max_threads();
#pragma omp parallel
    {
        bool any = false;
        for (const Call* call = calls; call < calls + n_calls; call++) {
            if (!call->deltas) continue;
            any = true;
            const auto* x = reinterpret_cast<const typename Format::Input*>(call->x);
#pragma omp for schedule(static) nowait
            for (int64_t row = 0; row < rows; row++) project(*call->deltas, x + row * call->n_in, call->n_in, row);
        }
        if (any) {
#pragma omp barrier
        }
        std::vector<float> partial(calls->n_in / Format::INPUTS > Format::CHUNK ? rows * PANEL : 0);
        for (const Call* call = calls; call < calls + n_calls; call++) {
            const int64_t wanted = (TASKS * n_threads + call->n_panels - 1) / call->n_panels;
            const int64_t n_parts = std::min(n_blocks, std::max(wanted, of_size));  // of the rows
#pragma omp for schedule(static) nowait
            for (int64_t task = 0; task < call->n_panels * n_parts; task++) {
                const int64_t part = task / call->n_panels;
                multiply_panel<Format>(*call, task % call->n_panels, n_blocks * part / n_parts,
                                       n_blocks * (part + 1) / n_parts, n_blocks, partial.data());
            }
        }
    }
}

// y += z B, and z, for y from elsewhere.
template <class T>
void add_deltas(const Deltas& deltas, const T* x, int64_t n_in, T* y, int64_t n_out, int64_t rows) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        project(deltas, x + row * n_in, n_in, row);
        if (!y || !deltas.count[row]) continue;
        T* const to = y + row * n_out;
        int64_t column = 0;
        for (; column + LANES <= n_out; column += LANES)
            store(to + column, expand<T>(deltas, row, column, load(to + column)));
        if (column < n_out) {
            T some[LANES] = {};
            std::copy(to + column, to + n_out, some);
            store(some, expand<T>(deltas, row, column, load(some)));
            std::copy(some, some + (n_out - column), to + column);
        }
    }
}

// Sums of the rows of x (rows, n), with factors, for each of the ranks: out[first + k] += sum over rows of z[k] x. A
// vector of columns is summed in the order of the rows, whatever the number of threads.
template <int RANKS, int VECTORS, class T>
static void outer_block(const float* z, int64_t most, const T* x, int64_t stride, int64_t from, int64_t to, float* out,
                        int64_t out_stride) {
    Floats sum[RANKS][VECTORS] = {};
    for (int64_t row = from; row < to; row++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) {
            const Floats of_x = load(x + row * stride + v * LANES);
#pragma GCC unroll 4
            for (int k = 0; k < RANKS; k++) sum[k][v] += z[row * most + k] * of_x;
        }
    for (int k = 0; k < RANKS; k++)
        for (int v = 0; v < VECTORS; v++) {
            float* const at = out + k * out_stride + v * LANES;
            store(at, load(at) + sum[k][v]);
        }
}

static inline bool same(const Deltas& deltas, int64_t a, int64_t b) {
    return deltas.first[a] == deltas.first[b] && deltas.count[a] == deltas.count[b];
}

template <int VECTORS, class T>
static void outer_columns(const Deltas& deltas, const T* x, int64_t stride, int64_t rows, float* out,
                          int64_t out_stride) {
    for (int64_t from = 0, to; from < rows; from = to) {
        for (to = from + 1; to < rows && same(deltas, from, to); to++) {
        }
        float* const of = out + deltas.first[from] * out_stride;
        int64_t k = 0;
        const int64_t n = deltas.count[from];
        for (; k + 4 <= n; k += 4)
            outer_block<4, VECTORS>(deltas.z + k, deltas.most, x, stride, from, to, of + k * out_stride, out_stride);
        for (; k < n; k++)
            outer_block<1, VECTORS>(deltas.z + k, deltas.most, x, stride, from, to, of + k * out_stride, out_stride);
    }
}

template <class T>
void outer(const Deltas& deltas, const T* x, int64_t n, int64_t rows, float* out, int64_t out_stride) {
    constexpr int VECTORS = 4;
    const int64_t n_blocks = (n + VECTORS * LANES - 1) / (VECTORS * LANES);
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < n_blocks; block++) {
        int64_t column = block * VECTORS * LANES;
        const int64_t end = std::min(n, column + VECTORS * LANES);
        if (end - column == VECTORS * LANES) {
            outer_columns<VECTORS>(deltas, x + column, n, rows, out + column, out_stride);
            continue;
        }
        for (; column + LANES <= end; column += LANES)
            outer_columns<1>(deltas, x + column, n, rows, out + column, out_stride);
        if (column < end) {  // less than a vector: copied to where whole ones can be read
            std::vector<T> some(rows * LANES);
            for (int64_t row = 0; row < rows; row++) std::copy(x + row * n + column, x + row * n + end, &some[row * LANES]);
            outer_columns<1>(deltas, some.data(), LANES, rows, out + column, out_stride);
        }
    }
}

extern "C" {
int lanes() { return LANES; }

void multiply_float32(const Call* calls, int64_t n) { multiply<Float32>(calls, n); }
void multiply_float32_halved(const Call* calls, int64_t n) { multiply<Float32Halved>(calls, n); }
void multiply_bfloat16(const Call* calls, int64_t n) { multiply<Pairs>(calls, n); }

void add_deltas_float32(const Deltas* deltas, const float* x, int64_t n_in, float* y, int64_t n_out, int64_t rows) {
    add_deltas(*deltas, x, n_in, y, n_out, rows);
}
void add_deltas_bfloat16(const Deltas* deltas, const BFloat16* x, int64_t n_in, BFloat16* y, int64_t n_out,
                         int64_t rows) {
    add_deltas(*deltas, x, n_in, y, n_out, rows);
}

void outer_float32(const Deltas* deltas, const float* x, int64_t n, int64_t rows, float* out, int64_t out_stride) {
    outer(*deltas, x, n, rows, out, out_stride);
}
void outer_bfloat16(const Deltas* deltas, const BFloat16* x, int64_t n, int64_t rows, float* out, int64_t out_stride) {
    outer(*deltas, x, n, rows, out, out_stride);
}
}
