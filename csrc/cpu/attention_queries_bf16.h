// What attention's backward pass with bf16 products packs of its queries, once a call.
#pragma once

#if defined(__AVX512BF16__)

#include "attention_scores_bf16.h"
#include "attention_split_bf16.h"

namespace bigops {

constexpr int kQueryBlock = 128, kMostKeys = 256;

// Keys of a task. All queries are read once for each task, from the third cache where they are many
// (256: 8% faster than 128 at 1024 tokens); 16 tasks keep the threads busy. The batch has no say,
// nor the threads, so that neither changes a bit.
inline int64_t keys_of_task(const AttentionProblem& p, const Sequence& s) {
    return s.key_len * p.kv_heads >= 16 * kMostKeys ? kMostKeys : kMostKeys / 2;
}

// Of one sequence and query head: queries [i, i + padded), of which those from `count` on do not
// exist.
struct QueryBlock {
    Sequence s;
    int64_t b, h, n, i, count, padded;
    int64_t row;  // of its first query among all
    int64_t first, last;  // the key blocks it sees
};

// Rows of a tensor as left operands, both ways around: as they are, and as `depth` rows of
// `stride` columns of which these are 32. The parts of either lie `part` apart.
template <class T>
void pack_rows_both_ways(const Rows<T>& rows, __m512i sign, int64_t depth, bf16* straight,
                         bf16* transposed, int64_t stride, int64_t part) {
    alignas(64) static constexpr auto pick = [] {
        struct {
            int16_t lanes[2][32];
        } index = {};
        for (int odd = 0; odd < 2; ++odd)
            for (int i = 0; i < 32; ++i) index.lanes[odd][i] = static_cast<int16_t>(2 * i + odd);
        return index;
    }();
    const __m512i even = _mm512_load_si512(pick.lanes[0]), odd = _mm512_load_si512(pick.lanes[1]);
    for (int64_t d = 0; d < depth; d += kTileDepth) {
        __m512i halves[kParts<T>][2][kPanel];
        for (int i = 0; i < kGroup; ++i) {
            const Parts<T> row = rows.load(i, d);
            for (int n = 0; n < kParts<T>; ++n) {
                const __m512i line = _mm512_xor_si512(row[n], sign);
                _mm512_store_si512(straight + n * part + i * depth + d, line);
                halves[n][i / kPanel][i % kPanel] = line;
            }
        }
        for (int n = 0; n < kParts<T>; ++n) {
            auto& [low, high] = halves[n];
            transpose(low);
            transpose(high);
            for (int r = 0; r < kPanel; ++r) {
                bf16* to = transposed + n * part + (d + 2 * r) * stride;
                _mm512_store_si512(to, _mm512_permutex2var_epi16(low[r], even, high[r]));
                _mm512_store_si512(to + stride, _mm512_permutex2var_epi16(low[r], odd, high[r]));
            }
        }
    }
}

template <class T>
struct PackedQueries {
    const AttentionProblem& p;
    const AttentionSaved& saved;
    bool keeps_lse_grads;

    int64_t depth = padded_size(p.head_size), columns = padded_size(p.value_size);
    Pieces groups{p.batch, p.heads, [this](int64_t b) {  // of 32 queries
                      return divide_up(p.sequence(b).query_len, kGroup);
                  }};
    int64_t rows = groups.total() * kGroup;
    // Both ways around; a head's blocks lie one after the other, and a part of all before the next.
    int64_t query_part = rows * depth, grad_part = rows * columns;
    Aligned<bf16> queries = allocate<bf16>(kParts<T> * query_part),
                  queries_t = allocate<bf16>(kParts<T> * query_part);
    Aligned<bf16> grads = allocate<bf16>(kParts<T> * grad_part),
                  grads_t = allocate<bf16>(kParts<T> * grad_part);
    Aligned<float> shifts = allocate<float>(rows);  // -lse in the scores' unit
    Aligned<float> deltas = allocate<float>(rows);
    Aligned<float> lse_grads = keeps_lse_grads ? allocate<float>(rows) : nullptr;

