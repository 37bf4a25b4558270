// 16-bit floats of one format, singly and in pairs. Arithmetic is float's, rounded: for +, -, * and /
// that is the correctly rounded result, as float has more than twice the digits and two.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "vector_types.h"

namespace bigops::simt {

template <class Format>
struct SmallFloat {
    uint16_t bits;

    SmallFloat() = default;
    SmallFloat(float x) : bits(Format::narrow(x)) {}
    SmallFloat(double x) : SmallFloat(static_cast<float>(x)) {}
    SmallFloat(int x) : SmallFloat(static_cast<float>(x)) {}
    operator float() const { return Format::widen(bits); }
    static SmallFloat from_bits(uint16_t bits) {
        SmallFloat x;
        x.bits = bits;
        return x;
    }
    SmallFloat& operator+=(SmallFloat y) { return *this = SmallFloat(float(*this) + float(y)); }
    SmallFloat& operator-=(SmallFloat y) { return *this = SmallFloat(float(*this) - float(y)); }
    SmallFloat& operator*=(SmallFloat y) { return *this = SmallFloat(float(*this) * float(y)); }
    SmallFloat& operator/=(SmallFloat y) { return *this = SmallFloat(float(*this) / float(y)); }
    friend SmallFloat operator+(SmallFloat a, SmallFloat b) { return a += b; }
    friend SmallFloat operator-(SmallFloat a, SmallFloat b) { return a -= b; }
    friend SmallFloat operator*(SmallFloat a, SmallFloat b) { return a *= b; }
    friend SmallFloat operator/(SmallFloat a, SmallFloat b) { return a /= b; }
    friend SmallFloat operator-(SmallFloat a) {
        return from_bits(static_cast<uint16_t>(a.bits ^ 0x8000));
    }
};

template <class Format>
struct alignas(4) SmallFloat2 {
    SmallFloat<Format> x, y;

    friend SmallFloat2 operator+(SmallFloat2 a, SmallFloat2 b) { return {a.x + b.x, a.y + b.y}; }
    friend SmallFloat2 operator-(SmallFloat2 a, SmallFloat2 b) { return {a.x - b.x, a.y - b.y}; }
    friend SmallFloat2 operator*(SmallFloat2 a, SmallFloat2 b) { return {a.x * b.x, a.y * b.y}; }
};

}  // namespace bigops::simt

template <class F>
bigops::simt::SmallFloat<F> __hadd(bigops::simt::SmallFloat<F> a, bigops::simt::SmallFloat<F> b) {
    return a + b;
}
template <class F>
bigops::simt::SmallFloat<F> __hsub(bigops::simt::SmallFloat<F> a, bigops::simt::SmallFloat<F> b) {
    return a - b;
}
template <class F>
bigops::simt::SmallFloat<F> __hmul(bigops::simt::SmallFloat<F> a, bigops::simt::SmallFloat<F> b) {
    return a * b;
}
template <class F>
bigops::simt::SmallFloat<F> __hmax(bigops::simt::SmallFloat<F> a, bigops::simt::SmallFloat<F> b) {
    return std::fmax(float(a), float(b));
}
template <class F>
bigops::simt::SmallFloat<F> __hmin(bigops::simt::SmallFloat<F> a, bigops::simt::SmallFloat<F> b) {
    return std::fmin(float(a), float(b));
}
template <class F>
bigops::simt::SmallFloat2<F> __hadd2(bigops::simt::SmallFloat2<F> a,
                                     bigops::simt::SmallFloat2<F> b) {
    return a + b;
}
template <class F>
bigops::simt::SmallFloat2<F> __hmul2(bigops::simt::SmallFloat2<F> a,
                                     bigops::simt::SmallFloat2<F> b) {
    return a * b;
}
template <class F>
bigops::simt::SmallFloat<F> __low2half(bigops::simt::SmallFloat2<F> a) {
    return a.x;
}
template <class F>
bigops::simt::SmallFloat<F> __high2half(bigops::simt::SmallFloat2<F> a) {
    return a.y;
}
template <class F>
float __low2float(bigops::simt::SmallFloat2<F> a) {
    return a.x;
}
template <class F>
float __high2float(bigops::simt::SmallFloat2<F> a) {
    return a.y;
}
