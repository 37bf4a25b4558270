// P and dS of a slab of queries and keys, in the forms that the products of attention's backward
// pass take them: see attention_backward_bf16.cpp.
#pragma once

#if defined(__AVX512BF16__)

#include <variant>

#include "attention_queries_bf16.h"

namespace bigops {

constexpr int kSlab = kGroup;               // queries whose scores and dP are held at a time
constexpr int kScoreStride = kMostKeys + kSkew;                      // floats
constexpr int kWeightStride = kMostKeys + 2 * kSkew;                 // bf16
constexpr int kWeightPanel = kQueryBlock * kPanel + 2 * kSkew;      // bf16

// A thread's memory. The parts of operands lie the constants apart, or those of a block of keys.
template <class T>
struct TaskMemory {
    int64_t key_part, value_part;
    Aligned<bf16> key_t, value_t, keys;        // key^T, value^T and key, as panels
    Aligned<float> grad_key_t, grad_value_t;   // of the task's keys
    Aligned<float> scores, grads;              // S and dP of a slab
    Aligned<bf16> weights, grad_scores;        // P and dS of a block, as panels
    Aligned<bf16> grad_score_rows;             // dS once more, a row a query
    Aligned<float> addend, slopes[2];          // of a row, of a pair of rows
    Aligned<int16_t> kept[2];
    Aligned<float> row_sums = allocate<float>(kQueryBlock);  // of dS

    static constexpr int64_t kPanelsPart = kMostKeys / kPanel * kWeightPanel;
    static constexpr int64_t kRowsPart = kQueryBlock * kWeightStride;

    TaskMemory(int64_t depth, int64_t columns)
        : key_part(kMostKeys * depth),
          value_part(kMostKeys * columns),
          key_t(allocate<bf16>(kParts<T> * key_part)),
          value_t(allocate<bf16>(kParts<T> * value_part)),
          keys(allocate<bf16>(kParts<T> * key_part)),
          grad_key_t(allocate<float>(depth * kScoreStride)),
          grad_value_t(allocate<float>(columns * kScoreStride)),
          scores(allocate<float>(kSlab * kScoreStride)),
          grads(allocate<float>(kSlab * kScoreStride)),
          weights(allocate<bf16>(kParts<T> * kPanelsPart)),
          grad_scores(allocate<bf16>(kParts<T> * kPanelsPart)),
          grad_score_rows(allocate<bf16>(kParts<T> * kRowsPart)),
          addend(allocate<float>(kMostKeys)) {
        for (auto& row : slopes) {
            row = allocate<float>(kMostKeys);
            std::fill_n(row.get(), kMostKeys, 0.0f);  // beyond the last key a weight of 0 meets it
        }
        for (auto& row : kept) row = allocate<int16_t>(kMostKeys + Dropout::kRowSlack);
    }
};

// A switch that is set at run time, as an argument of a template.
using Switched = std::variant<std::false_type, std::true_type>;
inline Switched switched(bool on) { return on ? Switched(std::true_type{}) : std::false_type{}; }

template <class T>
struct Weights {
    const AttentionProblem& p;
    const PackedQueries<T>& packed;
    bool sums_rows;  // of dS

    RowScores row_scores{p, kScoreUnit<T>};
    Dropout dropout{p.options.seed, p.options.dropout_p};
    bool drops = static_cast<bool>(dropout), caps = p.options.softcap > 0;

