// Single instructions of a warp or a block: shuffles, conversions, exp2, named barriers, register
// allocation. Each names its section of the PTX ISA.
#pragma once

#include "words.h"

#ifdef BIGOPS_SIMT
#include "../../simt/warp.h"
#else

namespace bigops::device {

BIGOPS_DEVICE int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }

// "Data Movement and Conversion Instructions: shfl.sync", all lanes taking part.
template <class T>
BIGOPS_DEVICE T shuffle(T x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
template <class T>
BIGOPS_DEVICE T shuffle_xor(T x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// "Parallel Synchronization and Communication Instructions: vote.sync": whether it holds in any lane.
BIGOPS_DEVICE bool any(bool x) { return __any_sync(0xffffffffu, x) != 0; }

// "Parallel Synchronization and Communication Instructions: elect.sync": true in one lane.
BIGOPS_DEVICE bool elect_one() {
    uint32_t elected;
    asm volatile(
        "{\n.reg .pred p;\n"
        "elect.sync _|p, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(elected));
    return elected != 0;
}

// "Floating Point Instructions: ex2": 2^x, error at most 2 ulp, denormals flushed.
BIGOPS_DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// "Floating Point Instructions: rcp": 1/x, error at most 1 ulp.
BIGOPS_DEVICE float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// "Data Movement and Conversion Instructions: cvt", packed: `low` in bits 0-15, rounded to nearest.
template <class T>
BIGOPS_DEVICE uint32_t pack(float low, float high);
template <>
BIGOPS_DEVICE uint32_t pack<bf16>(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
template <>
BIGOPS_DEVICE uint32_t pack<f16>(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// "Parallel Synchronization and Communication Instructions: barrier{.cta}": `threads` in all take
// part, by sync (which waits) or arrive (which does not). Barrier 0 is __syncthreads'.
BIGOPS_DEVICE void named_barrier_sync(int id, int threads) {
    asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
BIGOPS_DEVICE void named_barrier_arrive(int id, int threads) {
    asm volatile("barrier.cta.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// "Miscellaneous Instructions: setmaxnreg": by all warps of a warpgroup; needs a register cap at
// entry (__launch_bounds__(threads, 1)).
template <int kRegisters>
BIGOPS_DEVICE void registers_increase() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
BIGOPS_DEVICE void registers_decrease() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// The 32-bit address of shared memory that instructions and descriptors take: "Data Movement and
// Conversion Instructions: cvta".
BIGOPS_DEVICE uint32_t shared_address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

}  // namespace bigops::device

#endif
