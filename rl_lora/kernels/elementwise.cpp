// The elementwise chains of a layer, forward and backward, in one pass each: RMSNorm, the rotary embedding of queries and
// keys, and the gated activation of an MLP. Numbers are float or bfloat16 in memory, and float32 inside: bfloat16 is rounded
// once, at the end. A row is worked on by itself: what comes out does not depend on its neighbours or on threads, to the bit.

#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

constexpr int64_t SMALL = 1 << 16;  // numbers of a cheap chain that one thread has done before others are awake
constexpr int SUMS = 4;             // of a row: an addition does not wait for the one before

// Of the n <= LANES numbers there; the rest of the vector is zero.
template <class T>
static inline Floats load(const T* at, int64_t n) {
    if (n == LANES) return load(at);
    T all[LANES] = {};
    std::memcpy(all, at, n * sizeof(T));
    return load(all);
}

template <class T>
static inline void store(T* at, Floats x, int64_t n) {
    if (n == LANES) return store(at, x);
    T all[LANES];
    store(all, x);
    std::memcpy(at, all, n * sizeof(T));
}

template <class T>
static inline Floats rounded(Floats x) {
    T all[LANES];
    store(all, x);
    return load(all);
}

// work(first, numbers) for every vector of n numbers.
template <class Work>
static inline __attribute__((always_inline)) void each(int64_t n, Work work) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) work(i, int64_t(LANES));
    if (i < n) work(i, n - i);
}

// Sum of vector(first, numbers) over a row, in an order that depends on its width alone.
template <class Vector>
static inline __attribute__((always_inline)) float sum(int64_t n, Vector vector) {
    Floats sums[SUMS] = {};
    int64_t i = 0;
    for (; i + SUMS * LANES <= n; i += SUMS * LANES)
#pragma GCC unroll 4
        for (int s = 0; s < SUMS; s++) sums[s] += vector(i + s * LANES, int64_t(LANES));
    for (; i < n; i += LANES) sums[0] += vector(i, std::min<int64_t>(LANES, n - i));
    const Floats all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += all[lane];
    return total;
}

// The weight of RMSNorm in float32, with what is added to it.
static std::vector<float> widened(const void* weight, int64_t width, bool is_bfloat16, float offset) {
    std::vector<float> wide(width);
    each(width, [&](int64_t i, int64_t n) {
        const Floats x = is_bfloat16 ? load((const BFloat16*)weight + i, n) : load((const float*)weight + i, n);
        store(wide.data() + i, x + offset, n);
    });
    return wide;
}

// out = weight x scale with scale = 1 / sqrt(mean x^2 + eps). scales: (rows), to keep them, or null.
// ROUNDS: x scale is rounded before it is multiplied by the weight, as modules do that multiply in the dtype of x.
template <class T, bool ROUNDS>
static void normalise(const T* x, const float* weight, T* out, float* scales, int64_t rows, int64_t width, float eps) {
#pragma omp parallel for schedule(static) if (rows * width > SMALL)
    for (int64_t row = 0; row < rows; row++) {
        const T* const from = x + row * width;
        T* const to = out + row * width;
        const float squares = sum(width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
            const Floats here = load(from + i, n);
            return here * here;
        });
        const float scale = 1.0f / std::sqrt(squares / width + eps);
        each(width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
            Floats here = load(from + i, n) * scale;
            if (ROUNDS) here = rounded<T>(here);
            store(to + i, here * load(weight + i, n), n);
        });
        if (scales) scales[row] = scale;
    }
}

// dx = scale (g - x scale^2 mean(g x)) with g = weight dout.
template <class T>
static void normalise_backward(const T* dout, const T* x, const float* weight, const float* scales, T* dx, int64_t rows,
                               int64_t width) {
#pragma omp parallel for schedule(static) if (rows * width > SMALL)
    for (int64_t row = 0; row < rows; row++) {
        const T *const from = x + row * width, *const grad = dout + row * width;
        T* const to = dx + row * width;
        const float product = sum(width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
            return load(grad + i, n) * load(weight + i, n) * load(from + i, n);
        });
        const float scale = scales[row], share = scale * scale * (product / width);
        each(width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
            const Floats g = load(grad + i, n) * load(weight + i, n);
            store(to + i, scale * (g - share * load(from + i, n)), n);
        });
    }
}

