// Attention of the new tokens of a decoding step: out = softmax(scaling q k^T) v over the keys that each may see.
// Tensors are all float32 or all bfloat16 (T below); sums are float32. A row and a head are worked on by themselves:
// what comes out does not depend on a row's neighbours, to the bit, nor on which of its keys are shared.
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

template <int HEADS>
struct Many {  // one vector of each head
    Floats of[HEADS];
};

// HEADS heads of a query, and the products of their numbers with those of a key, to be summed over the lanes.
template <class T, int HEADS>
struct Query;

template <int HEADS>
struct Query<float, HEADS> {
    Floats x[HEADS][N];

    void read(int h, const float* query) {
#pragma GCC unroll 32
        for (int i = 0; i < N; i++) x[h][i] = load(query + i * LANES);
    }

    Many<HEADS> times(const float* key) const {
        Many<HEADS> sum;
#pragma GCC unroll 32
        for (int i = 0; i < N; i++) {
            const Floats k = load(key + i * LANES);
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) sum.of[h] = i ? sum.of[h] + x[h][i] * k : x[h][i] * k;
        }
        return sum;
    }
};

template <int HEADS>
struct Query<BFloat16, HEADS> {
    Words pairs[HEADS][N / 2 + 1];
    Floats last[HEADS];  // of an odd number of vectors

    void read(int h, const BFloat16* query) {
#pragma GCC unroll 32
        for (int i = 0; i < N / 2; i++) std::memcpy(&pairs[h][i], query + 2 * i * LANES, sizeof(Words));
        if constexpr (N % 2) last[h] = load(query + (N - 1) * LANES);
    }

    Many<HEADS> times(const BFloat16* key) const {
        Many<HEADS> sum = {};
        if constexpr (N % 2)
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) sum.of[h] = last[h] * load(key + (N - 1) * LANES);
#pragma GCC unroll 32
        for (int i = 0; i < N / 2; i++) {
            Words k;
            std::memcpy(&k, key + 2 * i * LANES, sizeof k);
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) sum.of[h] = add_pairs(sum.of[h], pairs[h][i], k);
        }
        return sum;
    }
};

// The numbers of a head in the order in which they are quickest to read: in bfloat16 two vectors share each pair of
// neighbours. `write` brings them back.
static inline __attribute__((always_inline)) void read(const float* at, Floats (&x)[N]) {
#pragma GCC unroll 32
    for (int i = 0; i < N; i++) x[i] = load(at + i * LANES);
}

static inline __attribute__((always_inline)) void read(const BFloat16* at, Floats (&x)[N]) {
#pragma GCC unroll 32
    for (int i = 0; i + 1 < N; i += 2) {
        Words pairs;
        std::memcpy(&pairs, at + i * LANES, sizeof pairs);
        x[i] = (Floats)(pairs << 16);
        x[i + 1] = (Floats)(pairs & 0xffff0000u);
    }
    if constexpr (N % 2) x[N - 1] = load(at + (N - 1) * LANES);
}

static inline void write(float* at, const Floats (&x)[N]) {
    for (int i = 0; i < N; i++) store(at + i * LANES, x[i]);
}

static inline void write(BFloat16* at, const Floats (&x)[N]) {
    Ints low, high;
    for (int i = 0; i < LANES; i++) {
        low[i] = i % 2 * LANES + i / 2;
        high[i] = low[i] + LANES / 2;
    }
    for (int i = 0; i + 1 < N; i += 2) {
        store(at + i * LANES, __builtin_shuffle(x[i], x[i + 1], low));
        store(at + (i + 1) * LANES, __builtin_shuffle(x[i], x[i + 1], high));
    }
    if constexpr (N % 2) store(at + (N - 1) * LANES, x[N - 1]);
}

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

// Lane i is the sum of all lanes of vectors(first + i), for 2 * STRIDE lanes, and again for the next as many.
template <int STRIDE, class Vectors>
static inline __attribute__((always_inline)) auto sums(const Vectors& vectors, int64_t first) {
    if constexpr (STRIDE == 0) {
        return vectors(first);
    } else {
        auto a = sums<STRIDE / 2>(vectors, first);
        const auto b = sums<STRIDE / 2>(vectors, first + STRIDE);
#pragma GCC unroll 4
        for (unsigned h = 0; h < sizeof a.of / sizeof *a.of; h++) a.of[h] = fold<STRIDE>(a.of[h], b.of[h]);
        return a;
    }
}

