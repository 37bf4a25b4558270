// mbarriers: a phase completes when `count` threads have arrived and all bytes that were announced
// have come. "Parallel Synchronization and Communication Instructions: mbarrier".
#pragma once

#include "warp.h"

#ifdef BIGOPS_SIMT
#include "../../simt/mbarrier.h"
#else

namespace bigops::device {

// mbarrier.init, by one thread; then fence_mbarrier_init() and a barrier before anybody uses it.
BIGOPS_DEVICE void mbarrier_init(uint64_t* barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(count)
                 : "memory");
}

// "membar / fence": the initialisation is seen by the async proxy.
BIGOPS_DEVICE void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// "membar / fence": what this thread knows to be written in shared memory by ordinary stores is seen
// by wgmma and TMA from here on.
BIGOPS_DEVICE void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// mbarrier.arrive
BIGOPS_DEVICE void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                 : "memory");
}

// mbarrier.arrive.expect_tx: arrives, and announces bytes that the phase will wait for.
BIGOPS_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}

// mbarrier.try_wait.parity: whether the phase of this parity is over; may take a while to say no.
BIGOPS_DEVICE bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return done != 0;
}

BIGOPS_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    while (!mbarrier_try_wait(barrier, parity)) {
    }
}

}  // namespace bigops::device

#endif
