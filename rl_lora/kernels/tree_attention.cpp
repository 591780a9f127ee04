// Attention of the tokens of a tree to what is before them in their own span and to all ancestors of it:
// out = softmax(scaling q k^T) v, and its gradients. Nothing is padded, and what is shared is read where it lies. Roots
// may continue keys and values of an earlier pass.
//
// The queries of a token's heads that share keys are neighbours; PANEL of them are worked on at a time, one in each lane
// of two vectors, the last of a tree with lanes to spare: scores are (keys, PANEL), so that softmax needs no sums across
// lanes. Everything else is products, all by one function.

#include <algorithm>
#include <cmath>
#include <vector>

#include "span_walk.h"

struct Place {
    int64_t token, head;
};

// A panel under one head of keys, and where it is worked on.
struct Work {
    explicit Work(const Walk& walk)
        : walk(walk),
          call(walk.call),
          width(std::max(call.width, call.value_width)),
          nothing(width),
          columns(PANEL * (width + VECTOR)),
          scores(PANEL * walk.most_keys),
          weights(PANEL * (walk.most_keys + 1)),
          key_pairs(width * (walk.most_keys + 1)),
          result(PANEL * width) {}

    static constexpr int64_t VECTOR = STEP * LANES;  // elements of one
    const Walk& walk;
    const Call& call;
    const int64_t width;  // of the wider of keys and values
    Panel panel;
    int64_t key_head;
    std::vector<Keys> keys;
    Place at[PANEL];             // of each lane; those without a query repeat the last one's
    Ints token[2], position[2];  // likewise
    Floats highest[2];           // score of each lane
    const std::vector<Element> nothing;            // in the place of a query that is not there
    std::vector<Element> columns;                  // of queries, or of gradients: (width / STEP, PANEL, STEP)
    std::vector<Element> query, grad;              // (PANEL / STEP, width, STEP)
    std::vector<float> scores, slopes, of_scores;  // (keys, PANEL)
    std::vector<Element> weights, key_pairs;       // as products read them
    std::vector<float> result;                     // (PANEL, width)

    void begin(const Panel& of, int64_t head) {
        panel = of, key_head = head, keys = walk.keys(of);
        int64_t t = panel.first / walk.group, i = panel.first % walk.group;
        for (int64_t r = 0; r < PANEL; r++) {
            at[r] = {t, key_head * walk.group + i};
            token[r / LANES][r % LANES] = int32_t(t);
            position[r / LANES][r % LANES] = int32_t(call.position[t]);
            if (r + 1 < n_queries() && ++i == walk.group) t++, i = 0;
        }
    }

    int64_t n_queries() const { return panel.last - panel.first; }

    int64_t place(int64_t r) const { return at[r].token * call.heads + at[r].head; }  // in what comes out

    // Sets columns, and rows where they are asked for.
    void read_queries(const Matrices& from, int64_t width, std::vector<Element>* rows) {
        const Element* x_of[PANEL];
        for (int64_t r = 0; r < PANEL; r++)
            x_of[r] = r < n_queries() ? from.of(at[r].head, at[r].token) : nothing.data();
        for (int64_t half = 0; half < PANEL; half += LANES)
            for (int64_t d = 0; d < width; d += VECTOR) {
                Words x[LANES] = {};
                for (int64_t r = 0; r < LANES; r++)
                    if (d + VECTOR <= width)
                        x[r] = read<Words>(x_of[half + r] + d);
                    else
                        std::memcpy(&x[r], x_of[half + r] + d, (width - d) * sizeof(Element));
                transpose(x);
                for (int64_t r = 0; r < LANES; r++)
                    std::memcpy(&columns[(d / STEP + r) * PANEL * STEP + half * STEP], &x[r], sizeof x[r]);
            }
        if (!rows) return;
        rows->resize(PANEL * width);
        for (int64_t r = 0; r < PANEL; r += STEP) interleave(x_of[r], x_of[r + STEP - 1], width, &(*rows)[r * width]);
    }

    void write(Element* to, int64_t width, const float* factors) {
        for (int64_t r = 0; r < n_queries(); r++)
            for (int64_t d = 0; d < width; d += LANES)
                store(to + place(r) * width + d, load(&result[r * width + d]) * factors[r]);
    }

    // (keys, PANEL): of every key's row, with every query's column.
    void products(const Matrices& own, const Matrices& past, int64_t width, std::vector<float>& out) {
        float* to = out.data();
        for (const auto& [from, end, node] : keys) {
            const Element* x = node == OWN ? own.of(key_head, from) : past.of(key_head, from, node);
            const int64_t token = node == OWN ? own.token : past.token;
            multiply({x, token, STEP, columns.data(), STEP * PANEL, width / STEP, to, PANEL, false}, end - from, PANEL);
            to += (end - from) * PANEL;
        }
    }

