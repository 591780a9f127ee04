// Attention of the new tokens of a decoding step: out = softmax(scaling q k^T) v over the keys that each may see. Tensors
// are all float32 or all bfloat16 (T below); sums are float32. A row and a head are worked on by themselves: what comes
// out does not depend on a row's neighbours, to the bit, nor on which of its keys are shared.
//
// The keys of a query lie in several sources, one behind the other: nodes that rows share, and at last the row's own.

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "vectors.h"

// WIDTH, of a head, is given when this is compiled.
constexpr int N = WIDTH / LANES;  // vectors of a head
static_assert(N > 0 && WIDTH % LANES == 0, "a head is a number of whole vectors");
constexpr int TOGETHER = N > 8 ? 1 : N > 4 ? 2 : 4;  // heads whose sums have room in registers

template <class T>
struct Source {
    const T* key;
    const T* value;
    int64_t key_strides[3];  // between nodes, heads, tokens
    int64_t value_strides[3];
    const int64_t* node;    // of each row; null: every row has its own
    const int64_t* length;  // of each row; null: it ends with the query itself
};

template <class T>
struct Call {
    const T* query;
    int64_t query_strides[3];  // between rows, heads, tokens
    T* out;                    // (rows, tokens, heads, WIDTH)
    const int64_t* at;         // (rows, tokens): which of its row's own tokens each query is
    int64_t rows, heads, key_heads, tokens;
    int64_t window;        // keys that a query sees, its own the last; 0: all
    const float* sinks;    // a logit that takes probability away from every key, of each head; or null
    int64_t sinks_stride;  // between rows
};

// A head of a query, and the products of its numbers with those of a key, to be summed over the lanes.
template <class T>
struct Query;

template <>
struct Query<float> {
    Floats x[N];

    void read(const float* query) {
#pragma GCC unroll 32
        for (int i = 0; i < N; i++) x[i] = load(query + i * LANES);
    }

    Floats times(const float* key) const {
        Floats sum = x[0] * load(key);
#pragma GCC unroll 32
        for (int i = 1; i < N; i++) sum += x[i] * load(key + i * LANES);
        return sum;
    }
};

template <>
struct Query<BFloat16> {
    Words pairs[N / 2 + 1];
    Floats last;  // what is left where N is odd

    void read(const BFloat16* query) {
#pragma GCC unroll 32
        for (int i = 0; i < N / 2; i++) std::memcpy(&pairs[i], query + 2 * i * LANES, sizeof(Words));
        if constexpr (N % 2) last = load(query + (N - 1) * LANES);
    }

    Floats times(const BFloat16* key) const {
        Floats sum = {};
        if constexpr (N % 2) sum = last * load(key + (N - 1) * LANES);
#pragma GCC unroll 32
        for (int i = 0; i < N / 2; i++) {
            Words x;
            std::memcpy(&x, key + 2 * i * LANES, sizeof x);
            sum = add_pairs(sum, pairs[i], x);
        }
        return sum;
    }
};

