// What the optimizers' steps on a GPU take alike.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "../step_rule.h"
#include "../view.h"

namespace bigops::cuda {

constexpr int kMostRoles = 5;  // Adam's: parameter, gradient, three states

// A number on the device, float32 or float64; null where there is none.
struct DeviceNumber {
    void* at = nullptr;
    bool wide = false;
};

// One parameter with its gradient and states, dense, of one dtype, lying alike.
struct StepTensor {
    void* data[kMostRoles] = {};  // a role that is not there is null
    void* copy = nullptr;         // gets the new parameter, rounded to the call's dtype of copies
    int64_t numel = 0;
};

// What is read on the device, so that nothing waits for it; null: no clipping, no scale, never
// skipped, the options' learning rate.
struct StepScalars {
    const float* total_norm = nullptr;
    const float* grad_scale = nullptr;
    const float* found_inf = nullptr;
    DeviceNumber lr;
};

}  // namespace bigops::cuda