    // result (PANEL, width): sums over the keys, with their weights (keys, PANEL).
    void mix(const std::vector<float>& of_keys, const Matrices& own, const Matrices& past, int64_t width) {
        const Element* before = nullptr;
        int64_t i = 0;
        for (const auto& [from, end, node] : keys) {
            const int64_t token = node == OWN ? own.token : past.token;
            const Element* x = node == OWN ? own.of(key_head, from) : past.of(key_head, from, node);
            for (int64_t key = from; key < end; key++, i++, x += token) {
                if (i % STEP == STEP - 1 || i == panel.n_keys - 1)
                    interleave(i % STEP ? before : x, x, width, &key_pairs[i / STEP * STEP * width]);
                before = x;
            }
        }
        const Element* x = in_pairs(of_keys, panel.n_keys, weights);
        const int64_t n = (panel.n_keys + STEP - 1) / STEP;
        multiply({x, STEP, PANEL * STEP, key_pairs.data(), width * STEP, n, result.data(), width, false}, PANEL, width);
    }

    // to (tokens, width) += sums over the queries, with their weights (keys, PANEL).
    void give(const std::vector<float>& of_keys, const std::vector<Element>& rows, int64_t width, float* to) {
        const Element* x = in_rows(of_keys, panel.n_keys, weights);
        for (const auto& [from, end, node] : keys) {
            multiply({x, PANEL, STEP, rows.data(), width * STEP, PANEL / STEP, to + from * width, width, true},
                     end - from, width);
            x += (end - from) * PANEL;
        }
    }

    // Scores, -inf where a query does not see a key; and what the soft cap multiplies gradients by, if there is one.
    void score(float scaling, float softcap, bool sloping) {
        products(call.key, call.past_key, call.width, scores);
        if (softcap != 0) {
            slopes.resize(sloping ? scores.size() : 0);
            for (int64_t i = 0; i < panel.n_keys * PANEL; i += LANES) {
                const Floats capped = tangent(load(&scores[i]) * (scaling / softcap));
                store(&scores[i], softcap * capped);
                if (sloping) store(&slopes[i], 1.0f - capped * capped);
            }
            scaling = 1;
        }
        float* x = scores.data();
        const int64_t *const ends = call.end, *const positions = call.position;
        const Ints window = Ints{} + int32_t(call.window ? call.window : INT32_MAX);
        for (int half = 0; half < 2; half++) highest[half] = Floats{} - INFINITY;
        for (const auto& [from, end, node] : keys)
            for (int64_t key = from; key < end; key++)
                for (int half = 0; half < 2; half++, x += LANES) {
                    Ints seen = position[half] - int32_t(node == OWN ? positions[key] : key) < window;
                    if (node == OWN) seen &= (token[half] >= int32_t(key)) & (token[half] < int32_t(ends[key]));
                    const Floats masked = seen ? load(x) * scaling : Floats{} - INFINITY;
                    highest[half] = masked > highest[half] ? masked : highest[half];
                    store(x, masked);
                }
    }
};

static void forward(Work& work, float scaling, float softcap) {
    const Call& call = work.call;
    work.read_queries(call.query, call.width, nullptr);
    work.score(scaling, softcap, false);
    float most[PANEL], shares[PANEL];
    for (int r = 0; r < PANEL; r++) most[r] = call.sinks ? call.sinks[work.at[r].head] : -INFINITY;
    for (int half = 0; half < 2; half++) {
        float* const begin = work.scores.data() + half * LANES;
        float* const end = begin + work.panel.n_keys * PANEL;
        const Floats sink = load(most + half * LANES);
        const Floats highest = work.highest[half] > sink ? work.highest[half] : sink;
        Floats sum = exponential(sink - highest);
        for (float* x = begin; x < end; x += PANEL) {
            const Floats p = exponential(load(x) - highest);
            sum += p;
            store(x, p);
        }
        store(most + half * LANES, highest);
        store(shares + half * LANES, 1.0f / sum);
    }
    work.mix(work.scores, call.value, call.past_value, call.value_width);
    work.write(call.out, call.value_width, shares);
    for (int64_t r = 0; r < work.n_queries(); r++) {
        float* const to = call.softmax + 2 * work.place(r);
        to[0] = most[r], to[1] = shares[r];
    }
}

