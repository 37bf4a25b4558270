// How many threads a problem deserves.
#pragma once

#include <omp.h>

namespace bigops {

// Waking a second thread costs microseconds, and milliseconds where another process has its core:
// what one core does in some 20 us stays on it.
constexpr double kAlone = 1 << 19;

inline int threads_for(double operations) {
    return operations < kAlone ? 1 : omp_get_max_threads();
}

}  // namespace bigops
