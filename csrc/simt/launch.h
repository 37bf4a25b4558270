// The model's side of csrc/cuda/device/launch.h.
#pragma once

#include "core.h"

namespace bigops::device {

inline char* dynamic_shared() { return bigops::simt::dynamic_shared(); }

}  // namespace bigops::device

namespace bigops::cuda {

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const LaunchConfig& config,
            Arguments&&... arguments) {
    try {
        bigops::simt::launch(kernel, {config.grid, config.block, config.shared_bytes},
                             static_cast<Parameters>(arguments)...);
    } catch (const std::invalid_argument& error) {
        throw std::runtime_error(std::string(name) + ": " + error.what());
    }
}

}  // namespace bigops::cuda
