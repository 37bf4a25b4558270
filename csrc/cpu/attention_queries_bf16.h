// What attention's backward pass with bf16 products packs of its queries, once a call.
#pragma once

#if defined(__AVX512BF16__)

#include "attention_scores_bf16.h"

namespace bigops {

constexpr int kQueryBlock = 128, kKeyBlock = 128;

// Of one sequence and query head: queries [i, i + padded), of which those from `count` on do not
// exist.
struct QueryBlock {
    Sequence s;
    int64_t b, h, n, i, count, padded;
    int64_t row;  // of its first query among all
    int64_t first, last;  // the key blocks it sees
};

// What forward was given and gave, and the gradients that come back.
struct SavedViews {
    const View& grad_out;
    const View* grad_lse;
    const View &query, &key, &value, &out, &lse;
};

// Rows of a tensor as left operands, both ways around: as they are, and as `depth` rows of
// `stride` columns of which these are 32.
inline void pack_rows_both_ways(const Rows& rows, __m512i sign, int64_t depth, bf16* straight,
                                bf16* transposed, int64_t stride) {
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
        __m512i halves[2][kPanel];
        for (int i = 0; i < kGroup; ++i) {
            const __m512i row = _mm512_xor_si512(rows.load(i, d), sign);
            _mm512_store_si512(straight + i * depth + d, row);
            halves[i / kPanel][i % kPanel] = row;
        }
        transpose(halves[0]);
        transpose(halves[1]);
        for (int r = 0; r < kPanel; ++r) {
            bf16* to = transposed + (d + 2 * r) * stride;
            _mm512_store_si512(to, _mm512_permutex2var_epi16(halves[0][r], even, halves[1][r]));
            _mm512_store_si512(to + stride,
                               _mm512_permutex2var_epi16(halves[0][r], odd, halves[1][r]));
        }
    }
}

struct PackedQueries {
    const AttentionProblem& p;
    const SavedViews& saved;
    bool keeps_lse_grads;

    int64_t depth = padded_size(p.head_size), columns = padded_size(p.value_size);
    Pieces groups{p.batch, p.heads, [this](int64_t b) {  // of 32 queries
                      return divide_up(p.sequence(b).query_len, kGroup);
                  }};
    int64_t rows = groups.total() * kGroup;
    // Both ways around; a head's blocks lie one after the other.
    Aligned<bf16> queries = allocate<bf16>(rows * depth), queries_t = allocate<bf16>(rows * depth);
    Aligned<bf16> grads = allocate<bf16>(rows * columns), grads_t = allocate<bf16>(rows * columns);
    Aligned<float> shifts = allocate<float>(rows);  // -lse in units of log 2
    Aligned<float> deltas = allocate<float>(rows);
    Aligned<float> lse_grads = keeps_lse_grads ? allocate<float>(rows) : nullptr;

    QueryBlock block(const Sequence& s, int64_t h, int64_t n) const {
        QueryBlock q{s, s.index, h, n, n * kQueryBlock, 0, 0, 0, 0, 0};
        q.count = std::min<int64_t>(kQueryBlock, s.query_len - q.i);
        q.padded = round_up(q.count, kGroup);
        q.row = groups.first(q.b, h) * kGroup + q.i;
        q.first = s.first_key(q.i) / kKeyBlock;
        q.last = divide_up(s.end_key(q.i + q.count - 1), kKeyBlock);
        return q;
    }

    void pack(const Pieces::Piece& piece, bf16* panel) const;
};

// 32 queries. `panel` is memory for one panel of values.
inline void PackedQueries::pack(const Pieces::Piece& piece, bf16* panel) const {
    const Sequence s = p.sequence(piece.b);
    const int64_t i = piece.n * kGroup, count = std::min<int64_t>(kGroup, s.query_len - i);
    const QueryBlock q = block(s, piece.h, i / kQueryBlock);
    const int64_t row = q.row + i - q.i;
    const auto rows_of = [&](const View& view) {
        return Rows{s.query_row<bf16>(view, piece.h, i), view.strides[2], view.strides[3], count,
                    view.shape[3]};
    };
    bf16* grad_rows = grads.get() + row * columns;
    pack_rows_both_ways(rows_of(saved.query), sign_of_scale(p.options.scale), depth,
                        queries.get() + row * depth, queries_t.get() + q.row * depth + i - q.i,
                        q.padded);
    pack_rows_both_ways(rows_of(saved.grad_out), _mm512_setzero_si512(), columns, grad_rows,
                        grads_t.get() + q.row * columns + i - q.i, q.padded);

    // delta by the products that make dP: where a row's weight is all on one key, out is that key's
    // value, and what must cancel does, to the last bit.
    const Rows outs = rows_of(saved.out);
    alignas(64) float products[kPanel][kPanel];
    for (int half = 0; half < kGroup; half += kPanel) {
        for (int64_t d = 0; d < columns; d += kTileDepth) {
            __m512i lines[kPanel];
            for (int r = 0; r < kPanel; ++r) lines[r] = outs.load(half + r, d);
            pack_columns(lines, panel + d * kPanel);
        }
        Product{.left = grad_rows + half * columns,
                .left_stride = columns,
                .right = panel,
                .panel_stride = 0,
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
                row_lse == -kInf ? -kInf : static_cast<float>(-kLog2E) * row_lse;
            const float from_lse =
                saved.grad_lse && row_lse != -kInf ? of_row(*saved.grad_lse) : 0.0f;
            deltas[row + half + r] = row_lse != -kInf ? products[r][r] - from_lse : 0.0f;
            if (lse_grads) lse_grads[row + half + r] = from_lse;
        }
    }
}

}  // namespace bigops

#endif
