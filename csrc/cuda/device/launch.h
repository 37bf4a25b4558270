// The one way to start a kernel, since g++ cannot parse <<<>>>, and the one way to reach dynamic
// shared memory.
#pragma once

#include "words.h"

#include <stdexcept>
#include <string>

namespace bigops::cuda {

struct LaunchConfig {
    dim3 grid;
    dim3 block;
    size_t shared_bytes = 0;
    void* stream = nullptr;
};

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Of the current device.
inline int attribute(cudaDeviceAttr which) {
    int device = 0, value = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
    return value;
}
inline int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }
// Bytes that one of them has.
inline int shared_memory() { return attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor); }

}  // namespace bigops::cuda

#ifdef BIGOPS_SIMT
#include "../../simt/launch.h"
#else

namespace bigops::device {

// Aligned to 1024 bytes, the period of the widest swizzle.
BIGOPS_DEVICE char* dynamic_shared() {
    extern __shared__ __align__(1024) char bytes[];
    return bytes;
}

}  // namespace bigops::device

namespace bigops::cuda {

// Errors name the kernel: `name` is how it is called in the source.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const LaunchConfig& config,
            Arguments&&... arguments) {
    if (config.shared_bytes > 48 * 1024)  // set for each device, so each time: a table look-up
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(config.shared_bytes)),
              name);
    cudaLaunchConfig_t how = {};
    how.gridDim = config.grid;
    how.blockDim = config.block;
    how.dynamicSmemBytes = config.shared_bytes;
    how.stream = static_cast<cudaStream_t>(config.stream);
    check(cudaLaunchKernelEx(&how, kernel, Parameters(arguments)...), name);
}

}  // namespace bigops::cuda

#endif
