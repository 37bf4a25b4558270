// A panel of the forward pass: as many queries as a tile has lanes, one a lane, and what turns
// their products with a tile of keys, products[key][lane], into weights.
#pragma once

#include <cmath>

#include "attention_scores.h"
#include "layout.h"
#include "microkernel.h"
#include "philox.h"

namespace bigops {

template <class C>
struct Panel {
    static constexpr int L = kLanes<C>;
    static constexpr int64_t W = kTileLanes<C>;

    C *query, *out, *max, *sum;
    // ALiBi's, of each lane: minus the slope, and the key at distance 0. Philox' counters.
    C *slope, *position;
    uint32_t *number, *plane;
    int64_t count, vectors;    // lanes in use, and the vectors they fill
    int64_t key_begin, key_end;  // what any of the queries sees

    Panel(const AttentionProblem& p, Layout& layout) {
        query = layout.take<C>(p.head_size * W);
        out = layout.take<C>(p.value_size * W);
        max = layout.take<C>(W);
        sum = layout.take<C>(W);
        slope = layout.take<C>(W);
        position = layout.take<C>(W);
        number = layout.take<uint32_t>(W);
        plane = layout.take<uint32_t>(W);
    }

    void clear(int64_t value_size) const {
        for (int64_t lane = 0; lane < W; lane += L) {
            store(max + lane, splat(-std::numeric_limits<C>::infinity()));
            store(sum + lane, Vec<C>{});
        }
        for (int64_t at = 0; at < value_size * W; at += L) store(out + at, Vec<C>{});
    }

    Vec<C> alibi(int64_t lane, int64_t key) const {
        const Vec<C> distance = load(position + lane) - static_cast<C>(key);
        return load(slope + lane) * (distance < Vec<C>{} ? -distance : distance);
    }
};

// Keys outside of [first[lane], end[lane]), counted from the tile's first, weigh nothing.
template <class C>
void hide_keys(int64_t keys, const C* first, const C* end, C* scores) {
    constexpr int64_t W = Panel<C>::W;
    const Vec<C> never = splat(-std::numeric_limits<C>::infinity());
    for (int64_t k = 0; k < keys; ++k) {
        const Vec<C> key = splat(static_cast<C>(k));
        for (int64_t lane = 0; lane < W; lane += kLanes<C>) {
            C* at = scores + k * W + lane;
            const auto seen = (load(first + lane) <= key) & (key < load(end + lane));
            store(at, select(seen, load(at), never));
        }
    }
}

// Turns a tile's scores, still to be multiplied by `scale` > 0, into weights and brings the rows'
// maxima (in the same unit) and sums, and what out has gathered under the old maxima, up to date.
template <class C, int V>
void online_softmax(int64_t keys, C scale, C* scores, C* max, C* sum, C* out, int64_t value_size) {
    constexpr int L = kLanes<C>;
    constexpr int64_t W = kTileLanes<C>;
    Vec<C> top[V], reference[V], alpha[V], total[V];
    for (int v = 0; v < V; ++v) top[v] = load(max + v * L);
    for (int64_t k = 0; k < keys; ++k)
        for (int v = 0; v < V; ++v) top[v] = vmax(load(scores + k * W + v * L), top[v]);
    Vec<C> risen = {};
    for (int v = 0; v < V; ++v) {
        const Vec<C> old = load(max + v * L);
        // A row that has seen only -inf so far keeps weights of 2^-inf = 0, not 2^(inf - inf).
        const Vec<C> never = splat(-std::numeric_limits<C>::infinity());
        reference[v] = select(top[v] == never, Vec<C>{}, top[v] * scale);
        alpha[v] = weight(old * scale - reference[v]);
        risen = select(top[v] > old, splat(C(1)), risen);
        store(max + v * L, top[v]);
        total[v] = Vec<C>{};
    }
    constexpr int64_t kTerms = 8;  // a sum of sums rounds off less than one chain
    for (int64_t first = 0; first < keys; first += kTerms) {
        Vec<C> part[V] = {};
        for (int64_t k = first; k < std::min(first + kTerms, keys); ++k)
            for (int v = 0; v < V; ++v) {
                C* at = scores + k * W + v * L;
                const Vec<C> p = weight(fma(load(at), splat(scale), -reference[v]));
                part[v] += p;
                store(at, p);
            }
        for (int v = 0; v < V; ++v) total[v] += part[v];
    }
    for (int v = 0; v < V; ++v) store(sum + v * L, fma(load(sum + v * L), alpha[v], total[v]));
    if (bigops::max(risen) > 0)
        for (int64_t d = 0; d < value_size; ++d)
            for (int v = 0; v < V; ++v)
                store(out + d * W + v * L, load(out + d * W + v * L) * alpha[v]);
}

template <class C, int V = 1>
void online_softmax(int64_t keys, C scale, C* scores, const Panel<C>& panel, int64_t value_size) {
    if constexpr (V < kTileVectors)
        if (panel.vectors > V)
            return online_softmax<C, V + 1>(keys, scale, scores, panel, value_size);
    online_softmax<C, V>(keys, scale, scores, panel.max, panel.sum, panel.out, value_size);
}

// Weights of dropped keys become 0; the others' factor is left to the end. `j` is the tile's first
// key, a multiple of kDropoutKeys.
template <class C>
void drop_weights(const Dropout& dropout, int64_t j, int64_t keys, const Panel<C>& panel,
                  C* weights) {
    constexpr int64_t W = Panel<C>::W;
    constexpr int kCounters = kLanes<float>;
    for (int64_t lane = 0; lane < panel.count; lane += kCounters) {
        VecU number, plane;
        std::memcpy(&number, panel.number + lane, sizeof number);
        std::memcpy(&plane, panel.plane + lane, sizeof plane);
        for (int64_t k = 0; k < keys; k += kDropoutKeys) {
            VecI keep[kDropoutKeys];
            dropout.group((j + k) / kDropoutKeys, number, plane, keep);
            for (int64_t e = 0; e < std::min(kDropoutKeys, keys - k); ++e)
                for (int64_t at = lane; at < lane + kCounters; at += kLanes<C>) {
                    C* w = weights + (k + e) * W + at;
                    store(w, select(lanes_of<C>(keep[e], at - lane), load(w), Vec<C>{}));
                }
        }
    }
}

}  // namespace bigops
