// The copy engine: boxes of a tensor that a map describes, to and from shared memory.
// "Data Movement and Conversion Instructions: cp.async.bulk.tensor, cp.reduce.async.bulk.tensor,
// cp.async.bulk.commit_group, cp.async.bulk.wait_group". Coordinates run from the innermost dimension;
// what lies outside the tensor is read as zeros and not written.
#pragma once

#include "mbarrier.h"

#ifdef BIGOPS_SIMT
#include "../../simt/tma.h"
#else

#include <cuda.h>

namespace bigops::device {

using TensorMap = CUtensorMap;  // a __grid_constant__ kernel parameter, never a copy of one

// "prefetch.tensormap"
BIGOPS_DEVICE void tma_prefetch(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// One thread loads a whole box; `barrier` is given its bytes when they have come.
BIGOPS_DEVICE void tma_load(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(shared)),
        "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1)
        : "memory");
}
BIGOPS_DEVICE void tma_load(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1,
                            int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(shared)),
        "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}
BIGOPS_DEVICE void tma_load(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1,
                            int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(shared)),
        "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

// "cp.async.bulk": bytes lying one after the other, a multiple of 16 from an address that is one.
BIGOPS_DEVICE void bulk_load(void* shared, const void* global, uint64_t* barrier, uint32_t bytes) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(shared)),
        "l"(global), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}

// The im2col walk over (channels, width, height, images): "Tensor access modes: im2col mode". The map
// fixes how many pixels and channels come; the offsets say which tap of the filter.
BIGOPS_DEVICE void tma_load_im2col(void* shared, const TensorMap* map, uint64_t* barrier, int c,
                                   int w, int h, int n, uint16_t offset_w, uint16_t offset_h) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(shared_address(shared)),
        "l"(map), "r"(shared_address(barrier)), "r"(c), "r"(w), "r"(h), "r"(n), "h"(offset_w),
        "h"(offset_h)
        : "memory");
}

// Stores and additions belong to the issuing thread's bulk group.
BIGOPS_DEVICE void tma_store(const TensorMap* map, const void* shared, int c0, int c1, int c2,
                             int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
            map),
        "r"(shared_address(shared)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}
BIGOPS_DEVICE void tma_reduce_add(const TensorMap* map, const void* shared, int c0, int c1, int c2,
                                  int c3) {
    asm volatile(
        "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.bulk_group "
        "[%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
        "r"(shared_address(shared)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}
// "cp.reduce.async.bulk": floats lying one after the other are added to global memory.
BIGOPS_DEVICE void bulk_reduce_add(float* global, const float* shared, uint32_t bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
                     global),
                 "r"(shared_address(shared)), "r"(bytes)
                 : "memory");
}

BIGOPS_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until at most kPending groups still read shared memory (wait_group.read) or are not written yet.
template <int kPending>
BIGOPS_DEVICE void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
template <int kPending>
BIGOPS_DEVICE void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace bigops::device

#endif
