// Attention of the tokens of a tree to what is before them in their own span and to all ancestors of it, in float32:
// out = softmax(scaling q k^T) v, and its gradients. Nothing is padded, and what is shared is read where it lies.
//
// The queries of a token's heads that share keys are neighbours; PANEL of them are worked on at a time, one in each lane
// of two vectors, the last of a tree with lanes to spare: scores are (keys, PANEL), so that softmax needs no sums across
// lanes. Everything else is products, all by one function.

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "vectors.h"

// out[m][c] (+)= sum over k of x[m * row + k * step] * w[k * w_stride + c]
struct Product {
    const float* x;
    int64_t row, step;
    const float* w;
    int64_t w_stride;
    int64_t n;  // of k
    float* out;
    int64_t out_stride;
    bool add;
};

template <int ROWS, int VECTORS>
static void tile(const Product& p) {
    Floats sum[ROWS][VECTORS];
    const float* x[(ROWS + 2) / 3];  // of every third row: the two behind it are an addition away, not a pointer each
    const float* w = p.w;
#pragma GCC unroll 16
    for (int i = 0; i < (ROWS + 2) / 3; i++) x[i] = p.x + 3 * i * p.row;
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++)
        for (int v = 0; v < VECTORS; v++) sum[m][v] = Floats{};
    const int64_t row = p.row, step = p.step, w_stride = p.w_stride;
#pragma GCC unroll 1
    for (int64_t k = p.n; k > 0; k--) {
        Floats of_w[VECTORS];
        for (int v = 0; v < VECTORS; v++) of_w[v] = load(w + v * LANES);
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; m++) {
            const float a = x[m / 3][m % 3 * row];
            for (int v = 0; v < VECTORS; v++) sum[m][v] += a * of_w[v];
        }
#pragma GCC unroll 16
        for (int i = 0; i < (ROWS + 2) / 3; i++) x[i] += step;
        w += w_stride;
    }
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++)
        for (int v = 0; v < VECTORS; v++) {
            float* out = p.out + m * p.out_stride + v * LANES;
            store(out, p.add ? load(out) + sum[m][v] : sum[m][v]);
        }
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
            part.w += column;
            part.out += from * p.out_stride + column;
            (columns - column < PANEL ? of_rows<1>(n, sizes) : of_rows<2>(n, sizes))(part);
        }
}

struct Matrices {  // of each head, (tokens, width)
    const float* data;
    int64_t head, token;  // strides
    const float* of(int64_t h, int64_t t) const { return data + h * head + t * token; }
};

struct Span {
    int64_t start, length, parent;
};

struct Call {
    Matrices query, key, value;
    const Span* spans;  // in the order of a walk through the tree
    int64_t n_spans;
    const int64_t* end;       // of each token: where the descendants of its span end
    const int64_t* position;  // of each token in its sequence
    int64_t tokens, heads, key_heads, width, value_width;
    int64_t window;      // keys that a query sees, its own the last; 0: all
    const float* sinks;  // a logit that takes probability away from every key, of each head; or null
    float* out;          // (tokens, heads, value_width)
    float* softmax;      // (tokens, heads, 2): the highest score, and 1 / sum of e^(score - highest)
};

struct Gradients {
    Matrices of_out;
    float* query;  // (tokens, heads, width)
    float* key;    // (parts, tokens, key_heads, width), zeros: each part of the queries adds to its own
    float* value;
    int64_t parts;
};

struct Keys {
    int64_t from, to;
};

// Queries `first` to `last` of every head of keys, counted as token * group + head of the group: of one tree, since
// another's may carry another adapter, and whatever has become of that must not be multiplied by nothing here.
struct Panel {
    int64_t first, last;
    int64_t n_keys;
};

class Walk {
  public:
    explicit Walk(const Call& call) : call(call), group(call.heads / call.key_heads) {
        for (int64_t s = 0; s < call.n_spans;) {
            const int64_t start = call.spans[s].start, stop = call.end[start];
            for (int64_t first = start * group; first < stop * group; first += PANEL) {
                Panel panel = {first, std::min<int64_t>(first + PANEL, stop * group), 0};
                for (const Keys& some : keys(panel)) panel.n_keys += some.to - some.from;
                panels.push_back(panel);
            }
            while (s < call.n_spans && call.spans[s].start < stop) s++;
        }
    }

    // What any of its queries may see.
    std::vector<Keys> keys(const Panel& panel) const {
        const int64_t first = panel.first / group, last = (panel.last - 1) / group;
        const Span* of_first =
            std::upper_bound(call.spans, call.spans + call.n_spans, first,
                             [](int64_t token, const Span& span) { return token < span.start; }) -
            1;
        int64_t lowest = call.position[first];
        for (int64_t t = first; t <= last; t++) lowest = std::min(lowest, call.position[t]);
        std::vector<Keys> found;
        const auto add = [&](int64_t from, int64_t to) {
            if (call.window)  // positions of a span are consecutive
                from = std::max(from, from + lowest - call.window + 1 - call.position[from]);
            if (from < to) found.push_back({from, to});
        };
        for (int64_t s = of_first->parent; s >= 0; s = call.spans[s].parent)
            add(call.spans[s].start, call.spans[s].start + call.spans[s].length);
        if (last < of_first->start + of_first->length)
            add(of_first->start, last + 1);
        else  // later spans, and all their ancestors that are not among those above, lie in between
            found.push_back({of_first->start, last + 1});
        return found;
    }

