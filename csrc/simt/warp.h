// The model's side of csrc/cuda/device/warp.h.
#pragma once

#include <bit>
#include <cmath>

#include "instructions.h"

namespace bigops::simt {

// .ftz: subnormal numbers are zeros of their sign.
inline float flushed(float x) {
    return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}

}  // namespace bigops::simt

namespace bigops::device {

using simt::Site;

BIGOPS_DEVICE int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }

template <class T>
BIGOPS_DEVICE T shuffle(T x, int lane, Site site = Site::current()) {
    return __shfl_sync(0xffffffffu, x, lane, kWarp, site);
}
template <class T>
BIGOPS_DEVICE T shuffle_xor(T x, int mask, Site site = Site::current()) {
    return __shfl_xor_sync(0xffffffffu, x, mask, kWarp, site);
}

BIGOPS_DEVICE bool any(bool x, Site site = Site::current()) {
    return __any_sync(0xffffffffu, x, site) != 0;
}

BIGOPS_DEVICE bool elect_one(Site site = Site::current()) { return simt::elect(site); }

// Exact but for the last rounding: the hardware's errors within its bounds are not modelled.
BIGOPS_DEVICE float exp2_approx(float x) { return simt::flushed(std::exp2(simt::flushed(x))); }
BIGOPS_DEVICE float reciprocal_approx(float x) { return simt::flushed(1.0f / simt::flushed(x)); }

template <class T>
BIGOPS_DEVICE uint32_t pack(float low, float high) {
    return static_cast<uint32_t>(T(high).bits) << 16 | T(low).bits;
}

BIGOPS_DEVICE void named_barrier_sync(int id, int threads, Site site = Site::current()) {
    simt::named_barrier(id, threads, true, site);
}
BIGOPS_DEVICE void named_barrier_arrive(int id, int threads, Site site = Site::current()) {
    simt::named_barrier(id, threads, false, site);
}

template <int kRegisters>
BIGOPS_DEVICE void registers_increase(Site site = Site::current()) {
    simt::set_registers(kRegisters, true, site);
}
template <int kRegisters>
BIGOPS_DEVICE void registers_decrease(Site site = Site::current()) {
    simt::set_registers(kRegisters, false, site);
}

BIGOPS_DEVICE uint32_t shared_address(const void* shared) { return simt::shared_address(shared); }

}  // namespace bigops::device
