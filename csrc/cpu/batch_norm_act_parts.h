// The parts of batch normalisation, of as many neighbours in memory as there are: sums, and what is
// written. Neighbours are one channel's (coefficients are numbers) or lie across the channels
// (coefficients are rows).
//
// Sums are of numbers from which an estimate of the mean was taken, so that squares lose nothing;
// kChain at a time in the type of the arithmetic (of 64, a mean near 0 is off by 8 ulp), and these
// in double.
#pragma once

#include <vector>

#include "batch_norm_act.h"
#include "conv2d_tile.h"

namespace bigops {

constexpr int kChain = 16;

// Coefficients by channel: neighbours that are one channel's share one, others have each their own.
template <class A>
struct Same {
    A value;
    Vec<A> at(int64_t) const { return splat(value); }
};
template <class A>
struct Each {
    const A* values;
    Vec<A> at(int64_t i) const { return load(values + i); }
};
struct Along {
    template <class A>
    static Same<A> of(const std::vector<A>& values, int64_t lane) {
        return {values[static_cast<size_t>(lane)]};
    }
};
struct Across {
    template <class A>
    static Each<A> of(const std::vector<A>& values, int64_t lane) {
        return {values.data() + lane};
    }
};

// f(i) for every vector of `size` neighbours, f(i, count) for the last part of one.
template <class A, class F>
inline void for_vectors(int64_t size, F&& f) {
    constexpr int L = kLanes<A>;
    int64_t i = 0;
    for (; i + L <= size; i += L) f(i);
    if (i < size) f(i, static_cast<int>(size - i));
}

// out = relu((x - center) * scale + shift + residual)
template <bool kRelu, class T, class C>
void normalise(const T* x, const T* residual, int64_t size, C center, C scale, C shift, T* out) {
    using V = Vec<compute_t<T>>;
    for_vectors<compute_t<T>>(size, [&](int64_t i, auto... some) {
        V v = fma(load(x + i, some...) - center.at(i), scale.at(i), shift.at(i));
        if (residual) v += load(residual + i, some...);
        if constexpr (kRelu) v = select(v < 0, V{}, v);
        store(out + i, v, some...);
    });
}

// As torch's threshold: no gradient where out <= 0, so that a NaN passes. Without ReLU out is null.
template <class T, class... Some>
inline Vec<compute_t<T>> passed(const T* grad_out, const T* out, int64_t i, Some... some) {
    using V = Vec<compute_t<T>>;
    const V g = load(grad_out + i, some...);
    return out ? select(load(out + i, some...) <= 0, V{}, g) : g;
}

// grad_input = (g - lift - (x - center) * slope) * scale, and grad_residual = g, whichever is wanted;
// without x, as where the mean was given, grad_input = g * scale.
template <class T, class C>
void spread(const T* grad_out, const T* out, const T* x, int64_t size, C center, C lift, C slope,
            C scale, T* grad_input, T* grad_residual) {
    using V = Vec<compute_t<T>>;
    for_vectors<compute_t<T>>(size, [&](int64_t i, auto... some) {
        const V g = passed(grad_out, out, i, some...);
        if (grad_residual) store(grad_residual + i, g, some...);
        if (!grad_input) return;
        V rest = g;
        if (x) rest -= fma(load(x + i, some...) - center.at(i), slope.at(i), lift.at(i));
        store(grad_input + i, rest * scale.at(i), some...);
    });
}

// Two sums over a channel: of x - center and its square, or of g and g * (x - center).
struct Sums {
    double first = 0, second = 0;
    Sums& operator+=(const Sums& other) {
        first += other.first;
        second += other.second;
        return *this;
    }
};

// to[i] += v[i], in double.
inline void add_wide(double* to, VecD v) { store(to, load(to) + v); }
inline void add_wide(double* to, VecF v) {
#if defined(__AVX512F__)
    add_wide(to, VecD(_mm512_cvtps_pd(_mm512_castps512_ps256(v))));
    add_wide(to + 8, VecD(_mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))));
#elif defined(__AVX2__)
    add_wide(to, VecD(_mm256_cvtps_pd(_mm256_castps256_ps128(v))));
    add_wide(to + 4, VecD(_mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))));
#else
    for (int i = 0; i < kLanes<float>; ++i) to[i] += v[i];
#endif
}
template <class V>
double wide_sum(V v) {
    double lanes[sizeof(V) / sizeof(v[0])] = {}, total = 0;
    add_wide(lanes, v);
    for (double lane : lanes) total += lane;
    return total;
}

// Of one channel's neighbours. term(first, second, i, ...) adds a vector's part to both; of lanes
// beyond a count it adds zeros.
template <class A, class F>
Sums sums_along(int64_t size, F&& term) {
    constexpr int L = kLanes<A>, kStep = 4;
    using V = Vec<A>;
    Sums total;
    int64_t i = 0;
    while (i + kStep * L <= size) {
        V first[kStep] = {}, second[kStep] = {};
        for (int chain = 0; chain < kChain && i + kStep * L <= size; ++chain, i += kStep * L)
#pragma GCC unroll 4
            for (int u = 0; u < kStep; ++u) term(first[u], second[u], i + u * L);
        total += {wide_sum((first[0] + first[1]) + (first[2] + first[3])),
                  wide_sum((second[0] + second[1]) + (second[2] + second[3]))};
    }
    V first = {}, second = {};
    for (; i + L <= size; i += L) term(first, second, i);
    if (i < size) term(first, second, i, static_cast<int>(size - i));
    return total += {wide_sum(first), wide_sum(second)};
}

// Of rows of neighbours that lie across the channels: each lane's sums are added to firsts[lane] and
// seconds[lane], which have a vector's room behind. term(first, second, row, lane, ...)
template <class A, int kWidth, class F, class... Some>
void sums_of_vectors(int64_t begin, int64_t end, int64_t lane, F&& term, double* firsts,
                     double* seconds, Some... some) {
    constexpr int L = kLanes<A>;
    for (int64_t row = begin; row < end;) {
        Vec<A> first[kWidth] = {}, second[kWidth] = {};
        for (const int64_t stop = std::min<int64_t>(end, row + kChain); row < stop; ++row)
#pragma GCC unroll 4
            for (int u = 0; u < kWidth; ++u) term(first[u], second[u], row, lane + u * L, some...);
        for (int u = 0; u < kWidth; ++u) {
            add_wide(firsts + lane + u * L, first[u]);
            add_wide(seconds + lane + u * L, second[u]);
        }
    }
}
template <class A, class F>
void sums_across(int64_t begin, int64_t end, int64_t lane, int64_t stop, F&& term, double* firsts,
                 double* seconds) {
    constexpr int L = kLanes<A>;
    for (; lane + 4 * L <= stop; lane += 4 * L)
        sums_of_vectors<A, 4>(begin, end, lane, term, firsts, seconds);
    for (; lane + L <= stop; lane += L)
        sums_of_vectors<A, 1>(begin, end, lane, term, firsts, seconds);
    if (lane < stop)
        sums_of_vectors<A, 1>(begin, end, lane, term, firsts, seconds, static_cast<int>(stop - lane));
}

}  // namespace bigops
