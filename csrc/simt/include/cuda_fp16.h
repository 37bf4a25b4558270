// IEEE binary16.
#pragma once

#include "../small_float.h"

namespace bigops::simt {

struct HalfFormat {
    static float widen(uint16_t bits) { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
    // To nearest, ties to even; the NaN that hardware makes.
    static uint16_t narrow(float x) {
        return x != x ? 0x7fff : std::bit_cast<uint16_t>(static_cast<_Float16>(x));
    }
};

}  // namespace bigops::simt

using __half = bigops::simt::SmallFloat<bigops::simt::HalfFormat>;
using __half2 = bigops::simt::SmallFloat2<bigops::simt::HalfFormat>;
using half = __half;
using half2 = __half2;

inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline __half2 __float22half2_rn(float2 x) { return {__half(x.x), __half(x.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float2half2_rn(float x) { return {__half(x), __half(x)}; }
inline float2 __half22float2(__half2 x) { return {x.x, x.y}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __half2half2(__half x) { return {x, x}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short x) { return __half::from_bits(x); }
