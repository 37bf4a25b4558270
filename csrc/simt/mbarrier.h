// The model's side of csrc/cuda/device/mbarrier.h.
#pragma once

#include "instructions.h"

namespace bigops::device {

BIGOPS_DEVICE void mbarrier_init(uint64_t* barrier, uint32_t count) {
    simt::mbarrier_init(barrier, count);
}
BIGOPS_DEVICE void fence_mbarrier_init() { simt::fence_mbarrier_init(); }
BIGOPS_DEVICE void fence_proxy_async() { simt::fence_proxy_async(); }
BIGOPS_DEVICE void mbarrier_arrive(uint64_t* barrier) { simt::mbarrier_arrive(barrier, 0); }
BIGOPS_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
    simt::mbarrier_arrive(barrier, bytes);
}
// How long it may take to say no is not bounded: here for ever, so that what never comes is a deadlock.
BIGOPS_DEVICE bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity,
                                     simt::Site site = simt::Site::current()) {
    simt::mbarrier_wait(barrier, parity, site);
    return true;
}
BIGOPS_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity,
                                 simt::Site site = simt::Site::current()) {
    simt::mbarrier_wait(barrier, parity, site);
}

}  // namespace bigops::device
