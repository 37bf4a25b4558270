// What every attention kernel on the CPU shares: the sizes of a problem, which keys a query sees,
// and one way to read a mask. The kernels are declared at the end; bigops/ops/attention.py says
// what they compute.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>

#include "../view.h"
#include "vec.h"

namespace bigops {

// query (batch, heads, query_len, head_size), key (batch, kv_heads, key_len, head_size),
// value (batch, kv_heads, key_len, value_size); query head h reads key head h / group.
struct AttentionProblem {
    int64_t batch, heads, kv_heads, group, query_len, key_len, head_size, value_size;
    int64_t diagonal;  // query i sees key j iff j <= i + diagonal; key_len when it sees all
    double scale;

    // Of the forward pass without a diagonal; the backward has 2.5 times as many.
    double operations() const {
        return 2.0 * static_cast<double>(batch * heads * query_len) *
               static_cast<double>(key_len * (head_size + value_size));
    }

    // Query i sees the keys [0, keys_seen(i)); it never decreases with i.
    int64_t keys_seen(int64_t i) const {
        return std::clamp<int64_t>(i + diagonal + 1, 0, key_len);
    }
    // Key j is seen by the queries [first_query(j), query_len).
    int64_t first_query(int64_t j) const {
        return std::clamp<int64_t>(j - diagonal, 0, query_len);
    }
};

inline AttentionProblem attention_problem(const View& query, const View& key, const View& value,
                                          std::optional<int64_t> diagonal, double scale) {
    require(query.ndim == 4 && key.ndim == 4 && value.ndim == 4,
            "query, key and value must have 4 dimensions");
    AttentionProblem p;
    p.batch = query.shape[0];
    p.heads = query.shape[1];
    p.query_len = query.shape[2];
    p.head_size = query.shape[3];
    p.kv_heads = key.shape[1];
    p.key_len = key.shape[2];
    p.value_size = value.shape[3];
    require(key.shape[0] == p.batch && key.shape[3] == p.head_size,
            "key must agree with query in batch and head size");
    require(value.shape[0] == p.batch && value.shape[1] == p.kv_heads &&
                value.shape[2] == p.key_len,
            "value must agree with key in batch, heads and length");
    require(p.heads == 0 || (p.kv_heads > 0 && p.heads % p.kv_heads == 0),
            "key's heads must divide query's heads");
    require(key.dtype == query.dtype && value.dtype == query.dtype,
            "query, key and value must have one dtype");
    p.group = p.kv_heads > 0 ? p.heads / p.kv_heads : 1;
    // Beyond these bounds nothing changes any more, and i + diagonal cannot overflow.
    p.diagonal = std::clamp<int64_t>(diagonal.value_or(p.key_len), -p.query_len - 1, p.key_len);
    p.scale = scale;
    return p;
}

inline void require_mask(const AttentionProblem& p, const View& mask) {
    require(mask.ndim == 4 && mask.shape[0] == p.batch && mask.shape[1] == p.heads &&
                mask.shape[2] == p.query_len && mask.shape[3] == p.key_len,
            "mask must be expanded to (batch, heads, query length, key length)");
}

// Outputs and what the backward saved come from Python as they are: wrong sizes would be followed
// out of bounds.
inline void require_rows(const AttentionProblem& p, const View& out, const View& lse) {
    require(out.ndim == 4 && out.shape[0] == p.batch && out.shape[1] == p.heads &&
                out.shape[2] == p.query_len && out.shape[3] == p.value_size,
            "out and grad_out must be (batch, heads, query length, value size)");
    require(lse.ndim == 3 && lse.shape[0] == p.batch && lse.shape[1] == p.heads &&
                lse.shape[2] == p.query_len,
            "lse and grad_lse must be (batch, heads, query length)");
}

inline void require_gradient(const View* gradient, const View& of) {
    require(!gradient || (gradient->ndim == of.ndim && gradient->dtype == of.dtype &&
                          std::equal(of.shape, of.shape + of.ndim, gradient->shape)),
            "a gradient must have its tensor's shape and dtype");
}

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

namespace detail {
template <class T, class C>
inline void read_mask(const T* row, int64_t stride, int64_t count, C unit, C* addend) {
    for (int64_t j = 0; j < count; ++j)
        addend[j] = static_cast<C>(to_float(row[j * stride])) * unit;
}
}  // namespace detail

// What the mask adds to the scores of query (b, h, i) and keys [j, j + count): 0 or -inf for a bool
// mask, its values times `unit` (kLog2E for scores kept in units of log 2) for a float one. Kept out of line: five loops a call site
// would cost more to compile than the kernels themselves.
template <class C>
[[gnu::noinline]] void mask_row(const View& mask, int64_t b, int64_t h, int64_t i, int64_t j,
                                int64_t count, C unit, C* addend) {
    const int64_t stride = mask.strides[3];
    const int64_t at = b * mask.strides[0] + h * mask.strides[1] + i * mask.strides[2] + j * stride;
    switch (mask.dtype) {
        case DType::boolean: {
            const uint8_t* row = mask.ptr<uint8_t>() + at;
            const C never = -std::numeric_limits<C>::infinity();
            for (int64_t k = 0; k < count; ++k) addend[k] = row[k * stride] ? C(0) : never;
            break;
        }
        case DType::f32: detail::read_mask(mask.ptr<float>() + at, stride, count, unit, addend); break;
        case DType::f64: detail::read_mask(mask.ptr<double>() + at, stride, count, unit, addend); break;
        case DType::bf16: detail::read_mask(mask.ptr<bf16>() + at, stride, count, unit, addend); break;
        case DType::f16: detail::read_mask(mask.ptr<f16>() + at, stride, count, unit, addend); break;
        default: require(false, "mask must be bool or floating point");
    }
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

// out and lse are written; mask may be null.
void attention_forward(const View& query, const View& key, const View& value, const View* mask,
                       const View& out, const View& lse, std::optional<int64_t> diagonal,
                       double scale);

// Null gradients are not computed; a null grad_lse is zero.
void attention_backward(const View& grad_out, const View* grad_lse, const View& query,
                        const View& key, const View& value, const View* mask, const View& out,
                        const View& lse, std::optional<int64_t> diagonal, double scale,
                        const View* grad_query, const View* grad_key, const View* grad_value);

}  // namespace bigops