// HEADS heads that read the same keys. softcap: 0, or the bound that scores are brought under.
template <class T, int HEADS>
static void attend(const Call<T>& call, const Source<T>* sources, int64_t n_sources, float scaling, float softcap,
                   int64_t row, int64_t token, int64_t key_head, int64_t head, std::vector<float>& scores) {
    const int64_t own = call.at[row * call.tokens + token] + 1;
    int64_t n = own;
    for (int64_t s = 0; s < n_sources; s++)
        if (sources[s].length) n += sources[s].length[row];
    const int64_t unseen = call.window ? std::max<int64_t>(0, n - call.window) : 0, room = n + n_sources * LANES;
    if (int64_t(scores.size()) < HEADS * room) scores.resize(2 * HEADS * room);
    float* const begin = scores.data();  // (HEADS, room): a source's scores fill whole vectors

    Query<T, HEADS> q;
    const T* query =
        call.query + row * call.query_strides[0] + head * call.query_strides[1] + token * call.query_strides[2];
    Ints lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    Floats most[HEADS], total[HEADS];  // scores; sums of probabilities
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; h++) {
        q.read(h, query + h * call.query_strides[1]);
        total[h] = Floats{} + (call.sinks ? call.sinks[row * call.sinks_stride + head + h] : -INFINITY);
        most[h] = total[h];
    }
    int64_t first = 0;  // position of a source's first key
    float* end = begin;
    for (int64_t s = 0; s < n_sources; s++) {
        const Source<T>& source = sources[s];
        const int64_t length = source.length ? source.length[row] : own, node = source.node ? source.node[row] : row;
        const T* keys = source.key + node * source.key_strides[0] + key_head * source.key_strides[1];
        const int64_t stride = source.key_strides[2];
        for (int64_t j = std::max<int64_t>(0, unseen - first); j < length; j += LANES, end += LANES) {
            const auto products = [&](int64_t i) __attribute__((always_inline)) {
                return q.times(keys + std::min(i, length - 1) * stride);
            };
            const Many<HEADS> score = sums<LANES / 2>(products, j);
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) {
                Floats x = scaling * score.of[h];
                if (softcap != 0) x = softcap * tangent(x / softcap);
                if (length - j < LANES) x = lane < int32_t(length - j) ? x : Floats{} - INFINITY;
                most[h] = x > most[h] ? x : most[h];
                store(end + h * room, x);
            }
        }
        first += length;
    }
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; h++) {
        for (int stride = LANES / 2; stride; stride /= 2) {
            const Floats other = __builtin_shuffle(most[h], lane ^ stride);
            most[h] = other > most[h] ? other : most[h];
        }
        total[h] = exponential(total[h] - most[h]);
        for (float* x = begin + h * room; x < end + h * room; x += LANES) store(x, exponential(load(x) - most[h]));
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
        Floats x[N];
        read(value, x);
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) {
            const Floats weight = Floats{} + p[h * room];
            total[h] += weight;
#pragma GCC unroll 32
            for (int i = 0; i < N; i++) sum[part][h][i] += weight * x[i];
        }
    };
    const float* of_source = begin;
    int64_t seen = 0;
    first = 0;
    for (int64_t s = 0; s < n_sources; s++) {
        const Source<T>& source = sources[s];
        const int64_t length = source.length ? source.length[row] : own, node = source.node ? source.node[row] : row;
        const T* values = source.value + node * source.value_strides[0] + key_head * source.value_strides[1];
        const int64_t stride = source.value_strides[2], from = std::max<int64_t>(0, unseen - first);
        const float* p = of_source - from;
        int64_t j = from;
        if (PARTS == 2 && j < length && seen % 2) {
            add(PARTS - 1, values + j * stride, p + j);
            j++;
        }
        for (; j + PARTS <= length; j += PARTS) {
            add(0, values + j * stride, p + j);
            if (PARTS == 2) add(PARTS - 1, values + (j + 1) * stride, p + j + 1);
        }
        if (j < length) add(0, values + j * stride, p + j);
        first += length;
        if (length > from) {
            seen += length - from;
            of_source += (length - from + LANES - 1) / LANES * LANES;
        }
    }
    T* out = call.out + ((row * call.tokens + token) * call.heads + head) * WIDTH;
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; h++) {
        const Floats share = 1.0f / total[h];
        Floats x[N];
#pragma GCC unroll 32
        for (int i = 0; i < N; i++) x[i] = (PARTS == 2 ? sum[0][h][i] + sum[PARTS - 1][h][i] : sum[0][h][i]) * share;
        write(out + h * WIDTH, x);
    }
}

// What a row reads lies in memory, in pieces too short for the processor to foresee; so its beginning is asked for
// while the row before it is worked on. `always_inline`: GCC drops calls of a function that does nothing else.
template <class T>
static inline __attribute__((always_inline)) void prefetch(const Call<T>& call, const Source<T>* sources,
                                                           int64_t n_sources, int64_t row, int64_t key_head) {
    constexpr int64_t MOST_TOKENS = 64, LINE = 64 / sizeof(T);
    for (int64_t s = 0; s < n_sources; s++) {
        const Source<T>& source = sources[s];
        const int64_t node = source.node ? source.node[row] : row;
        if (row && source.node && source.node[row - 1] == node) continue;  // read just now
        const int64_t own = call.at[row * call.tokens] + 1;
        const int64_t length = std::min(MOST_TOKENS, source.length ? source.length[row] : own);
        const T* key = source.key + node * source.key_strides[0] + key_head * source.key_strides[1];
        const T* value = source.value + node * source.value_strides[0] + key_head * source.value_strides[1];
        for (int64_t j = 0; j < length; j++)
            for (int64_t i = 0; i < WIDTH; i += LINE) {
                __builtin_prefetch(key + j * source.key_strides[2] + i, 0, 1);
                __builtin_prefetch(value + j * source.value_strides[2] + i, 0, 1);
            }
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
            const int64_t row = task % call.rows, key_head = task / call.rows, next = task + 1;
            if (next < call.rows * call.key_heads)
                prefetch(call, sources, n_sources, next % call.rows, next / call.rows);
            for (int64_t token = 0; token < call.tokens; token++)
                for (int64_t i = 0; i < group; i += TOGETHER) {
                    const Attend<T> run = of_heads<T>(std::min<int64_t>(TOGETHER, group - i),
                                                      std::make_integer_sequence<int, TOGETHER>{});
                    run(call, sources, n_sources, scaling, softcap, row, token, key_head, key_head * group + i,
                        scores);
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