    QueryBlock block(const Sequence& s, int64_t h, int64_t n) const {
        QueryBlock q{s, s.index, h, n, n * kQueryBlock, 0, 0, 0, 0, 0};
        q.count = std::min<int64_t>(kQueryBlock, s.query_len - q.i);
        q.padded = round_up(q.count, kGroup);
        q.row = groups.first(q.b, h) * kGroup + q.i;
        const int64_t keys = keys_of_task(p, s);
        q.first = s.first_key(q.i) / keys;
        q.last = divide_up(s.end_key(q.i + q.count - 1), keys);
        return q;
    }

    void pack(const Pieces::Piece& piece, bf16* panel, SplitRanges& ranges) const;
};

// 32 queries. `panel` is memory for one panel of values.
template <class T>
void PackedQueries<T>::pack(const Pieces::Piece& piece, bf16* panel, SplitRanges& ranges) const {
    const Sequence s = p.sequence(piece.b);
    const int64_t i = piece.n * kGroup, count = std::min<int64_t>(kGroup, s.query_len - i);
    const QueryBlock q = block(s, piece.h, i / kQueryBlock);
    const int64_t row = q.row + i - q.i;
    const auto rows_of = [&](const View& view) {
        return Rows<T>{s.query_row<T>(view, piece.h, i), view.strides[2], view.strides[3], count,
                       view.shape[3]};
    };
    bf16* grad_rows = grads.get() + row * columns;
    const Rows<T> of_query = rows_of(saved.query), of_grad = rows_of(saved.grad_out);
    const Rows<T> outs = rows_of(saved.out);
    ranges.take(piece.b, SplitRanges::query, of_query);
    ranges.take(piece.b, SplitRanges::grad_out, of_grad);
    ranges.take(piece.b, SplitRanges::value, outs);  // sums of values, if they are not infinite
    pack_rows_both_ways(of_query, sign_of_scale(p.options.scale), depth,
                        queries.get() + row * depth, queries_t.get() + q.row * depth + i - q.i,
                        q.padded, query_part);
    pack_rows_both_ways(of_grad, _mm512_setzero_si512(), columns, grad_rows,
                        grads_t.get() + q.row * columns + i - q.i, q.padded, grad_part);

    // delta by the products that make dP: where a row's weight is all on one key, out is that key's
    // value, and what must cancel does, to the last bit.
    alignas(64) float products[kPanel][kPanel];
    const int64_t panel_part = columns * kPanel;
    for (int half = 0; half < kGroup; half += kPanel) {
        for (int64_t d = 0; d < columns; d += kTileDepth)
            pack_columns(outs, half, d, panel + d * kPanel, panel_part);
        Product<kParts<T>>{.left = grad_rows + half * columns,
                           .left_stride = columns,
                           .left_part = grad_part,
                           .right = panel,
                           .panel_stride = 0,
                           .right_part = panel_part,
                           .result = products[0],
                           .result_stride = kPanel,
                           .rows = kPanel,
                           .panels = 1,
                           .depth = static_cast<int>(columns),
                           .accumulate = false}
            .run();
        for (int r = 0; r < kPanel; ++r) {
            const bool there = half + r < count;
            const auto of_row = [&](const View& view) {
                return *s.query_row<float>(view, piece.h, i + half + r);
            };
            // A row without keys has lse = -inf, and no key may get a weight there.
            const float row_lse = there ? of_row(saved.lse) : -kInf;
            shifts[row + half + r] =
                row_lse == -kInf ? -kInf : static_cast<float>(-kScoreUnit<T>) * row_lse;
            const float from_lse =
                saved.grad_lse && row_lse != -kInf ? of_row(*saved.grad_lse) : 0.0f;
            deltas[row + half + r] = row_lse != -kInf ? products[r][r] - from_lse : 0.0f;
            if (lse_grads) lse_grads[row + half + r] = from_lse;
        }
    }
}

}  // namespace bigops

#endif