// Lanes whose number has the bit STRIDE are b's, the others a's; each is added to the lane that differs in this bit.
template <int STRIDE>
static inline Floats fold(Floats a, Floats b) {
    Ints low, high;
    for (int i = 0; i < LANES; i++) {
        low[i] = i & STRIDE ? LANES + i - STRIDE : i;
        high[i] = i & STRIDE ? LANES + i : i + STRIDE;
    }
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

// Lane i is the sum of all lanes of vector(first + i), for 2 * STRIDE lanes, and again for the next as many.
template <int STRIDE, class Vector>
static inline __attribute__((always_inline)) Floats sums(const Vector& vector, int64_t first) {
    if constexpr (STRIDE == 1)
        return fold<1>(vector(first), vector(first + 1));
    else
        return fold<STRIDE>(sums<STRIDE / 2>(vector, first), sums<STRIDE / 2>(vector, first + STRIDE));
}

// A loop over HEADS heads that read the same keys, one after another for each block of keys, which stay in the cache.
// softcap: 0, or the bound that scores are brought under.
template <class T, int HEADS>
static void attend(const Call<T>& call, const Source<T>* sources, int64_t n_sources, float scaling, float softcap, int64_t row,
                   int64_t token, int64_t head, std::vector<float>& scores) {
    const int64_t own = call.at[row * call.tokens + token] + 1, key_head = head / (call.heads / call.key_heads);
    int64_t n = own;
    for (int64_t s = 0; s < n_sources; s++)
        if (sources[s].length) n += sources[s].length[row];
    const int64_t unseen = call.window ? std::max<int64_t>(0, n - call.window) : 0, room = n + LANES;
    if (int64_t(scores.size()) < HEADS * room) scores.resize(2 * HEADS * room);
    float* const begin = scores.data();  // (HEADS, room)

    Query<T> q[HEADS];
    const T* query =
        call.query + row * call.query_strides[0] + head * call.query_strides[1] + token * call.query_strides[2];
    for (int h = 0; h < HEADS; h++) q[h].read(query + h * call.query_strides[1]);
    int64_t first = 0;  // position of a source's first key
    n = 0;
    for (int64_t s = 0; s < n_sources; s++) {
        const Source<T>& source = sources[s];
        const int64_t length = source.length ? source.length[row] : own, node = source.node ? source.node[row] : row;
        const T* keys = source.key + node * source.key_strides[0] + key_head * source.key_strides[1];
        const int64_t from = std::max<int64_t>(0, unseen - first), stride = source.key_strides[2];
        for (int64_t j = from; j < length; j += LANES)
            for (int h = 0; h < HEADS; h++) {
                const auto product = [&](int64_t i) __attribute__((always_inline)) {
                    return q[h].times(keys + std::min(i, length - 1) * stride);
                };
                store(begin + h * room + n + (j - from), scaling * sums<LANES / 2>(product, j));
            }
        n += std::max<int64_t>(0, length - from);
        first += length;
    }

    float totals[HEADS];
    for (int h = 0; h < HEADS; h++) {
        float *const score = begin + h * room, *const end = score + n;
        if (softcap != 0)
            for (float* x = score; x < end; x += LANES) store(x, softcap * tangent(load(x) / softcap));
        store(end, Floats{} - INFINITY);  // what is left of the last vector adds nothing
        const float sink = call.sinks ? call.sinks[row * call.sinks_stride + head + h] : -INFINITY;
        Floats highest = Floats{} + sink;
        for (float* x = score; x < end; x += LANES) {
            const Floats here = load(x);
            highest = here > highest ? here : highest;
        }
        float most = highest[0];
        for (int i = 1; i < LANES; i++) most = std::max(most, highest[i]);
        Floats sum = {};
        for (float* x = score; x < end; x += LANES) {
            const Floats p = exponential(load(x) - most);
            sum += p;
            store(x, p);
        }
        totals[h] = exponential(Floats{} + (sink - most))[0];
        for (int i = 0; i < LANES; i++) totals[h] += sum[i];
    }

    // Sums of every key, or of every other one where an addition would wait for the one before.
    constexpr int PARTS = HEADS * N < 8 ? 2 : 1;
    Floats sum[PARTS][HEADS][N];
#pragma GCC unroll 2
    for (int part = 0; part < PARTS; part++)
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 32
            for (int i = 0; i < N; i++) sum[part][h][i] = Floats{};
    const auto add = [&](int part, const T* value, const float* p) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 32
            for (int i = 0; i < N; i++) sum[part][h][i] += p[h * room] * load(value + i * LANES);
    };
    const float* p = begin;
    first = 0;
    for (int64_t s = 0; s < n_sources; s++) {
        const Source<T>& source = sources[s];
        const int64_t length = source.length ? source.length[row] : own, node = source.node ? source.node[row] : row;
        const T* values = source.value + node * source.value_strides[0] + key_head * source.value_strides[1];
        const int64_t stride = source.value_strides[2];
        int64_t j = std::max<int64_t>(0, unseen - first);
        if (PARTS == 2 && j < length && (p - begin) % 2) add(PARTS - 1, values + j++ * stride, p++);
        for (; j + PARTS <= length; j += PARTS, p += PARTS) {
            add(0, values + j * stride, p);
            if (PARTS == 2) add(PARTS - 1, values + (j + 1) * stride, p + 1);
        }
        if (j < length) add(0, values + j * stride, p++);
        first += length;
    }
    T* out = call.out + ((row * call.tokens + token) * call.heads + head) * WIDTH;
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 32
        for (int i = 0; i < N; i++) {
            Floats x = sum[0][h][i];
            if constexpr (PARTS == 2) x += sum[1][h][i];
            store(out + h * WIDTH + i * LANES, x / totals[h]);
        }
}

template <class T>
using Attend = decltype(&attend<T, 1>);

template <class T, int... HEADS>
static Attend<T> of_heads(int64_t heads, std::integer_sequence<int, HEADS...>) {
    static constexpr Attend<T> of[] = {attend<T, HEADS + 1>...};
    return of[heads - 1];
}

template <class T>
static void attend_rows(const Call<T>& call, const Source<T>* sources, int64_t n_sources, float scaling,
                        float softcap) {
    const int64_t group = call.heads / call.key_heads;
#pragma omp parallel
    {
        std::vector<float> scores;
        // In an order in which neighbours find the same keys in the cache.
#pragma omp for schedule(static)
        for (int64_t task = 0; task < call.rows * call.key_heads; task++) {
            const int64_t row = task % call.rows, key_head = task / call.rows;
            for (int64_t token = 0; token < call.tokens; token++)
                for (int64_t i = 0; i < group; i += TOGETHER) {
                    const Attend<T> run = of_heads<T>(std::min<int64_t>(TOGETHER, group - i),
                                                      std::make_integer_sequence<int, TOGETHER>{});
                    run(call, sources, n_sources, scaling, softcap, row, token, key_head * group + i, scores);
                }
        }
    }
}

extern "C" void attend_all(const void* call, const void* sources, int64_t n_sources, double scaling, double softcap,
                           int bfloat16) {
    const auto run = [&](auto like) {
        using T = decltype(like);
        attend_rows(*(const Call<T>*)call, (const Source<T>*)sources, n_sources, scaling, softcap);
    };
    if (bfloat16)
        run(BFloat16{});
    else
        run(0.0f);
}
