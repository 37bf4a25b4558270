// What bias, ALiBi, softcap and windows make of a row of products where the processor multiplies
// bf16. Scores are kept in units of log 2, so that the exponential is 2^y.
#pragma once

#if defined(__AVX512BF16__)

#include "attention_scores.h"
#include "attention_tiles_bf16.h"
#include "philox.h"

namespace bigops {

// A negative scale moves into the queries' signs, so that the largest score has the largest
// product.
inline __m512i sign_of_scale(double scale) {
    return _mm512_set1_epi16(static_cast<int16_t>(scale < 0 ? 0x8000 : 0));
}

// Forward and backward take scores from here, since 2^(score - lse) wants the very score that lse
// was summed from.
class RowScores {
   public:
    explicit RowScores(const AttentionProblem& problem)
        : p(problem),
          maps(p.adds_to_scores() || p.options.softcap > 0),
          row_changes(p.options.alibi_slopes || !p.options.bias ||
                      p.options.bias->strides[2] != 0) {
        const double scale = std::abs(p.options.scale), cap = p.options.softcap;
        // Not 0, which would make the hidden keys' -inf a NaN; so small that all others become 0.
        unit = std::max(static_cast<float>(scale * kLog2E), std::numeric_limits<float>::min());
        if (cap == 0) return;
        inner = static_cast<float>(scale / cap);
        outer = static_cast<float>(cap * kLog2E);
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
        if (adds && (first || row_changes))
            addend_row(p, s, h, i, j, count, static_cast<float>(kLog2E), addend);
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
    const AttentionProblem& p;
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
