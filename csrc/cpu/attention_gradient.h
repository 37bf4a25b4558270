// What the backward passes share: two numbers of each row, and P and dS of a tile of queries and
// keys. Keys are the lanes: key^T and value^T are packed once for all the queries that meet them,
// queries and grad_out are only broadcast.
#pragma once

#include <algorithm>

#include "attention_rows.h"
#include "attention_scores.h"
#include "layout.h"
#include "microkernel.h"
#include "philox.h"
#include "threads.h"

namespace bigops {

// lse and delta_i = sum_d grad_out_id out_id - grad_lse_i of every row of the tensors. A row that
// has seen nothing has P = 0 and delta = 0, whatever its grad_lse.
template <class T>
class RowTerms {
    using C = compute_t<T>;
    static constexpr int L = kLanes<C>;
    static constexpr int64_t W = kTileLanes<C>;
    static constexpr C kInfinity = std::numeric_limits<C>::infinity();

   public:
    RowTerms(const AttentionProblem& problem, const AttentionSaved& saved)
        : p(problem), saved(saved),
          rows(saved.query.shape[0] * p.heads * p.query_rows),
          memory(3 * rows * static_cast<int64_t>(sizeof(C))),
          lse(reinterpret_cast<C*>(memory.at(0))), delta(lse + rows), share(delta + rows) {
        std::fill_n(share, rows, C(1));
        const std::vector<RowBlock> blocks =
            blocks_of(p, W, [](const Sequence& s) { return s.query_len; });
        const auto tasks = static_cast<int64_t>(blocks.size()) * p.heads;
#pragma omp parallel num_threads(threads_for(2.5 * p.operations))
        {
            Layout measure(nullptr);
            Pieces(p, measure);
            const Arena scratch(measure.size());
            Layout layout(scratch.at(0));
            const Pieces pieces(p, layout);
#pragma omp for
            for (int64_t task = 0; task < tasks; ++task) {
                const RowBlock& block = blocks[static_cast<size_t>(task / p.heads)];
                prepare(p.sequence(block.sequence), task % p.heads, block.first, pieces);
            }
        }
    }

    int64_t row_of(const Sequence& s, int64_t h, int64_t i) const {
        return (s.batch * p.heads + h) * p.query_rows + s.query_start + i;
    }

   private:
    struct Pieces {
        C *grads, *outs, *deltas;
        int64_t* offsets;

        Pieces(const AttentionProblem& p, Layout& layout) {
            grads = layout.take<C>(p.value_size * W);
            outs = layout.take<C>(p.value_size * W);
            deltas = layout.take<C>(W);
            offsets = layout.take<int64_t>(W);
        }
    };

    // Up to W queries, one a lane. delta is summed up as tile_matmul sums up grad_out value^T:
    // where a row's weight is all on one key, out is that key's value, and what must cancel does,
    // to the last bit.
    void prepare(const Sequence& s, int64_t h, int64_t i, const Pieces& to) const {
        const int64_t count = std::min(W, s.query_len - i);
        const auto transpose = [&](const View& view, C* packed) {
            for (int64_t r = 0; r < count; ++r) to.offsets[r] = r * view.strides[2];
            pack_transposed<T>({s.query_row<const T>(view, h, i), to.offsets, view.strides[3]},
                               count, p.value_size, C(1), packed, W);
        };
        transpose(saved.grad_out, to.grads);
        transpose(saved.out, to.outs);
        for (int64_t lane = 0; lane < count; lane += L) {
            Vec<C> total = {};
            for (int64_t k = 0; k < p.value_size; k += kChain) {
                Vec<C> chain = {};
                for (int64_t d = k; d < std::min(k + kChain, p.value_size); ++d)
                    chain = fma(load(to.grads + d * W + lane), load(to.outs + d * W + lane), chain);
                total += chain;
            }
            store(to.deltas + lane, total);
        }
        for (int64_t r = 0; r < count; ++r) {
            const C row_lse = *s.query_row<C>(saved.lse, h, i + r);
            const bool dead = row_lse == -kInfinity;
            const C from_lse = saved.grad_lse ? *s.query_row<C>(*saved.grad_lse, h, i + r) : C(0);
            lse[row_of(s, h, i + r)] = dead ? kInfinity : row_lse;
            delta[row_of(s, h, i + r)] = dead ? C(0) : to.deltas[r] - from_lse;
        }
    }