extern "C" void rms_norm(const void* x, const void* weight, void* out, float* scales, int64_t rows, int64_t width,
                         int is_bfloat16, int weight_is_bfloat16, int rounds, double offset, double eps) {
    const std::vector<float> wide = widened(weight, width, weight_is_bfloat16, float(offset));
    if (!is_bfloat16)
        normalise<float, false>((const float*)x, wide.data(), (float*)out, scales, rows, width, float(eps));
    else if (rounds)
        normalise<BFloat16, true>((const BFloat16*)x, wide.data(), (BFloat16*)out, scales, rows, width, float(eps));
    else
        normalise<BFloat16, false>((const BFloat16*)x, wide.data(), (BFloat16*)out, scales, rows, width, float(eps));
}

extern "C" void rms_norm_backward(const void* dout, const void* x, const void* weight, const float* scales, void* dx,
                                  int64_t rows, int64_t width, int is_bfloat16, int weight_is_bfloat16, double offset) {
    const std::vector<float> wide = widened(weight, width, weight_is_bfloat16, float(offset));
    if (is_bfloat16)
        normalise_backward((const BFloat16*)dout, (const BFloat16*)x, wide.data(), scales, (BFloat16*)dx, rows, width);
    else
        normalise_backward((const float*)dout, (const float*)x, wide.data(), scales, (float*)dx, rows, width);
}

struct Heads {
    const void* from;
    int64_t strides[3];  // between rows, heads, tokens
    int64_t heads;
    void* to;  // (rows, tokens, heads, width)
};

struct Rotary {
    const void* cos;
    int64_t cos_strides[2];  // between rows, tokens
    const void* sin;
    int64_t sin_strides[2];
    int64_t rows, tokens, width;
    int64_t n;  // of the `Heads`: queries and keys
};

// Of a token: a head's halves a and b become a cos - b sin and b cos + a sin, each with its own half of cos and sin.
// INVERSE: the transpose of that.
template <class T, bool INVERSE>
static void rotate(const Rotary& call, const Heads* all, int64_t row, int64_t token) {
    const int64_t half = call.width / 2;
    const T* const cos = (const T*)call.cos + row * call.cos_strides[0] + token * call.cos_strides[1];
    const T* const sin = (const T*)call.sin + row * call.sin_strides[0] + token * call.sin_strides[1];
    for (const Heads* x = all; x < all + call.n; x++) {
        const T* const from = (const T*)x->from + row * x->strides[0] + token * x->strides[2];
        T* const to = (T*)x->to + (row * call.tokens + token) * x->heads * call.width;
        each(half, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
            const Floats cos_a = load(cos + i, n), cos_b = load(cos + half + i, n);
            const Floats of_b = load(sin + (INVERSE ? half : 0) + i, n) * (INVERSE ? -1.0f : 1.0f);
            const Floats of_a = load(sin + (INVERSE ? 0 : half) + i, n) * (INVERSE ? -1.0f : 1.0f);
            for (int64_t h = 0; h < x->heads; h++) {
                const Floats a = load(from + h * x->strides[1] + i, n), b = load(from + h * x->strides[1] + half + i, n);
                store(to + h * call.width + i, a * cos_a - b * of_b, n);
                store(to + h * call.width + half + i, b * cos_b + a * of_a, n);
            }
        });
    }
}

extern "C" void rotary(const Rotary* call, const Heads* all, int is_bfloat16, int inverse) {
    int64_t heads = 0;
    for (int64_t i = 0; i < call->n; i++) heads += all[i].heads;
    const auto run = is_bfloat16 ? (inverse ? rotate<BFloat16, true> : rotate<BFloat16, false>)
                                 : (inverse ? rotate<float, true> : rotate<float, false>);
#pragma omp parallel for schedule(static) if (call->rows * call->tokens * heads * call->width > SMALL)
    for (int64_t i = 0; i < call->rows * call->tokens; i++) run(*call, all, i / call->tokens, i % call->tokens);
}

// An activation x sigmoid(z(x)): of SiLU z = x; of GELU with its tangent z = 2 sqrt(2 / pi) (x + 0.044715 x^3).
constexpr float GELU_LINEAR = 1.5957691216057308f, GELU_CUBIC = 0.071354816272600622f;

struct Sigmoid {
    Floats of, rest;  // rest: 1 - of, without its cancellation
};

