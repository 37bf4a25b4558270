// The products of decoding, for few rows of queries and keys and values that are read once: straight
// from the cache, row by row through pointers, so that pages cost nothing. Sums are fp32 (double for
// double) and stay in registers.
#pragma once

#include <cstdint>

#include "vec.h"

namespace bigops {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
constexpr int kSums = kRegisters / 2;  // leaves room for what they are summed from
constexpr int kQueryTile = kRegisters / 8;
constexpr int kKeyTile = 4;
// Rows between one that is asked for and one that is read: the hardware fetches ahead within a page
// of memory and into the second cache only, which costs 16-bit caches a quarter more time (measured
// on Sapphire Rapids). Lists of rows go on for so many entries.
constexpr int kAhead = 32;

// The elements that are loaded at once, as vectors to compute with: bf16 is the upper half of a
// float, so that a shift and a mask make two vectors out of 32 elements, the even ones and the odd
// ones. Sums over a head's elements do not care, and outputs are put in order when they are stored.
template <class T>
struct Unit {
    using C = compute_t<T>;
    static constexpr int kParts = 1, kElements = kLanes<C>;
    static void read(const T* p, Vec<C>* parts) { parts[0] = load(p); }
    static int64_t place(int64_t element) { return element; }
};
template <>
struct Unit<bf16> {
    static constexpr int kParts = 2, kElements = 2 * kLanes<float>;
    static void read(const bf16* p, VecF* parts) {
        VecI both;
        std::memcpy(&both, p, sizeof both);
        parts[0] = std::bit_cast<VecF>(both << 16);
        parts[1] = std::bit_cast<VecF>(both & static_cast<int32_t>(0xffff0000u));
    }
    // Where an element is among the vectors' lanes.
    static int64_t place(int64_t element) {
        const int64_t within = element % kElements;
        return element - within + within % 2 * kLanes<float> + within / 2;
    }
};

// sums[n] = the sum over the lanes of v[n].
template <class V, class C>
inline void sum_lanes(const V (&v)[kKeyTile], C* sums) {
    for (int n = 0; n < kKeyTile; ++n) sums[n] = sum(v[n]);
}
#if defined(__AVX2__)
inline __m128 sum_quarters(__m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256 ab = _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b);
    const __m256 cd = _mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d);
    const __m256 all = _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xee);
    return _mm256_castps256_ps128(all) + _mm256_extractf128_ps(all, 1);
}
inline void sum_lanes(const VecF (&v)[kKeyTile], float* sums) {
#if defined(__AVX512F__)
    __m256 half[kKeyTile];
    for (int n = 0; n < kKeyTile; ++n)
        half[n] = _mm512_castps512_ps256(v[n]) + _mm512_extractf32x8_ps(v[n], 1);
    _mm_storeu_ps(sums, sum_quarters(half[0], half[1], half[2], half[3]));
#else
    _mm_storeu_ps(sums, sum_quarters(v[0], v[1], v[2], v[3]));
#endif
}
#endif

// scores[m][n] = query[m] . keys[n] over `units` units; the query is in the units' order.
template <class T, int M, int N>
inline void tile_scores(const compute_t<T>* query, int64_t query_pitch, const T* const* keys,
                        int64_t units, compute_t<T>* scores, int64_t score_pitch) {
    using C = compute_t<T>;
    constexpr int P = Unit<T>::kParts;
    Vec<C> acc[M][N] = {};
    for (int64_t u = 0; u < units; ++u) {
        Vec<C> q[M][P];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
            for (int i = 0; i < P; ++i)
                q[m][i] = load(query + m * query_pitch + (u * P + i) * kLanes<C>);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            Vec<C> k[P];
            Unit<T>::read(keys[n] + u * Unit<T>::kElements, k);
            __builtin_prefetch(keys[n + kAhead] + u * Unit<T>::kElements);
#pragma GCC unroll 2
            for (int i = 0; i < P; ++i)
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) acc[m][n] = fma(q[m][i], k[i], acc[m][n]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        if constexpr (N == kKeyTile)
            sum_lanes(acc[m], scores + m * score_pitch);
        else
            for (int n = 0; n < N; ++n) scores[m * score_pitch + n] = sum(acc[m][n]);
    }
}

