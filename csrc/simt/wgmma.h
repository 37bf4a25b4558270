// The model's side of csrc/cuda/device/wgmma.h. A product is computed when its group is waited for, and its
// accumulators are NaN until then.
#pragma once

#include "mma.h"

namespace bigops::device {

BIGOPS_DEVICE void wgmma_fence(Site site = Site::current()) { simt::wgmma_fence(site); }
BIGOPS_DEVICE void wgmma_commit(Site site = Site::current()) { simt::wgmma_commit(site); }
template <int kPending>
BIGOPS_DEVICE void wgmma_wait(Site site = Site::current()) {
    simt::wgmma_wait(kPending, site);
}
template <int kCount>
BIGOPS_DEVICE void wgmma_pin(float (&)[kCount]) {}

template <int N, class T>
struct Wgmma {
    static_assert(N % 8 == 0 && N >= 8 && N <= 256);

    template <int kTransA, int kTransB>
    BIGOPS_DEVICE static void shared(float (&d)[N / 2], uint64_t a, uint64_t b, int add,
                       Site site = Site::current()) {
        simt::wgmma({simt::kOperand16<T>, N, d, a, b, nullptr, kTransA != 0, kTransB != 0, add != 0},
                    site);
    }
    template <int kTransB>
    BIGOPS_DEVICE static void registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int add,
                          Site site = Site::current()) {
        simt::wgmma({simt::kOperand16<T>, N, d, 0, b, a, false, kTransB != 0, add != 0}, site);
    }
};

}  // namespace bigops::device
