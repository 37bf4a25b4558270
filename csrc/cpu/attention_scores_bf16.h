// What bias, ALiBi, softcap and windows make of a row of products where the processor multiplies
// bf16, and the exponential. bf16's scores are kept in units of log 2, so that it is 2^y; those of
// float32 as they are, whose digits a factor would cost.
#pragma once

#if defined(__AVX512BF16__)

#include <cmath>

#include "attention_scores.h"
#include "attention_tiles_bf16.h"
#include "philox.h"

namespace bigops {

template <class T>
constexpr double kScoreUnit = kLog2E;
template <>
inline constexpr double kScoreUnit<float> = 1.0;

// The weight of a score.
template <class T>
inline VecF power(VecF score) {
    if constexpr (kParts<T> == 1) return exp2(score);
    else return weight(score);
}
template <class T>
inline float power_of(float score) {
    if constexpr (kParts<T> == 1) return std::exp2(score);
    else return std::exp(score);
}

// A negative scale moves into the queries' signs, so that the largest score has the largest
// product.
inline __m512i sign_of_scale(double scale) {
    return _mm512_set1_epi16(static_cast<int16_t>(scale < 0 ? 0x8000 : 0));
}

// Forward and backward take scores from here, since 2^(score - lse) wants the very score that lse
// was summed from.
class RowScores {
   public:
    RowScores(const AttentionProblem& problem, double score_unit)
        : p(problem),
          per_score(static_cast<float>(score_unit)),
          maps(p.adds_to_scores() || p.options.softcap > 0),
          row_changes(p.options.alibi_slopes || !p.options.bias ||
                      p.options.bias->strides[2] != 0) {
        const double scale = std::abs(p.options.scale), cap = p.options.softcap;
        // Not 0, which would make the hidden keys' -inf a NaN; so small that all others become 0.
        unit = std::max(static_cast<float>(scale * score_unit), std::numeric_limits<float>::min());
        if (cap == 0) return;
        inner = static_cast<float>(scale / cap);
        outer = static_cast<float>(cap * score_unit);
    }

    // What the row still is to be multiplied by after map().
    float factor() const { return maps ? 1.0f : unit; }

    // Products of query i and keys [j, j + count) become scores, if more than a factor is between
    // them. `first` says that `addend` holds no other row of this head and these keys. `slopes`, if
    // given, get the scores' derivatives by factor() times the product.
    void map(const Sequence& s, int64_t h, int64_t i, int64_t j, int count, bool first,
             float* scores, float* addend, float* slopes = nullptr) const {
        if (!maps) return;
        const bool adds = p.adds_to_scores();
        if (p.options.softcap == 0 && !p.options.alibi_slopes && p.options.bias->strides[3] == 1) {
            const View& bias = *p.options.bias;
            const int64_t at = s.index * bias.strides[0] + h * bias.strides[1] +
                               i * bias.strides[2] + j;
            const int64_t ahead = kRowsAhead * bias.strides[2];
            if (bias.dtype == DType::f32) return add(bias.ptr<float>() + at, ahead, count, scores);
            if (bias.dtype == DType::bf16) return add(bias.ptr<bf16>() + at, ahead, count, scores);
        }
        if (adds && (first || row_changes))
            addend_row(p, s, h, i, j, count, per_score, addend, kRowsAhead);
        if (p.options.softcap == 0) {
            for (int k = 0; k < count; k += kPanel)
                store(scores + k, fma(load(scores + k), splat(unit), load(addend + k)));
            return;
        }
        for (int k = 0; k < count; k += kPanel) {
            const VecF t = tanh(load(scores + k) * inner);
            store(scores + k, fma(t, splat(outer), adds ? load(addend + k) : VecF{}));
            if (slopes) store(slopes + k, fma(-t, t, splat(1.0f)));
        }
    }

   private:
    // A row of bias that lies as it is wanted.
    template <class B>
    void add(const B* bias, int64_t ahead, int count, float* scores) const {
        const VecF factor = splat(unit), per = splat(per_score);
        for (int k = 0; k < count; k += static_cast<int>(64 / sizeof(B)))
            __builtin_prefetch(bias + ahead + k);
        int k = 0;
        for (; k + kPanel <= count; k += kPanel)
            store(scores + k, fma(load(scores + k), factor, load(bias + k) * per));
        if (k < count)
            store(scores + k, fma(load(scores + k), factor, load(bias + k, count - k) * per));
    }

    // Of bias, fetched meanwhile (8: a mask's share of the backward pass is a third less; 32 is no
    // better).
    static constexpr int64_t kRowsAhead = 8;

    const AttentionProblem& p;
    float per_score;  // what a score is multiplied by
    bool maps, row_changes;
    float unit, inner = 0, outer = 0;
};

// Of the keys [j, j + width), those that query i does not see.
inline void hide(const Sequence& s, int64_t i, int64_t j, int width, float* scores) {
    const auto first = std::clamp<int64_t>(s.first_key(i) - j, 0, width);
    const auto end = std::clamp<int64_t>(s.end_key(i) - j, first, width);
    std::fill(scores, scores + first, -kInf);
    std::fill(scores + end, scores + width, -kInf);
}

// 16 lanes of what Dropout::row says of 16 keys.
inline __mmask16 kept_lanes(const int16_t* kept) {
    return _mm256_movepi16_mask(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(kept)));
}

}  // namespace bigops

#endif
