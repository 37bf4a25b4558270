// One register of lanes: the vocabulary of the CPU kernels. Arithmetic is the compiler's vector
// extension (+ - * / and comparisons work on Vec<T> directly); only what that lacks is written with
// intrinsics. Nothing here depends on -ffast-math; FMA happens where fma() says so.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace bigops {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

// float16 has no arithmetic type before AVX512-FP16, so both half types compute as float.
template <class T>
struct compute {
    using type = float;
};
template <>
struct compute<double> {
    using type = double;
};
template <class T>
using compute_t = typename compute<T>::type;

typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef double VecD __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI __attribute__((vector_size(kVectorBytes)));
typedef int64_t VecL __attribute__((vector_size(kVectorBytes)));

template <class T>
struct vec_of;
template <>
struct vec_of<float> {
    using type = VecF;
    using mask = VecI;
};
template <>
struct vec_of<double> {
    using type = VecD;
    using mask = VecL;
};
// Vec<float> or Vec<double>; Mask<T> is a comparison's result (all ones or zero in each lane).
template <class T>
using Vec = typename vec_of<T>::type;
template <class T>
using Mask = typename vec_of<T>::mask;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
inline Vec<T> splat(T x) {
    return x - Vec<T>{};
}

template <class V>
inline V select(decltype(V{} < V{}) mask, V a, V b) {
    return mask ? a : b;
}

template <class V>
inline V vmax(V a, V b) {
    return a > b ? a : b;
}

#if defined(__AVX512F__)
inline VecF fma(VecF a, VecF b, VecF c) { return _mm512_fmadd_ps(a, b, c); }
inline VecD fma(VecD a, VecD b, VecD c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(__AVX2__)
inline VecF fma(VecF a, VecF b, VecF c) { return _mm256_fmadd_ps(a, b, c); }
inline VecD fma(VecD a, VecD b, VecD c) { return _mm256_fmadd_pd(a, b, c); }
#else
template <class V>
inline V fma(V a, V b, V c) {
    for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(a[0])); ++i)
        c[i] = __builtin_fma(a[i], b[i], c[i]);
    return c;
}
#endif

