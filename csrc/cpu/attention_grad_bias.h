// The gradient of attention's bias: dS, summed over what bias was broadcast over.
#pragma once

#include "attention_gradient.h"

namespace bigops {

// Whether each element of `gradient` belongs to one score: nowhere broadcast.
inline bool is_full(const View* gradient, const AttentionProblem& p) {
    return gradient && std::equal(gradient->shape, gradient->shape + 4, p.options.bias->shape);
}

void clear(const View& gradient);

// gradient[b, h, i, j + k] = values[k] for k < count, in gradient's dtype.
template <class C>
void store_bias_row(const View& gradient, int64_t b, int64_t h, int64_t i, int64_t j, int64_t count,
                    const C* values);

// In the sums that the other gradients are, the roundings of lse and delta average out; in the
// gradients of bias and sinks each element has its row's in full, and delta comes from the output,
// which may have been rounded to a shorter dtype than theirs. Sets terms.share to 1 / (the sum of the
// row's weights) and terms.delta to what the weights and their gradients give, as softmax' own
// backward does: two products more.
template <class T>
void refine_rows(const AttentionProblem& p, const AttentionSaved& saved, const RowTerms<T>& terms);

// Writes all of `gradient`, whose dimensions are 1 or bias' own. Deterministic, and without memory
// beyond a tile a thread: it computes scores once more.
template <class T>
void attention_grad_bias(const AttentionProblem& p, const AttentionSaved& saved,
                         const RowTerms<T>& terms, const View& gradient);

}  // namespace bigops
