// The softmax of rows of logits, in two uses: drawing a token, and the log-probability of a given token with its
// gradient. A row is one thread's: what comes out depends neither on its neighbours nor on the number of threads.
//
// A row is read in blocks. A block is brought to float32 once, where the cache next to the processor holds it, for its
// maximum and then for its sum of exponentials: memory is read once for both. Sums of blocks are in float64.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <vector>

#include "vectors.h"

constexpr int64_t BLOCK = 1024;  // logits; a multiple of LANES

struct Call {
    void* projected;  // (rows, V), float or BFloat16: logits before `scale` and `softcap`
    int64_t stride;   // between rows
    int64_t rows, V;
    double scale;
    double softcap;  // 0, or the bound that logits are brought under
};

struct Drawing {
    const float* temperature;  // of each row, 0: the most probable token; or null: 1
    const float* uniforms;     // of each row, in [0, 1)
    int64_t* tokens;
    float* logprobs;
};

struct Scoring {
    const int64_t* targets;
    double temperature;
    float* logprobs;
    float* entropies;
    int64_t gradient;  // whether to write d log p(target) / d projected, times temperature / scale, over `projected`
};

static inline float maximum(Floats x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = std::max(most, x[i]);
    return most;
}

static inline double total(Floats x) {
    double sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

// The logits of a block in float32, and -inf behind them to fill the last vector. Returns their maximum, or the lowest
// finite number where that is higher: a difference from it is never that of two infinities.
template <class Number>
static inline float finish(const Call& call, const Number* projected, int64_t n, float* logits) {
    const float scale = call.scale, softcap = call.softcap;
    Floats highest = Floats{} - FLT_MAX;
    for (int64_t i = 0; i < n; i += LANES) {
        Number rest[LANES] = {};
        const bool whole = i + LANES <= n;
        if (!whole) std::memcpy(rest, projected + i, (n - i) * sizeof(Number));
        Floats x = load(whole ? projected + i : rest) * scale;
        if (softcap != 0) x = softcap * tangent(x / softcap);
        if (!whole)
            for (int j = n - i; j < LANES; j++) x[j] = -INFINITY;
        highest = x > highest ? x : highest;
        store(logits + i, x);
    }
    return maximum(highest);
}

static inline float inverse_of(float temperature) {
    return std::min(1.0f / temperature, FLT_MAX);  // times a difference of zero it must be zero
}

// One token, by inversion of the cumulative distribution: first its block, then its place there. `most` and `sum` have
// room for a number of every block, up to a whole vector.
template <class Number>
static void draw_row(const Call& call, const Drawing& to, int64_t row, std::vector<float>& most_of,
                     std::vector<float>& sum_of) {
    const Number* const projected = (const Number*)call.projected + row * call.stride;
    const float temperature = to.temperature ? to.temperature[row] : 1.0f;
    const bool greedy = temperature == 0;
    const float inverse = greedy ? 1.0f : inverse_of(temperature);
    const int64_t blocks = (call.V + BLOCK - 1) / BLOCK;
    const auto size = [&](int64_t b) { return std::min(BLOCK, call.V - b * BLOCK); };
    float logits[BLOCK], most = -FLT_MAX;
    double sum = 0;

    for (int64_t b = 0; b < blocks; b++) {
        const float here = most_of[b] = finish(call, projected + b * BLOCK, size(b), logits);
        Floats sum_here = {};
        for (int64_t i = 0; i < size(b); i += LANES) sum_here += exponential((load(logits + i) - here) * inverse);
        sum_of[b] = total(sum_here);
        most = std::max(most, here);
    }
    for (int64_t b = 0; b < blocks; b += LANES) {
        const Floats mass = load(sum_of.data() + b) * exponential((load(most_of.data() + b) - most) * inverse);
        store(sum_of.data() + b, mass);
        for (int64_t i = b; i < std::min(b + LANES, blocks); i++) sum += sum_of[i];
    }

    // The first block whose cumulative mass exceeds the target; NaN has none, and is found out by its log-probability.
    const double target = to.uniforms[row] * sum;
    double before = 0;
    int64_t block = 0;
    if (greedy)
        while (block + 1 < blocks && most_of[block] != most) block++;
    else
        while (block + 1 < blocks && !(before + sum_of[block] > target)) before += sum_of[block++];
    finish(call, projected + block * BLOCK, size(block), logits);
    int64_t at = 0;
    if (greedy) {
        while (at + 1 < size(block) && logits[at] != most) at++;
    } else {
        // Summed one by one, the block may end before the target: then it is the last token that has a probability.
        float p[BLOCK];
        for (int64_t i = 0; i < size(block); i += LANES)
            store(p + i, exponential((load(logits + i) - most) * inverse));
        for (int64_t i = 0; i < size(block) && !(before > target); i++)
            if (p[i] > 0) before += p[at = i];
    }
    to.tokens[row] = block * BLOCK + at;
    to.logprobs[row] = (logits[at] - most) * inverse - std::log(sum);
}

template <class Number>
static void draw(const Call& call, const Drawing& to) {
    const int64_t room = (call.V + BLOCK - 1) / BLOCK + LANES;
#pragma omp parallel
    {
        std::vector<float> most_of(room), sum_of(room);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < call.rows; row++) draw_row<Number>(call, to, row, most_of, sum_of);
    }
}

