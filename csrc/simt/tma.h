// The model's side of csrc/cuda/device/tma.h. A load is made when no thread can go on without, a store when
// its group is waited for.
#pragma once

#include "instructions.h"

namespace bigops::device {

using TensorMap = simt::TensorMap;

BIGOPS_DEVICE void tma_prefetch(const TensorMap* map) { simt::tma_prefetch(map); }
BIGOPS_DEVICE void tma_load(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1) {
    simt::tma_load(shared, map, barrier, {c0, c1});
}
BIGOPS_DEVICE void tma_load(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1,
                            int c2) {
    simt::tma_load(shared, map, barrier, {c0, c1, c2});
}
BIGOPS_DEVICE void tma_load(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1,
                            int c2, int c3) {
    simt::tma_load(shared, map, barrier, {c0, c1, c2, c3});
}
BIGOPS_DEVICE void tma_load_im2col(void* shared, const TensorMap* map, uint64_t* barrier, int c,
                                    int w, int h, int n, uint16_t offset_w, uint16_t offset_h) {
    simt::tma_load_im2col(shared, map, barrier, {c, w, h, n}, offset_w, offset_h);
}
BIGOPS_DEVICE void bulk_load(void* shared, const void* global, uint64_t* barrier, uint32_t bytes) {
    simt::bulk_load(shared, global, barrier, bytes);
}
BIGOPS_DEVICE void tma_store(const TensorMap* map, const void* shared, int c0, int c1, int c2,
                             int c3) {
    simt::tma_store(map, shared, {c0, c1, c2, c3}, false);
}
BIGOPS_DEVICE void tma_reduce_add(const TensorMap* map, const void* shared, int c0, int c1, int c2,
                                  int c3) {
    simt::tma_store(map, shared, {c0, c1, c2, c3}, true);
}
BIGOPS_DEVICE void bulk_reduce_add(float* global, const float* shared, uint32_t bytes) {
    simt::bulk_reduce_add(global, shared, bytes);
}
BIGOPS_DEVICE void bulk_commit() { simt::bulk_commit(); }
template <int kPending>
BIGOPS_DEVICE void bulk_wait_read() {
    simt::bulk_wait(kPending, true);
}
template <int kPending>
BIGOPS_DEVICE void bulk_wait() {
    simt::bulk_wait(kPending, false);
}

}  // namespace bigops::device
