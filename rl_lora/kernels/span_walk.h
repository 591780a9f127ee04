// The calls of `tree_attention.cpp`, and which keys its queries may see: spans of a tree, in the order of a walk through it.

#pragma once

#include <algorithm>
#include <vector>

#include "products.h"

struct Matrices {  // of each head, (tokens, width); of an earlier pass, those of each of its nodes
    const Element* data;
    int64_t node, head, token;  // strides
    const Element* of(int64_t h, int64_t t, int64_t of_node = 0) const {
        return data + of_node * node + h * head + t * token;
    }
};

struct Span {
    int64_t start, length, parent;
};

struct Call {
    Matrices query, key, value;
    Matrices past_key, past_value;
    const int64_t* past_of_span;  // the node that each span without a parent continues; null: there is no earlier pass
    const int64_t* past_length;   // of each node
    const Span* spans;            // in the order of a walk through the tree
    int64_t n_spans;
    const int64_t* end;       // of each token: where the descendants of its span end
    const int64_t* position;  // of each token in its sequence
    int64_t tokens, heads, key_heads, width, value_width;
    int64_t window;      // keys that a query sees, its own the last; 0: all
    const float* sinks;  // a logit that takes probability away from every key, of each head; or null
    Element* out;        // (tokens, heads, value_width)
    float* softmax;      // (tokens, heads, 2): the highest score, and 1 / sum of e^(score - highest)
};

struct Gradients {
    Matrices of_out;
    Element* query;  // (tokens, heads, width)
    Element* key;    // (tokens, key_heads, width)
    Element* value;
    float* key_parts;  // (parts, key_heads, tokens, width): each part of the queries adds to its own
    float* value_parts;
    int64_t parts;
};

struct Keys {
    int64_t from, to;
    int64_t node;  // of an earlier pass, whose positions are counted then; or OWN
};
constexpr int64_t OWN = -1;

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
                most_keys = std::max(most_keys, panel.n_keys);
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
        const auto add = [&](int64_t from, int64_t to, int64_t position, int64_t node) {
            if (call.window)  // positions of a span are consecutive
                from = std::max(from, from + lowest - call.window + 1 - position);
            if (from < to) found.push_back({from, to, node});
        };
        const Span* root = of_first;
        for (int64_t s = of_first->parent; s >= 0; s = root->parent) {
            root = call.spans + s;
            add(root->start, root->start + root->length, call.position[root->start], OWN);
        }
        if (call.past_of_span) {
            const int64_t node = call.past_of_span[root - call.spans];
            add(0, call.past_length[node], 0, node);
        }
        if (last < of_first->start + of_first->length)
            add(of_first->start, last + 1, call.position[of_first->start], OWN);
        else  // later spans, and all their ancestors that are not among those above, lie in between
            found.push_back({of_first->start, last + 1, OWN});
        return found;
    }

    const Call& call;
    const int64_t group;
    std::vector<Panel> panels;
    int64_t most_keys = 0;  // of a panel
};