// out[m] += sum over n of weights[m][n] * values[n], from unit `first` on, U units wide.
template <class T, int M, int U>
inline void tile_values(const compute_t<T>* weights, int64_t weight_pitch, const T* const* values,
                        int64_t count, int64_t first, compute_t<T>* out, int64_t out_pitch) {
    using C = compute_t<T>;
    constexpr int P = Unit<T>::kParts;
    Vec<C> acc[M][U * P] = {};
    for (int64_t n = 0; n < count; ++n) {
        Vec<C> w[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) w[m] = splat(weights[m * weight_pitch + n]);
        const T* value = values[n] + first * Unit<T>::kElements;
        const T* ahead = values[n + kAhead] + first * Unit<T>::kElements;
#pragma GCC unroll 16
        for (int u = 0; u < U; ++u) {
            Vec<C> v[P];
            Unit<T>::read(value + u * Unit<T>::kElements, v);
            __builtin_prefetch(ahead + u * Unit<T>::kElements);
#pragma GCC unroll 2
            for (int i = 0; i < P; ++i)
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) acc[m][u * P + i] = fma(w[m], v[i], acc[m][u * P + i]);
        }
    }
    out += first * P * kLanes<C>;
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int i = 0; i < U * P; ++i) {
            C* at = out + m * out_pitch + i * kLanes<C>;
            store(at, load(at) + acc[m][i]);
        }
}

// Widest tiles first; what is left over takes narrower ones.
template <class T, int M, int U = kSums / M / Unit<T>::kParts>
inline void values_of_rows(const compute_t<T>* weights, int64_t weight_pitch, const T* const* values,
                           int64_t count, int64_t first, int64_t units, compute_t<T>* out,
                           int64_t out_pitch) {
    for (; first + U <= units; first += U)
        tile_values<T, M, U>(weights, weight_pitch, values, count, first, out, out_pitch);
    if constexpr (U > 1)
        if (first < units)
            values_of_rows<T, M, U / 2>(weights, weight_pitch, values, count, first, units, out,
                                        out_pitch);
}

template <class T, int M = kQueryTile>
inline void block_scores(int64_t rows, const compute_t<T>* query, int64_t query_pitch,
                         const T* const* keys, int64_t count, int64_t units, compute_t<T>* scores,
                         int64_t score_pitch) {
    for (; rows >= M; rows -= M) {
        int64_t n = 0;
        for (; n + kKeyTile <= count; n += kKeyTile)
            tile_scores<T, M, kKeyTile>(query, query_pitch, keys + n, units, scores + n,
                                         score_pitch);
        for (; n < count; ++n)
            tile_scores<T, M, 1>(query, query_pitch, keys + n, units, scores + n, score_pitch);
        query += M * query_pitch;
        scores += M * score_pitch;
    }
    if constexpr (M > 1)
        if (rows > 0)
            block_scores<T, M - 1>(rows, query, query_pitch, keys, count, units, scores,
                                   score_pitch);
}

template <class T, int M = kQueryTile>
inline void block_values(int64_t rows, const compute_t<T>* weights, int64_t weight_pitch,
                         const T* const* values, int64_t count, int64_t units, compute_t<T>* out,
                         int64_t out_pitch) {
    for (; rows >= M; rows -= M) {
        values_of_rows<T, M>(weights, weight_pitch, values, count, 0, units, out, out_pitch);
        weights += M * weight_pitch;
        out += M * out_pitch;
    }
    if constexpr (M > 1)
        if (rows > 0)
            block_values<T, M - 1>(rows, weights, weight_pitch, values, count, units, out,
                                   out_pitch);
}

}  // namespace
}  // namespace bigops
