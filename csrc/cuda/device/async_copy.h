// cp.async: 16 bytes from global to shared memory without registers between, completing in groups.
// "Data Movement and Conversion Instructions: cp.async", "Asynchronous copy completion mechanisms:
// async-group".
#pragma once

#include "warp.h"

#ifdef BIGOPS_SIMT
#include "../../simt/async_copy.h"
#else

namespace bigops::device {

// Both addresses are multiples of 16. Where not `valid`, zeros are written and nothing is read.
BIGOPS_DEVICE void cp_async_16(void* shared, const void* global, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}

BIGOPS_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most kPending of this thread's groups are under way.
template <int kPending>
BIGOPS_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace bigops::device

#endif