template <class Number>
static void score_row(const Call& call, const Scoring& to, int64_t row) {
    Number* const projected = (Number*)call.projected + row * call.stride;
    const float inverse = inverse_of(to.temperature), softcap = call.softcap;
    const int64_t target = to.targets[row];
    float logits[BLOCK], of_target = 0;

    // Sums of e^z and of z e^z, where z = (logit - most) / temperature, and most is the maximum so far.
    float most = -FLT_MAX;
    double sum = 0, weighted = 0;
    for (int64_t start = 0; start < call.V; start += BLOCK) {
        const int64_t n = std::min(BLOCK, call.V - start);
        const float here = finish(call, projected + start, n, logits);
        if (target >= start && target < start + n) of_target = logits[target - start];
        if (here > most) {
            const double shift = (double(most) - here) * inverse;
            weighted = std::exp(shift) * (weighted + shift * sum);
            sum *= std::exp(shift);
            most = here;
        }
        Floats sum_here = {}, weighted_here = {};
        for (int64_t i = 0; i < n; i += LANES) {
            const Floats z = (load(logits + i) - most) * inverse, e = exponential(z);
            sum_here += e;
            weighted_here += e * (z < -87.0f ? Floats{} : z);  // infinite where e is zero
        }
        sum += total(sum_here);
        weighted += total(weighted_here);
    }
    const float z = (of_target - most) * inverse;
    to.logprobs[row] = z - std::log(sum);
    to.entropies[row] = std::log(sum) - weighted / sum;
    if (!to.gradient) return;

    // Of a target y: (1[i = y] - p[i]), times the slope of the soft cap.
    const float of_sum = 1 / sum;
    const auto slope = [&](Floats x) {
        x /= softcap;
        return 1.0f - x * x;
    };
    for (int64_t start = 0; start < call.V; start += BLOCK) {
        const int64_t n = std::min(BLOCK, call.V - start);
        finish(call, projected + start, n, logits);
        for (int64_t i = 0; i < n; i += LANES) {
            const Floats x = load(logits + i);
            Floats gradient = exponential((x - most) * inverse) * -of_sum;
            if (softcap != 0) gradient *= slope(x);
            if (i + LANES <= n) {
                store(projected + start + i, gradient);
            } else {
                Number rest[LANES];
                store(rest, gradient);
                std::memcpy(projected + start + i, rest, (n - i) * sizeof(Number));
            }
        }
    }
    Floats gradient = 1.0f - exponential(Floats{} + z) * of_sum;
    if (softcap != 0) gradient *= slope(Floats{} + of_target);
    Number whole[LANES];
    store(whole, gradient);
    projected[target] = whole[0];
}

template <class Number>
static void score(const Call& call, const Scoring& to) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < call.rows; row++) score_row<Number>(call, to, row);
}

extern "C" void draw_float32(const Call* call, const Drawing* to) { draw<float>(*call, *to); }
extern "C" void draw_bfloat16(const Call* call, const Drawing* to) { draw<BFloat16>(*call, *to); }
extern "C" void score_float32(const Call* call, const Scoring* to) { score<float>(*call, *to); }
extern "C" void score_bfloat16(const Call* call, const Scoring* to) { score<BFloat16>(*call, *to); }
