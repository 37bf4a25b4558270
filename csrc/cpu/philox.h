// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in lanes, and
// attention's dropout by it: bigops/reference/philox.py says the same in Python.
//
// A call gives eight lanes of 16 bits, for eight keys of one query. Words stay in 64-bit lanes of
// which the low half counts: a 32-bit product is one instruction there and leaves its two halves
// where the next round wants them, without a blend.
#pragma once

#include <cmath>
#include <utility>

#include "../view.h"
#include "vec.h"

namespace bigops {

typedef uint32_t VecU __attribute__((vector_size(kVectorBytes)));
typedef uint64_t VecW __attribute__((vector_size(kVectorBytes)));
typedef int16_t VecH __attribute__((vector_size(kVectorBytes)));
typedef uint16_t VecUH __attribute__((vector_size(kVectorBytes)));

// Keys that share a call.
constexpr int64_t kDropoutKeys = 8;

namespace detail {

// The products of the lanes' low halves.
inline VecW multiply_words(VecW a, uint32_t b) {
#if defined(__AVX512F__)
    return reinterpret_cast<VecW>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a),
                                                   _mm512_set1_epi64(static_cast<int64_t>(b))));
#elif defined(__AVX2__)
    return reinterpret_cast<VecW>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a),
                                                   _mm256_set1_epi64x(static_cast<int64_t>(b))));
#else
    return (a & 0xffffffffu) * b;
#endif
}

template <int kCalls>
struct PhiloxState {
    VecW word[4][kCalls];
};

// kCalls independent ones at a time, since a round is a chain of latencies.
template <int kCalls>
inline void philox(PhiloxState<kCalls>& x, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
        for (int n = 0; n < kCalls; ++n) {
            const VecW first = multiply_words(x.word[0][n], 0xD2511F53u);
            const VecW second = multiply_words(x.word[2][n], 0xCD9E8D57u);
            x.word[0][n] = (second >> 32) ^ x.word[1][n] ^ key0;
            x.word[1][n] = second;
            x.word[2][n] = (first >> 32) ^ x.word[3][n] ^ key1;
            x.word[3][n] = first;
        }
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

template <int... I>
inline VecW interleave_words(VecW a, VecW b, int first, std::integer_sequence<int, I...>) {
    constexpr int n = sizeof...(I);
    return first ? __builtin_shufflevector(a, b, (n / 2 + (I % 2 ? n + I / 2 : I / 2))...)
                 : __builtin_shufflevector(a, b, (I % 2 ? n + I / 2 : I / 2)...);
}

}  // namespace detail

// Lanes [from, from + kLanes<C>) of a comparison of 32-bit lanes, as C's own.
template <class C>
inline Mask<C> lanes_of(VecI mask, int64_t from) {
    if constexpr (kLanes<C> == kLanes<float>) return mask;
    Mask<C> wide;
    for (int n = 0; n < kLanes<C>; ++n) wide[n] = mask[from + n];
    return wide;
}

// Lanes of 16 bits, as C's own.
template <class C>
inline Mask<C> load_mask(const int16_t* lanes) {
    Mask<C> wide;
    for (int n = 0; n < kLanes<C>; ++n) wide[n] = lanes[n];
    return wide;
}

class Dropout {
   public:
    // Off where p is 0; `seed` is one int64 then or null.
    Dropout(const View* seed, double p)
        : threshold_(static_cast<int>(std::nearbyint(65536.0 * p))) {  // ties to even, as Python
        if (p == 0) return;
        const auto bits = static_cast<uint64_t>(*seed->ptr<int64_t>());
        key0_ = static_cast<uint32_t>(bits);
        key1_ = static_cast<uint32_t>(bits >> 32);
    }

    explicit operator bool() const { return threshold_ > 0; }

    // What the kept are multiplied by: the inverse of the exact keep rate.
    double factor() const { return threshold_ < 65536 ? 65536.0 / (65536 - threshold_) : 0.0; }

    // One query, a run of keys: -1 for each of the keys [j, j + count) that is kept, else 0. Writes
    // from buffer[0] on, kRowSlack elements more than count at most, and returns where j's is.
    // `plane` is sequence * heads + head.
    static constexpr int64_t kRowSlack = kDropoutKeys + 2 * kVectorBytes;
    const int16_t* row(int64_t plane, int64_t i, int64_t j, int64_t count, int16_t* buffer) const {
        constexpr int kGroups = kVectorBytes / 8;  // of a state: one in each 64-bit lane
        constexpr auto lanes = std::make_integer_sequence<int, kGroups>{};
        const int64_t first = j / kDropoutKeys, end = (j + count + kDropoutKeys - 1) / kDropoutKeys;
        VecW ascending;
        for (int n = 0; n < kGroups; ++n) ascending[n] = static_cast<uint64_t>(n);
        int16_t* at = buffer;
        for (int64_t group = first; group < end; group += 2 * kGroups) {
            detail::PhiloxState<2> x;
            for (int n = 0; n < 2; ++n) {
                x.word[0][n] = ascending + static_cast<uint64_t>(group + n * kGroups);
                x.word[1][n] = VecW{} + static_cast<uint64_t>(i);
                x.word[2][n] = VecW{} + static_cast<uint64_t>(plane);
                x.word[3][n] = VecW{};
            }
            detail::philox(x, key0_, key1_);
            for (int n = 0; n < 2; ++n) {
                const VecW low = (x.word[0][n] & 0xffffffffu) | x.word[1][n] << 32;
                const VecW high = (x.word[2][n] & 0xffffffffu) | x.word[3][n] << 32;
                for (int half = 0; half < 2; ++half, at += kVectorBytes / 2) {
                    const VecH keep = kept(detail::interleave_words(low, high, half, lanes));
                    std::memcpy(at, &keep, sizeof keep);
                }
            }
        }
        return buffer + (j - first * kDropoutKeys);
    }

    // The other way round, lanes are queries: all of keys [8 group, 8 group + 8) for queries of
    // numbers `i` in planes `plane`; keep[e] is key 8 group + e's, -1 or 0.
    void group(int64_t group, VecU i, VecU plane, VecI (&keep)[kDropoutKeys]) const {
        detail::PhiloxState<2> x;  // the even lanes' and the odd ones'
        for (int n = 0; n < 2; ++n) {
            x.word[0][n] = VecW{} + static_cast<uint64_t>(group);
            x.word[1][n] = std::bit_cast<VecW>(i) >> (32 * n);
            x.word[2][n] = std::bit_cast<VecW>(plane) >> (32 * n);
            x.word[3][n] = VecW{};
        }
        detail::philox(x, key0_, key1_);
        for (int w = 0; w < 4; ++w) {
            const VecU word =
                std::bit_cast<VecU>((x.word[w][0] & 0xffffffffu) | x.word[w][1] << 32);
            keep[2 * w] = std::bit_cast<VecI>(word & 0xffffu) >= threshold_;
            keep[2 * w + 1] = std::bit_cast<VecI>(word >> 16) >= threshold_;
        }
    }

   private:
    VecH kept(VecW drawn) const {
        const VecH all = std::bit_cast<VecUH>(drawn) >= static_cast<uint16_t>(threshold_);
        return threshold_ < 65536 ? all : VecH{};
    }

    int threshold_;
    uint32_t key0_ = 0, key1_ = 0;
};

}  // namespace bigops