    const Call& call;
    const int64_t group;
    std::vector<Panel> panels;
};

// A panel under one head of keys, and where it is worked on.
struct Work {
    explicit Work(const Walk& walk) : walk(walk), call(walk.call) {}

    const Walk& walk;
    const Call& call;
    Panel panel;
    int64_t key_head;
    std::vector<Keys> keys;
    Ints token[2], position[2];               // of each lane; those without a query repeat the last one's
    std::vector<float> query, query_columns;  // scaled, (PANEL, width), zeros without a query; transposed
    std::vector<float> grad, grad_columns;
    std::vector<float> scores, slopes;  // (keys, PANEL)
    std::vector<float> result;          // (PANEL, width)

    void begin(const Panel& of, int64_t head, float scaling) {
        panel = of, key_head = head, keys = walk.keys(of);
        for (int64_t r = 0; r < PANEL; r++) {
            const int64_t t = std::min(panel.first + r, panel.last - 1) / walk.group;
            token[r / LANES][r % LANES] = int32_t(t);
            position[r / LANES][r % LANES] = int32_t(call.position[t]);
        }
        read(call.query, call.width, scaling, query, query_columns);
    }

    int64_t head_of(int64_t row) const { return key_head * walk.group + row % walk.group; }

    float* softmax_of(int64_t row) const { return call.softmax + 2 * (row / walk.group * call.heads + head_of(row)); }

    void read(const Matrices& from, int64_t width, float factor, std::vector<float>& rows, std::vector<float>& columns) {
        rows.resize(PANEL * width), columns.resize(PANEL * width);
        for (int64_t r = 0; r < PANEL; r++) {
            const int64_t row = panel.first + r;
            const float* x = row < panel.last ? from.of(head_of(row), row / walk.group) : nullptr;
            for (int64_t d = 0; d < width; d++) rows[r * width + d] = x ? factor * x[d] : 0;
        }
        for (int64_t d = 0; d < width; d++)
            for (int64_t r = 0; r < PANEL; r++) columns[d * PANEL + r] = rows[r * width + d];
    }

    void write(float* to, int64_t width, const float* factors) {
        for (int64_t row = panel.first; row < panel.last; row++)
            for (int64_t d = 0; d < width; d++) {
                const int64_t r = row - panel.first;
                to[(row / walk.group * call.heads + head_of(row)) * width + d] = result[r * width + d] * factors[r];
            }
    }

    // (keys, PANEL): of every key's row, with every query's column.
    void products(const Matrices& of_keys, const std::vector<float>& columns, int64_t width, std::vector<float>& out) {
        out.resize(panel.n_keys * PANEL);
        float* to = out.data();
        for (const auto& [from, end] : keys) {
            multiply({of_keys.of(key_head, from), of_keys.token, 1, columns.data(), PANEL, width, to, PANEL, false},
                     end - from, PANEL);
            to += (end - from) * PANEL;
        }
    }

    // result (PANEL, width): sums over the keys, with their weights (keys, PANEL).
    void mix(const std::vector<float>& weights, const Matrices& of_keys, int64_t width) {
        result.resize(PANEL * width);
        const float* x = weights.data();
        for (const auto& [from, end] : keys) {
            multiply({x, 1, PANEL, of_keys.of(key_head, from), of_keys.token, end - from, result.data(), width,
                      x != weights.data()},
                     PANEL, width);
            x += (end - from) * PANEL;
        }
    }

    // to (tokens, key heads, width) += sums over the queries, with their weights (keys, PANEL).
    void give(const std::vector<float>& weights, const std::vector<float>& rows, int64_t width, float* to) {
        const float* x = weights.data();
        const int64_t stride = call.key_heads * width;
        for (const auto& [from, end] : keys) {
            multiply({x, PANEL, 1, rows.data(), width, PANEL, to + from * stride + key_head * width, stride, true},
                     end - from, width);
            x += (end - from) * PANEL;
        }
    }