    void slab(const TaskMemory<T>& m, const QueryBlock& q, int64_t r, int64_t j, int from,
              int to) const;

private:
    template <bool kDrops, bool kCaps, bool kSums>
    void weigh(const TaskMemory<T>& m, const QueryBlock& q, int64_t r, int k, int from, int to,
               const int16_t* const (&kept)[2]) const;
};

// Queries [r, r + 32) of the block against keys [j + from, j + to): P and dS.
template <class T>
void Weights<T>::slab(const TaskMemory<T>& m, const QueryBlock& q, int64_t r, int64_t j, int from,
                      int to) const {
    const auto multiply = [&](const bf16* left, int64_t left_part, const bf16* panels,
                              int64_t right_part, float* result, int64_t size) {
        Product<kParts<T>>{.left = left + (q.row + r) * size,
                           .left_stride = size,
                           .left_part = left_part,
                           .right = panels + from * size,
                           .panel_stride = kPanel * size,
                           .right_part = right_part,
                           .result = result + from,
                           .result_stride = kScoreStride,
                           .rows = kSlab,
                           .panels = (to - from) / kPanel,
                           .depth = static_cast<int>(size),
                           .accumulate = false}
            .run();
    };
    multiply(packed.queries.get(), packed.query_part, m.key_t.get(), m.key_part, m.scores.get(),
             packed.depth);
    multiply(packed.grads.get(), packed.grad_part, m.value_t.get(), m.value_part, m.grads.get(),
             packed.columns);

    const int count = static_cast<int>(std::min<int64_t>(to, q.s.key_len - j)) - from;
    for (int k = 0; k < kSlab; k += 2) {
        const int16_t* kept[2] = {};
        for (int odd = 0; odd < 2; ++odd) {
            // A row beyond the last has weights of 0 whatever its scores.
            const int64_t i = q.i + std::min(r + k + odd, q.count - 1);
            float* row = m.scores.get() + (k + odd) * kScoreStride + from;
            row_scores.map(q.s, q.h, i, j + from, count, k + odd == 0, row, m.addend.get(),
                           m.slopes[odd].get());
            hide(q.s, i, j + from, to - from, row);
            if (drops)
                kept[odd] = dropout.row(q.b * p.heads + q.h, i, j + from, count, m.kept[odd].get());
        }
        const auto weigh_as = [&]<bool... kFeatures>(std::bool_constant<kFeatures>...) {
            weigh<kFeatures...>(m, q, r, k, from, to, kept);
        };
        std::visit(weigh_as, switched(drops), switched(caps), switched(sums_rows));
    }
}

// Rows k and k + 1 of the slab of queries [r, r + 32).
template <class T>
template <bool kDrops, bool kCaps, bool kSums>
void Weights<T>::weigh(const TaskMemory<T>& m, const QueryBlock& q, int64_t r, int k, int from,
                       int to, const int16_t* const (&kept)[2]) const {
    alignas(64) static constexpr auto pairs = [] {
        struct {
            int16_t lanes[32];
        } index = {};
        for (int i = 0; i < 32; ++i) index.lanes[i] = static_cast<int16_t>(i / 2 + i % 2 * kPanel);
        return index;
    }();
    const __m512i interleave = _mm512_load_si512(pairs.lanes);
    const VecF factor = splat(row_scores.factor());
    const VecF keep_factor = splat(static_cast<float>(dropout.factor()));
    const int64_t row = q.row + r + k;
    const VecF shift[2] = {splat(packed.shifts[row]), splat(packed.shifts[row + 1])};
    const VecF delta[2] = {splat(packed.deltas[row]), splat(packed.deltas[row + 1])};
    const float* scores = m.scores.get() + k * kScoreStride;
    const float* grads = m.grads.get() + k * kScoreStride;
    bf16* p_panel = m.weights.get() + (r + k) * kPanel;
    bf16* ds_panel = m.grad_scores.get() + (r + k) * kPanel;
    bf16* ds_row = m.grad_score_rows.get() + (r + k) * kWeightStride;
    VecF row_sums[2] = {};
    for (int c = from; c < to; c += kPanel) {
        VecF weights[2], ds[2];
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
            const VecF x = power<T>(fma(load(scores + odd * kScoreStride + c), factor, shift[odd]));
            VecF dp = load(grads + odd * kScoreStride + c);
            weights[odd] = x;
            if constexpr (kDrops) {
                const __mmask16 keep = kept_lanes(kept[odd] + c - from);
                weights[odd] = _mm512_maskz_mov_ps(keep, x);
                dp = _mm512_maskz_mul_ps(keep, dp, keep_factor);
            }
            ds[odd] = x * (dp - delta[odd]);
            if constexpr (kSums) row_sums[odd] += ds[odd];
            if constexpr (kCaps) ds[odd] *= load(m.slopes[odd].get() + c - from);
        }
        const int64_t at = c / kPanel * kWeightPanel;
        const Parts<T> p_pair = parts_of<T>(weights[0], weights[1]);
        const Parts<T> ds_pair = parts_of<T>(ds[0], ds[1]);
        for (int n = 0; n < kParts<T>; ++n) {
            _mm512_store_si512(p_panel + n * m.kPanelsPart + at,
                               _mm512_permutexvar_epi16(interleave, p_pair[n]));
            _mm512_store_si512(ds_panel + n * m.kPanelsPart + at,
                               _mm512_permutexvar_epi16(interleave, ds_pair[n]));
            bf16* row = ds_row + n * m.kRowsPart + c;
            _mm256_store_si256(reinterpret_cast<__m256i*>(row), _mm512_castsi512_si256(ds_pair[n]));
            _mm256_store_si256(reinterpret_cast<__m256i*>(row + kWeightStride),
                               _mm512_extracti64x4_epi64(ds_pair[n], 1));
        }
    }
    if constexpr (kSums)
        for (int odd = 0; odd < 2; ++odd) m.row_sums[r + k + odd] = sum(row_sums[odd]);
}

}  // namespace bigops

#endif
