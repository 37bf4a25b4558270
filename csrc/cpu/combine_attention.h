// Exact combination of attention over disjoint keys: what splits of a decoding step and
// combine_attention share. bigops/ops/combine_attention.py says what is computed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "../view.h"

namespace bigops {

// Turns the parts' log-sum-exps into their weights, and returns the whole's. Parts of -inf weigh
// nothing; where all are -inf, every weight is 0. In double: rounded to float, a log-sum-exp of 10
// would be off by 5e-7, and so would its weight.
inline double combine_weights(double* lse, int64_t parts) {
    constexpr double kInf = std::numeric_limits<double>::infinity();
    double top = -kInf, sum = 0;
    for (int64_t s = 0; s < parts; ++s) top = lse[s] > top ? lse[s] : top;
    // A NaN is no maximum; it must not be taken for a part that saw nothing.
    const double shift = top == -kInf ? 0 : top;
    for (int64_t s = 0; s < parts; ++s) sum += lse[s] = std::exp(lse[s] - shift);
    if (sum == 0) return -kInf;
    for (int64_t s = 0; s < parts; ++s) lse[s] /= sum;
    return shift + std::log(sum);
}

// outs (parts, batch, heads, rows, size), lses (parts, batch, heads, rows); out and lse without the
// first dimension.
void combine_attention(const View& outs, const View& lses, const View& out, const View& lse);

// Null gradients are not computed.
void combine_attention_backward(const View& grad_out, const View& grad_lse, const View& outs,
                                const View& lses, const View* grad_outs, const View* grad_lses);

}  // namespace bigops