// ---- scalars: conversion to and from the type we compute in ----

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
inline float to_float(bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(f16 x) {
#if defined(__F16C__)
    return _cvtsh_ss(x.bits);
#else
    return static_cast<float>(std::bit_cast<_Float16>(x.bits));
#endif
}

template <class T>
inline T from_float(compute_t<T> x);
template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline double from_float<double>(double x) {
    return x;
}
template <>
inline bf16 from_float<bf16>(float x) {  // round to nearest, ties to even; NaN stays NaN
    uint32_t bits = std::bit_cast<uint32_t>(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
    return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
#if defined(__F16C__)
    return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
    return {std::bit_cast<uint16_t>(static_cast<_Float16>(x))};
#endif
}

// The same in lanes: Bits and Halves are the 32-bit and 16-bit unsigned lanes of a float vector V.
template <class Bits, class Halves, class V>
inline Halves to_bf16_lanes(V v) {
    const Bits bits = std::bit_cast<Bits>(v);
    const Bits rounded = bits + 0x7fffu + (bits >> 16 & 1u);
    return __builtin_convertvector((v != v ? bits | 0x400000u : rounded) >> 16, Halves);
}

// ---- vectors: unaligned loads and stores that convert; `count` lanes, the rest are zero ----

inline VecF load(const float* p) {
    VecF v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline VecD load(const double* p) {
    VecD v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, VecF v) { std::memcpy(p, &v, sizeof v); }
inline void store(double* p, VecD v) { std::memcpy(p, &v, sizeof v); }

#if defined(__AVX512F__)
inline VecF load(const bf16* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline VecF load(const f16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m256i to_bf16_bits(VecF v) {
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
inline void store(bf16* p, VecF v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16_bits(v));
}
inline void store(f16* p, VecF v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX2__)
inline VecF load(const bf16* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline VecF load(const f16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store(f16* p, VecF v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
inline VecF load(const bf16* p) {
    VecF v;
    for (int i = 0; i < kLanes<float>; ++i) v[i] = to_float(p[i]);
    return v;
}
inline VecF load(const f16* p) {
    VecF v;
    for (int i = 0; i < kLanes<float>; ++i) v[i] = to_float(p[i]);
    return v;
}
inline void store(f16* p, VecF v) {
    for (int i = 0; i < kLanes<float>; ++i) p[i] = from_float<f16>(v[i]);
}
#endif
#if !defined(__AVX512F__)
inline void store(bf16* p, VecF v) {
    typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
    typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
    const auto halves = to_bf16_lanes<Bits, Halves>(v);
    std::memcpy(p, &halves, sizeof halves);
}
#endif

#if defined(__AVX512BW__) && defined(__AVX512VL__)
inline __mmask16 lanes_below(int count) { return static_cast<__mmask16>((1u << count) - 1); }
inline VecF load(const float* p, int count) { return _mm512_maskz_loadu_ps(lanes_below(count), p); }
inline VecF load(const bf16* p, int count) {
    const __m256i bits = _mm256_maskz_loadu_epi16(lanes_below(count), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline VecF load(const f16* p, int count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes_below(count), p));
}
inline void store(float* p, VecF v, int count) {
    _mm512_mask_storeu_ps(p, lanes_below(count), v);
}
inline void store(bf16* p, VecF v, int count) {
    _mm256_mask_storeu_epi16(p, lanes_below(count), to_bf16_bits(v));
}
inline void store(f16* p, VecF v, int count) {
    _mm256_mask_storeu_epi16(p, lanes_below(count),
                             _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#endif
template <class T>
inline Vec<compute_t<T>> load(const T* p, int count) {
    T lanes[kLanes<compute_t<T>>] = {};
    std::memcpy(lanes, p, sizeof(T) * static_cast<size_t>(count));
    return load(lanes);
}
template <class T>
inline void store(T* p, Vec<compute_t<T>> v, int count) {
    T lanes[kLanes<compute_t<T>>];
    store(lanes, v);
    std::memcpy(p, lanes, sizeof(T) * static_cast<size_t>(count));
}

// The first `count` lanes of v, `rest` in all others.
template <class V, class C>
inline V first_lanes(V v, int64_t count, C rest) {
    using Bits = decltype(v < v);
    using Lane = decltype(Bits{}[0] + 0);
    Bits lane;
    for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(v[0])); ++i) lane[i] = i;
    return select(lane < static_cast<Lane>(count) - Bits{}, v, splat(rest));
}

// ---- bytes to and from lanes of A's width: by doubling, since GCC 12 takes a wider step apart, lane
// by lane (67 instructions; 10 by doubling) ----

namespace detail {
template <int kCount>
struct Steps {
    typedef uint8_t Bytes __attribute__((vector_size(kCount)));
    typedef uint16_t Words __attribute__((vector_size(2 * kCount)));
    typedef int32_t Longs __attribute__((vector_size(4 * kCount)));
};
template <class To, class From>
inline To convert_lanes(From from) {
    return __builtin_convertvector(from, To);
}
}  // namespace detail

template <class A>
inline Mask<A> load_bytes(const uint8_t* p) {
    using Steps = detail::Steps<kLanes<A>>;
    typename Steps::Bytes bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    const auto words = detail::convert_lanes<typename Steps::Words>(bytes);
    return detail::convert_lanes<Mask<A>>(detail::convert_lanes<typename Steps::Longs>(words));
}

template <class A>
inline void store_bytes(uint8_t* p, Mask<A> lanes) {
    using Steps = detail::Steps<kLanes<A>>;
#if defined(__AVX512F__)
    const auto bytes = detail::convert_lanes<typename Steps::Bytes>(lanes);  // one instruction there
#else
    const auto longs = detail::convert_lanes<typename Steps::Longs>(lanes);
    const auto words = detail::convert_lanes<typename Steps::Words>(longs);
    const auto bytes = detail::convert_lanes<typename Steps::Bytes>(words);
#endif
    std::memcpy(p, &bytes, sizeof bytes);
}

// ---- reductions over the lanes ----

template <class V>
inline auto sum(V v) {
    auto total = v[0];
    for (int i = 1; i < static_cast<int>(sizeof(V) / sizeof(v[0])); ++i) total += v[i];
    return total;
}
template <class V>
inline auto max(V v) {
    auto best = v[0];
    for (int i = 1; i < static_cast<int>(sizeof(V) / sizeof(v[0])); ++i)
        best = v[i] > best ? v[i] : best;
    return best;
}
#if defined(__AVX512F__)
inline float sum(VecF v) { return _mm512_reduce_add_ps(v); }
inline float max(VecF v) { return _mm512_reduce_max_ps(v); }
inline double sum(VecD v) { return _mm512_reduce_add_pd(v); }
inline double max(VecD v) { return _mm512_reduce_max_pd(v); }
#endif

// ---- exp: e^x = 2^n * e^r with |r| <= ln2/2, the remainder by a polynomial (Cody and Waite's
// reduction). At most 1.3 ulp over the normal range; below it the result flushes to zero. ----

namespace detail {

// x = n ln2 + r; returns (e^r - 1 - r) / r^2.
inline VecF exp_remainder(VecF x, VecF& n, VecF& r) {
    const VecF shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    n = fma(x, splat(1.44269504f), shifter) - shifter;
    r = fma(n, splat(-0.693145752f), x);
    r = fma(n, splat(-1.42860677e-6f), r);
    VecF p = splat(1.98756916e-4f);
    p = fma(p, r, splat(1.39819994e-3f));
    p = fma(p, r, splat(8.33345205e-3f));
    p = fma(p, r, splat(4.16657962e-2f));
    p = fma(p, r, splat(1.66666657e-1f));
    return fma(p, r, splat(5.00000000e-1f));
}

inline VecD exp_remainder(VecD x, VecD& n, VecD& r) {
    const VecD shifter = splat(6755399441055744.0);
    n = fma(x, splat(1.4426950408889634), shifter) - shifter;
    r = fma(n, splat(-0.693147180369123816490), x);
    r = fma(n, splat(-1.90821492927058770002e-10), r);
    // Taylor to the 13th power: its remainder at ln2/2 is below 2^-58.
    VecD p = splat(1.6059043836821613e-10);
    p = fma(p, r, splat(2.0876756987868099e-9));
    p = fma(p, r, splat(2.5052108385441719e-8));
    p = fma(p, r, splat(2.7557319223985891e-7));
    p = fma(p, r, splat(2.7557319223985893e-6));
    p = fma(p, r, splat(2.4801587301587302e-5));
    p = fma(p, r, splat(1.9841269841269841e-4));
    p = fma(p, r, splat(1.3888888888888889e-3));
    p = fma(p, r, splat(8.3333333333333333e-3));
    p = fma(p, r, splat(4.1666666666666667e-2));
    p = fma(p, r, splat(1.6666666666666667e-1));
    return fma(p, r, splat(0.5));
}

// n where a float has its exponent: added to a number's bits it multiplies by 2^n.
inline VecI exponent(VecF n) { return __builtin_convertvector(n, VecI) << 23; }
inline VecL exponent(VecD n) { return __builtin_convertvector(n, VecL) << 52; }
inline VecF power_of_two(VecF n) { return std::bit_cast<VecF>(exponent(n + 127.0f)); }
inline VecD power_of_two(VecD n) { return std::bit_cast<VecD>(exponent(n + 1023.0)); }

template <class V, class C>
inline V exp(V x, C low, C high) {
    V n, r;
    const V p = exp_remainder(vmax(select(x < high, x, splat(high)), splat(low)), n, r);
    const V mantissa = fma(p * r, r, r + C(1));  // in [0.7, 1.42), so n = 128 (1024) still fits
    V y = std::bit_cast<V>(std::bit_cast<decltype(x < x)>(mantissa) + exponent(n));
    y = select(x < low, V{}, y);
    y = select(x > high, splat(std::numeric_limits<C>::infinity()), y);
    return select(x != x, x, y);
}

// tanh |x| = e / (e + 2), e = e^2|x| - 1, without cancellation: e = 2^n (e^r - 1) + (2^n - 1), two
// terms of one sign but for n = 1, where the first is at least -0.59.
template <class V, class C>
inline V tanh(V x, C one) {
    const V size = x < V{} ? -x : x;
    V n, r;
    const V p = exp_remainder(C(2) * select(size > one, splat(one), size), n, r);
    const V scale = power_of_two(n);
    const V e = fma(scale, fma(p * r, r, r), scale - C(1));
    const V y = e / (e + C(2));
    return x < V{} ? -y : y;
}

}  // namespace detail

inline VecF exp(VecF x) { return detail::exp(x, -87.33654f, 88.72283f); }
inline VecD exp(VecD x) { return detail::exp(x, -708.39, 709.78); }

// At most 3 ulp; 1 beyond the given bound.
inline VecF tanh(VecF x) { return detail::tanh(x, 9.1f); }
inline VecD tanh(VecD x) { return detail::tanh(x, 19.1); }

}  // namespace bigops
