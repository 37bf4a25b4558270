// The model's side of csrc/cuda/device/async_copy.h. A copy is made when its group is waited for.
#pragma once

#include "instructions.h"

namespace bigops::device {

BIGOPS_DEVICE void cp_async_16(void* shared, const void* global, bool valid = true) {
    simt::cp_async_16(shared, global, valid);
}
BIGOPS_DEVICE void cp_async_commit() { simt::cp_async_commit(); }
template <int kPending>
BIGOPS_DEVICE void cp_async_wait() {
    simt::cp_async_wait(kPending);
}

}  // namespace bigops::device
