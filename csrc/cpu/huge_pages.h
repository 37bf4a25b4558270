// Huge pages for results of megabytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../view.h"

namespace bigops {

// Says that `fresh`, which holds nothing yet, will be written as a whole. An allocator maps large
// memory anew for every call, and the kernel then hands it out 4 KiB at a time: 12 ms for the 51 MB
// of a gradient that takes 2 ms to write. In huge pages the same takes 3 ms. It is advice: where it
// is not taken, nothing is lost.
inline void expect_writes(const View& fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t kHuge = uintptr_t{2} << 20;
    const auto width = fresh.dtype == DType::f64 || fresh.dtype == DType::i64   ? 8u
                       : fresh.dtype == DType::f32 || fresh.dtype == DType::i32 ? 4u
                       : fresh.dtype == DType::bf16 || fresh.dtype == DType::f16 ? 2u
                                                                                 : 1u;
    const auto begin = reinterpret_cast<uintptr_t>(fresh.data);
    const uintptr_t end = begin + static_cast<uintptr_t>(fresh.numel()) * width;
    const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = end / kHuge * kHuge;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)fresh;
#endif
}

inline void expect_writes(const std::optional<View>& fresh) {
    if (fresh) expect_writes(*fresh);
}

}  // namespace bigops
