// A warpgroup's matrix instruction: D (64 x N, fp32, registers) = or += A (64 x 16) * B (16 x N), the
// operands in shared memory behind descriptors, A in registers too. "Asynchronous Warpgroup Level Matrix
// Multiply-Accumulate Instructions: wgmma.mma_async, wgmma.fence, wgmma.commit_group, wgmma.wait_group".
//
// The instruction runs on after it was issued: its accumulators, its A registers and its shared memory
// must be left alone until wgmma_wait says that its group is done.
#pragma once

#include "warp.h"

#ifdef BIGOPS_SIMT
#include "../../simt/wgmma.h"
#else

namespace bigops::device {

// Before the first wgmma, and whenever accumulators or A registers were touched since the last one.
BIGOPS_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
BIGOPS_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending groups are under way.
template <int kPending>
BIGOPS_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of these registers across; no instruction.
template <int kCount>
BIGOPS_DEVICE void wgmma_pin(float (&registers)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// shared<kTransA, kTransB>(d, a, b, add), registers<kTransB>(d, a, b, add): kTrans 0 where K is the
// contiguous dimension in memory, 1 where M or N is. add = 0 overwrites d.
template <int N, class T>
struct Wgmma;

#include "wgmma_sizes.h"

}  // namespace bigops::device

#endif
