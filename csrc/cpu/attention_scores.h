// From products to weights: what bias and ALiBi add to scores, softcap, and the exponential.
#pragma once

#include <cstdlib>
#include <type_traits>

#include "attention.h"

namespace bigops {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// The map from a product query . key to its score: scale, softcap, and what is added. Forward and
// backward take it from here, since exp(score - lse) wants the very score that lse was summed from.
template <class C>
struct ScoreMap {
    C scale, softcap;

    ScoreMap(const AttentionOptions& o, double scale)
        : scale(static_cast<C>(o.softcap > 0 ? scale / o.softcap : scale)),
          softcap(static_cast<C>(o.softcap)) {}

    Vec<C> operator()(Vec<C> product, Vec<C> addend) const {
        if (softcap > 0) return fma(tanh(product * scale), splat(softcap), addend);
        return fma(product, splat(scale), addend);
    }

    // The score's derivative by the product times the options' scale.
    Vec<C> slope(Vec<C> product) const {
        const Vec<C> t = tanh(product * scale);
        return fma(-t, t, splat(C(1)));
    }
};

namespace detail {
template <class T, class C>
inline void read_bias(const T* row, int64_t stride, int64_t count, C* addend, int64_t ahead) {
    int64_t j = 0;
    constexpr int64_t kLine = 64 / sizeof(T);
    if (stride == 1)
        for (int64_t k = 0; k < count; k += kLine) __builtin_prefetch(row + ahead + k);
    if constexpr (std::is_same_v<compute_t<T>, C>) {
        constexpr int L = kLanes<C>;
        if (stride == 1)
            for (; j + L <= count; j += L) store(addend + j, load(row + j));
    }
    for (; j < count; ++j) addend[j] = static_cast<C>(to_float(row[j * stride]));
}
}  // namespace detail

// The bias of query i of head h and keys [j, j + count): 0 or -inf if it is bool. Its rows lie on a
// page each, where no processor fetches ahead by itself: what lies `ahead` elements further is
// fetched meanwhile. Kept out of line: its loops at every call site would cost more to compile than
// the kernels themselves.
template <class C>
[[gnu::noinline]] void bias_row(const AttentionProblem& p, const Sequence& s, int64_t h, int64_t i,
                                int64_t j, int64_t count, C* addend, int64_t ahead) {
    const View& bias = *p.options.bias;
    const int64_t stride = bias.strides[3];
    const int64_t at = s.index * bias.strides[0] + h * bias.strides[1] + i * bias.strides[2] +
                       j * stride;
    const auto read = [&](const auto* data) {
        detail::read_bias(data + at, stride, count, addend, ahead);
    };
    switch (bias.dtype) {
        case DType::boolean: {
            const uint8_t* row = bias.ptr<uint8_t>() + at;
            __builtin_prefetch(row + ahead);
            const C never = -std::numeric_limits<C>::infinity();
            for (int64_t k = 0; k < count; ++k) addend[k] = row[k * stride] ? C(0) : never;
            break;
        }
        case DType::f32: read(bias.ptr<float>()); break;
        case DType::f64: read(bias.ptr<double>()); break;
        case DType::bf16: read(bias.ptr<bf16>()); break;
        case DType::f16: read(bias.ptr<f16>()); break;
        default: require(false, "bias must be bool or floating point");
    }
}

// What is added to the scores of query i of head h and keys [j, j + count), the bias and ALiBi's
// share, times `unit` (kLog2E for scores kept in units of log 2). Fetches that of query
// i + rows_ahead.
template <class C>
[[gnu::noinline]] void addend_row(const AttentionProblem& p, const Sequence& s, int64_t h,
                                  int64_t i, int64_t j, int64_t count, C unit, C* addend,
                                  int64_t rows_ahead = 0) {
    if (p.options.bias)
        bias_row(p, s, h, i, j, count, addend, rows_ahead * p.options.bias->strides[2]);
    else std::fill_n(addend, count, C(0));
    if (p.options.alibi_slopes) {
        const C slope = -p.alibi_slope<C>(s.index, h);
        const int64_t here = i + s.alignment() - j;
        for (int64_t k = 0; k < count; ++k)
            addend[k] += slope * static_cast<C>(std::abs(here - k));
    }
    if (unit != C(1))
        for (int64_t k = 0; k < count; ++k) addend[k] *= unit;
}

// e^x, the weight of a key whose score lies -x below the row's maximum. Zero below the normal range
// (-inf is a key that is masked), NaN stays NaN; x is never much above 0. Cheaper than exp() since
// nothing is clamped: what lies outside is discarded at the end. e^x = 2^n 2^r, where fused
// multiply-adds leave r = x log2(e) - n without the rounding of a product that grows with |x|.
inline VecF weight(VecF x) {
    const VecF log2e = splat(static_cast<float>(kLog2E));
    const VecF shifter = splat(12583039.0f);  // 1.5 * 2^23 + 127 leaves n + 127 in the low bits
    const VecF shifted = fma(x, log2e, shifter);
    const VecF r = fma(x, log2e, shifter - shifted);
    VecF p = splat(1.5353362e-4f);  // minimax on [-1/2, 1/2], error 1.6e-8
    p = fma(p, r, splat(1.33988739e-3f));
    p = fma(p, r, splat(9.61843692e-3f));
    p = fma(p, r, splat(5.55033237e-2f));
    p = fma(p, r, splat(2.40226477e-1f));
    p = fma(p, r, splat(6.93147182e-1f));
    p = fma(p, r, splat(1.0f));
    return select(x < -87.3f, VecF{}, p * std::bit_cast<VecF>(std::bit_cast<VecI>(shifted) << 23));
}

inline VecD weight(VecD x) {
    const VecD shifter = splat(6755399441056767.0);  // 1.5 * 2^52 + 1023
    const VecD shifted = fma(x, splat(kLog2E), shifter);
    const VecD r = fma(x, splat(kLog2E), shifter - shifted) * kLn2;
    VecD p = splat(1.0);  // Taylor to the 13th power by Horner's rule, e^r = 1 + r (1 + r/2 (...))
    for (int n = 13; n > 0; --n) p = fma(p * r, splat(1.0 / n), splat(1.0));
    return select(x < -708.0, VecD{},
                  p * std::bit_cast<VecD>(std::bit_cast<VecL>(shifted) << 52));
}

}  // namespace bigops