    const AttentionProblem& p;
    const AttentionSaved& saved;
    int64_t rows;
    Arena memory;

   public:
    C *lse, *delta;
    C* share;  // what dS is to be multiplied by where it is a gradient itself: see refine_rows
};

// Queries of a tile: P and dS, 16 KiB each at 64 keys, and the rows they multiply alternate in L1.
constexpr int64_t kQueryBlock = 64;

template <class T>
class GradientTile {
    using C = compute_t<T>;
    static constexpr int L = kLanes<C>;
    static constexpr C kInfinity = std::numeric_limits<C>::infinity();

   public:
    static constexpr int64_t W = kTileLanes<C>;  // keys of a tile

    C *weights, *grads;  // P times what dropout makes of it, and scale * dS; a row a query
    C* raw;                 // dS before softcap and scale, where it is asked for
    bool measures = false;  // then weights are P, grads P times the gradient of the dropped P
    TileRows<C> query_rows, grad_rows;  // of the tile computed last

    GradientTile(const AttentionProblem& problem, const AttentionSaved& saved,
                 const RowTerms<T>& terms, Layout& layout)
        : p(problem), saved(saved), terms(terms), to_score(p.options, p.options.scale),
          dropout(p.options.seed, p.options.dropout_p) {
        const int64_t d = round_up(p.head_size, L), dv = round_up(p.value_size, L);
        key_t = layout.take<C>(d * W);
        value_t = layout.take<C>(dv * W);
        weights = layout.take<C>(kQueryBlock * W);
        grads = layout.take<C>(kQueryBlock * W);
        raw = layout.take<C>(kQueryBlock * W);
        queries = layout.take<C>(kQueryBlock * packed_pitch<C>(p.head_size));
        grad_outs = layout.take<C>(kQueryBlock * packed_pitch<C>(p.value_size));
        addend = layout.take<C>(W);
        keep = layout.take<int16_t>(W + Dropout::kRowSlack);
        offsets = layout.take<int64_t>(std::max(kQueryBlock, W));
    }

    // Keys [j, j + keys) become the lanes; also the rows of `key` if `rows` is given.
    void take_keys(const Sequence& s, int64_t kv_head, int64_t j, int64_t keys, C* rows) {
        for (int64_t r = 0; r < keys; ++r) offsets[r] = r * saved.key.strides[2];
        const Rows<const T> from{s.key_row<const T>(saved.key, kv_head, j), offsets,
                                 saved.key.strides[3]};
        pack_transposed<T>(from, keys, p.head_size, C(1), key_t, W);
        if (rows) pack_rows<T>(from, keys, p.head_size, rows, round_up(p.head_size, L));
        for (int64_t r = 0; r < keys; ++r) offsets[r] = r * saved.value.strides[2];
        pack_transposed<T>({s.key_row<const T>(saved.value, kv_head, j), offsets,
                            saved.value.strides[3]},
                           keys, p.value_size, C(1), value_t, W);
    }

