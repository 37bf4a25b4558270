// What products of bf16 with fp32 sums take for an element: a bf16 as it is, and an fp32 as the sum
// of three bf16, which have its 24 bits between them. Of the nine products of two such sums six
// matter; the other three are less than what fp32 rounds away (Henry, Tang and Heinecke,
// "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations",
// 2019). With AMX the six take less than half the time of fp32's own products (1024 operations a
// cycle, not 64).
#pragma once

#if defined(__AVX512BF16__)

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>

#include "vec.h"

namespace bigops {

template <class T>
constexpr int kParts = 1;
template <>
inline constexpr int kParts<float> = 3;

// The products of parts that matter, the largest last; neighbours have an operand in common.
struct PartProduct {
    int left, right;
};
template <int kParts>
constexpr std::array<PartProduct, 1> kPartProducts{{{0, 0}}};
template <>
inline constexpr std::array<PartProduct, 6> kPartProducts<3>{
    {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}, {0, 0}}};

// Part n of 32 elements, for every n.
template <class T>
struct Parts {
    __m512i part[kParts<T>];
    __m512i operator[](int n) const { return part[n]; }
};

// The bf16 in the upper halves of two registers of floats, `low` first.
inline __m512i upper_halves(VecF low, VecF high) {
    alignas(64) static constexpr auto odd = [] {
        struct {
            int16_t lanes[32];
        } index = {};
        for (int i = 0; i < 32; ++i) index.lanes[i] = static_cast<int16_t>(2 * i + 1);
        return index;
    }();
    return _mm512_permutex2var_epi16(_mm512_castps_si512(low), _mm512_load_si512(odd.lanes),
                                     _mm512_castps_si512(high));
}

// Two registers of floats, `low` first. A part is the nearest bf16 to what the ones before it
// leave, found in integers, which is cheaper than the conversion; the last one's bits are all that
// is left.
template <class T>
inline Parts<T> parts_of(VecF low, VecF high) {
    if constexpr (kParts<T> == 1) {
        return {reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low))};
    } else {
        const auto nearest = [](VecF x) -> VecF {
            const __m512i up = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
            return _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(-0x10000)));
        };
        const VecF low0 = nearest(low), high0 = nearest(high);
        low -= low0;
        high -= high0;
        const VecF low1 = nearest(low), high1 = nearest(high);
        return {upper_halves(low0, high0), upper_halves(low1, high1),
                upper_halves(low - low1, high - high1)};
    }
}

// At most `count` elements from memory, zero beyond.
inline Parts<bf16> load_parts(const bf16* p, int64_t stride, int64_t count) {
    if (stride == 1)
        return {_mm512_maskz_loadu_epi16(count >= 32 ? ~0u : (1u << count) - 1, p)};
    alignas(64) bf16 lanes[32] = {};
    for (int64_t i = 0; i < std::min<int64_t>(count, 32); ++i) lanes[i] = p[i * stride];
    return {_mm512_load_si512(lanes)};
}

inline Parts<float> load_parts(const float* p, int64_t stride, int64_t count) {
    if (stride == 1) {
        const uint32_t lanes = count >= 32 ? ~0u : (1u << count) - 1;
        return parts_of<float>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), p),
                               _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes >> 16), p + 16));
    }
    alignas(64) float lanes[32] = {};
    for (int64_t i = 0; i < std::min<int64_t>(count, 32); ++i) lanes[i] = p[i * stride];
    return parts_of<float>(load(lanes), load(lanes + 16));
}

// The largest magnitude of `size` elements, as a float's bits, whose order is the numbers'; NaN's
// are the largest.
inline uint32_t largest_magnitude(const float* row, int64_t step, int64_t size) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i largest = _mm512_setzero_si512();
    int64_t i = 0;
    if (step == 1)
        for (; i < size; i += 16) {
            const uint32_t lanes = size - i >= 16 ? 0xffff : (1u << (size - i)) - 1;
            const __m512i x = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(lanes), row + i);
            largest = _mm512_max_epu32(largest, _mm512_and_si512(x, magnitude));
        }
    uint32_t top = _mm512_reduce_max_epu32(largest);
    for (; i < size; ++i) top = std::max(top, std::bit_cast<uint32_t>(row[i * step]) & 0x7fffffff);
    return top;
}

// Whether elements up to this magnitude may be split. Infinity and NaN have parts of NaN, which
// would spread, and some sums of large numbers overflow earlier by parts; where even the largest
// element is below 2^-40, products of the last parts are denormal, which the products take for
// zero.
inline bool may_be_split(uint32_t magnitude) {
    const float largest = std::bit_cast<float>(magnitude);
    return magnitude == 0 || (0x1p-40f <= largest && largest <= 0x1p100f);
}

}  // namespace bigops

#endif