    // Scores, -inf where a query does not see a key; and what the soft cap multiplies gradients by, if there is one.
    void score(float softcap, bool sloping) {
        products(call.key, query_columns, call.width, scores);
        if (softcap != 0) {
            slopes.resize(sloping ? scores.size() : 0);
            for (size_t i = 0; i < scores.size(); i += LANES) {
                const Floats capped = tangent(load(&scores[i]) / softcap);
                store(&scores[i], softcap * capped);
                if (sloping) store(&slopes[i], 1.0f - capped * capped);
            }
        }
        float* x = scores.data();
        for (const auto& [from, end] : keys)
            for (int64_t key = from; key < end; key++)
                for (int half = 0; half < 2; half++, x += LANES) {
                    Ints seen = (token[half] >= int32_t(key)) & (token[half] < int32_t(call.end[key]));
                    if (call.window) seen &= position[half] - int32_t(call.position[key]) < int32_t(call.window);
                    store(x, seen ? load(x) : Floats{} - INFINITY);
                }
    }
};

static void forward(Work& work, float softcap) {
    const Call& call = work.call;
    work.score(softcap, false);
    float most[PANEL], shares[PANEL];
    for (int r = 0; r < PANEL; r++)
        most[r] = call.sinks ? call.sinks[work.head_of(work.panel.first + r)] : -INFINITY;
    for (int half = 0; half < 2; half++) {
        float* const begin = work.scores.data() + half * LANES;
        float* const end = begin + work.scores.size();
        const Floats sink = load(most + half * LANES);
        Floats highest = sink;
        for (float* x = begin; x < end; x += PANEL) highest = load(x) > highest ? load(x) : highest;
        Floats sum = exponential(sink - highest);
        for (float* x = begin; x < end; x += PANEL) {
            const Floats p = exponential(load(x) - highest);
            sum += p;
            store(x, p);
        }
        store(most + half * LANES, highest);
        store(shares + half * LANES, 1.0f / sum);
    }
    work.mix(work.scores, call.value, call.value_width);
    work.write(call.out, call.value_width, shares);
    for (int64_t row = work.panel.first; row < work.panel.last; row++) {
        float* const to = work.softmax_of(row);
        to[0] = most[row - work.panel.first], to[1] = shares[row - work.panel.first];
    }
}

static void backward(Work& work, const Gradients& to, int64_t part, float scaling, float softcap,
                     std::vector<float>& of_scores) {
    const Call& call = work.call;
    work.score(softcap, true);
    work.read(to.of_out, call.value_width, 1, work.grad, work.grad_columns);
    work.products(call.value, work.grad_columns, call.value_width, of_scores);  // as yet of probabilities
    float most[PANEL] = {}, shares[PANEL] = {}, factors[PANEL];  // lanes without a query have a share of nothing
    for (int64_t row = work.panel.first; row < work.panel.last; row++) {
        const float* const from = work.softmax_of(row);
        most[row - work.panel.first] = from[0], shares[row - work.panel.first] = from[1];
    }
    std::fill(factors, factors + PANEL, scaling);
    for (int half = 0; half < 2; half++) {
        const int64_t n = work.scores.size(), first = half * LANES;
        const Floats highest = load(most + first), share = load(shares + first);
        Floats mean = {};
        for (int64_t i = first; i < n; i += PANEL) {
            const Floats p = exponential(load(&work.scores[i]) - highest) * share;
            store(&work.scores[i], p);
            mean += p * load(&of_scores[i]);
        }
        for (int64_t i = first; i < n; i += PANEL) {
            Floats x = load(&work.scores[i]) * (load(&of_scores[i]) - mean);
            if (softcap != 0) x *= load(&work.slopes[i]);
            store(&of_scores[i], x);
        }
    }
    work.mix(of_scores, call.key, call.width);
    work.write(to.query, call.width, factors);
    const int64_t before = part * call.tokens * call.key_heads;
    work.give(of_scores, work.query, call.width, to.key + before * call.width);
    work.give(work.scores, work.grad, call.value_width, to.value + before * call.value_width);
}

extern "C" void attend_forward(const Call* call, double scaling, double softcap) {
    const Walk walk(*call);
    const int64_t n = walk.panels.size();
#pragma omp parallel
    {
        Work work(walk);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < n * call->key_heads; task++) {
            work.begin(walk.panels[task % n], task / n, scaling);
            forward(work, softcap);
        }
    }
}

// Parts of the queries are of about the same work, and each, under one head of keys, is one thread's: sums come in the
// same order every time.
extern "C" void attend_backward(const Call* call, const Gradients* to, double scaling, double softcap) {
    const Walk walk(*call);
    std::vector<int64_t> done = {0};  // work up to each panel
    for (const Panel& panel : walk.panels) done.push_back(done.back() + panel.n_keys);
    const auto first_of = [&](int64_t part) {
        return std::lower_bound(done.begin(), done.end() - 1, done.back() * part / to->parts) - done.begin();
    };
#pragma omp parallel
    {
        Work work(walk);
        std::vector<float> of_scores;
#pragma omp for schedule(static, 1)
        for (int64_t task = 0; task < to->parts * call->key_heads; task++) {
            const int64_t part = task / call->key_heads;
            for (int64_t i = first_of(part); i < first_of(part + 1); i++) {
                work.begin(walk.panels[i], task % call->key_heads, scaling);
                backward(work, *to, part, scaling, softcap, of_scores);
            }
        }
    }
}