    // weights, grads (if needed) and raw (if asked for) of queries [i, i + rows) and the keys.
    void compute(const Sequence& s, int64_t h, int64_t i, int64_t rows, int64_t j, int64_t keys,
                 bool needs_grads, bool needs_raw) {
        const int64_t vectors = divide_up(keys, L);
        query_rows = tile_of(saved.query, s.query_row<const T>(saved.query, h, i), rows, queries,
                             offsets);
        grad_rows = tile_of(saved.grad_out, s.query_row<const T>(saved.grad_out, h, i), rows,
                            grad_outs, offsets);
        tile_matmul(rows, vectors, p.head_size, query_rows.data, query_rows.pitch, 1, key_t, W,
                    weights, W, false);
        if (needs_grads)
            tile_matmul(rows, vectors, p.value_size, grad_rows.data, grad_rows.pitch, 1, value_t, W,
                        grads, W, false);
        const bool maps = p.adds_to_scores() || p.options.softcap > 0;
        for (int64_t r = 0; r < rows; ++r) {
            C* row = needs_raw ? raw + r * W : nullptr;
            if (dropout) weigh<true, true>(s, h, i, r, j, keys, needs_grads, row);
            else if (maps) weigh<true, false>(s, h, i, r, j, keys, needs_grads, row);
            else weigh<false, false>(s, h, i, r, j, keys, needs_grads, row);
        }
    }

   private:
    // Row r: products become P and scale * dS. kMaps: it takes more than a scale to make a score.
    template <bool kMaps, bool kDrops>
    void weigh(const Sequence& s, int64_t h, int64_t i, int64_t r, int64_t j, int64_t keys,
               bool needs_grads, C* raw_row) {
        const int64_t at = terms.row_of(s, h, i + r);
        const C row_lse = terms.lse[at], delta = terms.delta[at], share = terms.share[at];
        const C scale = static_cast<C>(p.options.scale);
        C *p_row = weights + r * W, *ds_row = grads + r * W;
        // A mapped score is rounded as forward rounded it before lse is taken off; the scores that
        // forward left unrounded stay so.
        const bool rounds = kMaps && (p.adds_to_scores() || p.options.softcap > 0);
        const C after = rounds ? row_lse : C(0);
        if (rounds) addend_row(p, s, h, i + r, j, keys, C(1), addend, kQueryBlock);
        else std::fill_n(addend, W, -row_lse);
        const int64_t first = s.first_key(i + r) - j, end = s.end_key(i + r) - j;
        for (int64_t k = 0; k < std::min(first, keys); ++k) addend[k] = -kInfinity;
        for (int64_t k = std::max<int64_t>(0, end); k < keys; ++k) addend[k] = -kInfinity;
        const int16_t* kept =
            kDrops ? dropout.row(s.index * p.heads + h, i + r, j, keys, keep) : nullptr;
        const C factor = static_cast<C>(dropout.factor());
        for (int64_t lane = 0; lane < W; lane += L) {
            const Vec<C> product = load(p_row + lane);
            Vec<C> slope = splat(scale), score;
            if constexpr (kMaps) {
                score = to_score(product, load(addend + lane));
                if (p.options.softcap > 0) slope = to_score.slope(product) * scale;
            } else {
                score = fma(product, splat(scale), load(addend + lane));
            }
            const Vec<C> x = weight(score - after);
            Vec<C> dropped = x, dp = load(ds_row + lane);
            if constexpr (kDrops) {
                const auto mask = load_mask<C>(kept + lane);
                dropped = select(mask, x * factor, Vec<C>{});
                dp = select(mask, dp * factor, Vec<C>{});
            }
            store(p_row + lane, measures ? x : dropped);
            if (!needs_grads) continue;
            if (measures) {
                store(ds_row + lane, x * dp);
                continue;
            }
            const Vec<C> ds = x * (dp - delta);
            if (raw_row) store(raw_row + lane, ds * share);
            store(ds_row + lane, ds * slope);
        }
    }

    const AttentionProblem& p;
    const AttentionSaved& saved;
    const RowTerms<T>& terms;
    const ScoreMap<C> to_score;
    const Dropout dropout;
    C *key_t, *value_t, *queries, *grad_outs, *addend;
    int16_t* keep;
    int64_t* offsets;
};

}  // namespace bigops