static inline Sigmoid sigmoid(Floats z) {
    const Floats e = exponential(z < 0.0f ? z : -z), large = 1.0f / (1.0f + e), small = e * large;
    return {z < 0.0f ? small : large, z < 0.0f ? large : small};
}

template <bool GELU>
static inline Floats inner(Floats x) {
    if constexpr (GELU)
        return x * (GELU_LINEAR + GELU_CUBIC * (x * x));
    else
        return x;
}

constexpr int64_t BLOCK = 4096;  // numbers of a piece of work

// out = activation(gate) up, of whole vectors
template <class T, bool GELU>
static __attribute__((noinline)) void gate_forward(const T* gate, const T* up, T* out, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) {
        const Floats x = load(gate + i);
        store(out + i, x * sigmoid(inner<GELU>(x)).of * load(up + i));
    }
}

template <class T, bool GELU>
static __attribute__((noinline)) void gate_backward(const T* dout, const T* gate, const T* up, T* dgate, T* dup,
                                                    int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) {
        const Floats x = load(gate + i), grad = load(dout + i);
        const Sigmoid s = sigmoid(inner<GELU>(x));
        const Floats value = x * s.of;
        const Floats inside = GELU ? GELU_LINEAR + 3.0f * GELU_CUBIC * (x * x) : Floats{} + 1.0f;
        store(dup + i, grad * value);
        store(dgate + i, grad * load(up + i) * (s.of + value * s.rest * inside));
    }
}

// work(inputs, outputs, numbers) on blocks of whole vectors, and on a copy of what is left behind them: it is the same code
// for every number, so that its bits do not depend on how many there are.
template <class T, int INPUTS, int OUTPUTS, class Work>
static void in_blocks(const void* const (&inputs)[INPUTS], void* const (&outputs)[OUTPUTS], int64_t size, Work work) {
    const int64_t whole = size - size % LANES;
#pragma omp parallel for schedule(static) if (size > SMALL / 4)
    for (int64_t first = 0; first < whole; first += BLOCK) {
        const T* from[INPUTS];
        T* to[OUTPUTS];
        for (int i = 0; i < INPUTS; i++) from[i] = (const T*)inputs[i] + first;
        for (int i = 0; i < OUTPUTS; i++) to[i] = (T*)outputs[i] + first;
        work(from, to, std::min(BLOCK, whole - first));
    }
    if (whole == size) return;
    T all[INPUTS + OUTPUTS][LANES] = {};
    const T* from[INPUTS];
    T* to[OUTPUTS];
    for (int i = 0; i < INPUTS; i++) {
        std::memcpy(all[i], (const T*)inputs[i] + whole, (size - whole) * sizeof(T));
        from[i] = all[i];
    }
    for (int i = 0; i < OUTPUTS; i++) to[i] = all[INPUTS + i];
    work(from, to, LANES);
    for (int i = 0; i < OUTPUTS; i++) std::memcpy((T*)outputs[i] + whole, to[i], (size - whole) * sizeof(T));
}

template <class T>
static void gated_of(const void* gate, const void* up, void* out, int64_t size, int gelu) {
    const auto run = gelu ? gate_forward<T, true> : gate_forward<T, false>;
    in_blocks<T>({gate, up}, {out}, size,
                 [&](const T** from, T** to, int64_t n) { run(from[0], from[1], to[0], n); });
}

template <class T>
static void gated_backward_of(const void* dout, const void* gate, const void* up, void* dgate, void* dup, int64_t size,
                              int gelu) {
    const auto run = gelu ? gate_backward<T, true> : gate_backward<T, false>;
    in_blocks<T>({dout, gate, up}, {dgate, dup}, size,
                 [&](const T** from, T** to, int64_t n) { run(from[0], from[1], from[2], to[0], to[1], n); });
}

extern "C" void gated(const void* gate, const void* up, void* out, int64_t size, int is_bfloat16, int gelu) {
    (is_bfloat16 ? gated_of<BFloat16> : gated_of<float>)(gate, up, out, size, gelu);
}

extern "C" void gated_backward(const void* dout, const void* gate, const void* up, void* dgate, void* dup, int64_t size,
                               int is_bfloat16, int gelu) {
    (is_bfloat16 ? gated_backward_of<BFloat16> : gated_backward_of<float>)(dout, gate, up, dgate, dup, size, gelu);
}