// An earlier pass gets no gradients.
static void backward(Work& work, const Gradients& to, float* of_keys, float* of_values, float scaling, float softcap) {
    const Call& call = work.call;
    std::vector<float>&scores = work.scores, &of_scores = work.of_scores;
    work.read_queries(call.query, call.width, &work.query);
    work.score(scaling, softcap, true);
    work.read_queries(to.of_out, call.value_width, &work.grad);
    of_scores.resize(scores.size());
    work.products(call.value, call.value, call.value_width, of_scores);  // as yet of probabilities
    float most[PANEL] = {}, shares[PANEL] = {}, factors[PANEL];  // lanes without a query have a share of nothing
    for (int64_t r = 0; r < work.n_queries(); r++) {
        const float* const from = call.softmax + 2 * work.place(r);
        most[r] = from[0], shares[r] = from[1];
    }
    std::fill(factors, factors + PANEL, 1.0f);
    for (int half = 0; half < 2; half++) {
        const int64_t n = work.panel.n_keys * PANEL, first = half * LANES;
        const Floats highest = load(most + first), share = load(shares + first);
        Floats mean = {};
        for (int64_t i = first; i < n; i += PANEL) {
            const Floats p = exponential(load(&scores[i]) - highest) * share;
            store(&scores[i], p);
            mean += p * load(&of_scores[i]);
        }
        for (int64_t i = first; i < n; i += PANEL) {
            Floats x = load(&scores[i]) * (load(&of_scores[i]) - mean) * scaling;
            if (softcap != 0) x *= load(&work.slopes[i]);
            store(&of_scores[i], x);
        }
    }
    work.mix(of_scores, call.key, call.key, call.width);
    work.write(to.query, call.width, factors);
    work.give(of_scores, work.query, call.width, of_keys);
    work.give(scores, work.grad, call.value_width, of_values);
}

// out (tokens, heads, width): sums of the parts, (parts, heads, tokens, width), that have anything of a token.
static void sum_parts(const Call& call, const std::vector<std::vector<uint8_t>>& touched, const float* parts,
                      int64_t width, int64_t token, Element* out) {
    for (int64_t head = 0; head < call.key_heads; head++)
        for (int64_t d = 0; d < width; d += LANES) {
            Floats sum = {};
            for (size_t part = 0; part < touched.size(); part++)
                if (touched[part][token])
                    sum += load(parts + ((part * call.key_heads + head) * call.tokens + token) * width + d);
            store(out + (token * call.key_heads + head) * width + d, sum);
        }
}

extern "C" void attend_forward(const Call* call, double scaling, double softcap) {
    const Walk walk(*call);
    const int64_t n = walk.panels.size();
#pragma omp parallel
    {
        Work work(walk);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < n * call->key_heads; task++) {
            work.begin(walk.panels[task % n], task / n);
            forward(work, scaling, softcap);
        }
    }
}

// Parts of the queries are of about the same work, and each, under one head of keys, is one thread's: sums come in the
// same order every time.
extern "C" void attend_backward(const Call* call, const Gradients* to, double scaling, double softcap) {
    const Walk walk(*call);
    const int64_t heads = call->key_heads;
    std::vector<int64_t> done = {0};  // work up to each panel
    for (const Panel& panel : walk.panels) done.push_back(done.back() + panel.n_keys);
    const auto first_of = [&](int64_t part) {
        return std::lower_bound(done.begin(), done.end() - 1, done.back() * part / to->parts) - done.begin();
    };
    std::vector<std::vector<uint8_t>> touched(to->parts, std::vector<uint8_t>(call->tokens));
    for (int64_t part = 0; part < to->parts; part++) {
        const int64_t first = first_of(part), last = first_of(part + 1) - 1;
        if (first > last) continue;
        for (const Keys& some : walk.keys({walk.panels[first].first, walk.panels[last].last, 0}))
            std::fill(&touched[part][some.from], &touched[part][some.to], 1);
    }
#pragma omp parallel
    {
        Work work(walk);
#pragma omp for schedule(static, 1)
        for (int64_t task = 0; task < to->parts * heads; task++) {
            const int64_t part = task / heads, before = task * call->tokens;
            float* const keys = to->key_parts + before * call->width;
            float* const values = to->value_parts + before * call->value_width;
            for (int64_t t = 0; t < call->tokens; t++)
                if (touched[part][t]) {
                    std::fill_n(keys + t * call->width, call->width, 0.0f);
                    std::fill_n(values + t * call->value_width, call->value_width, 0.0f);
                }
            for (int64_t i = first_of(part); i < first_of(part + 1); i++) {
                work.begin(walk.panels[i], task % heads);
                backward(work, *to, keys, values, scaling, softcap);
            }
        }
#pragma omp for schedule(static)
        for (int64_t token = 0; token < call->tokens; token++) {
            sum_parts(*call, touched, to->key_parts, call->width, token, to->key);
            sum_parts(*call, touched, to->value_parts, call->value_width, token, to->value);
        }
    }
}
