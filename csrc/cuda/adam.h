#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "../adam_rule.h"
#include "../view.h"

namespace bigops::cuda {

// A number on the device, float32 or float64; null where there is none.
struct DeviceNumber {
    void* at = nullptr;
    bool wide = false;
};

// One parameter with its gradient and states, dense, of one dtype, lying alike.
struct AdamTensor {
    void* data[kAdamRoles] = {};  // a role that is not there is null
    void* copy = nullptr;         // gets the new parameter, rounded to the call's dtype of copies
    int64_t numel = 0;
    double step = 0;     // after this step, where there is no
    DeviceNumber count;  // of steps, which the call advances
};

// What is read on the device, so that nothing waits for it; null: no clipping, no scale, never
// skipped, the options' learning rate.
struct AdamScalars {
    const float* total_norm = nullptr;
    const float* grad_scale = nullptr;
    const float* found_inf = nullptr;
    DeviceNumber lr;
};

// Bytes of device memory that a call over this many tensors (of this many elements in all) takes;
// `adam` only where counts or the learning rate are on the device.
int64_t adam_workspace(size_t tensors);
int64_t grad_norm_workspace(size_t tensors, int64_t numel);

// One step of all tensors, on the current device. Copies, if any: of float32 in bf16 or f16.
void adam(const std::vector<AdamTensor>& tensors, DType dtype, std::optional<DType> copies,
          const AdamOptions& options, const AdamScalars& scalars, void* workspace, void* stream);

// out[0] = the 2-norm of all gradients as one vector; the same bits in every run.
void grad_norm(const std::vector<AdamTensor>& tensors, const std::vector<DType>& dtypes, float* out,
               void* workspace, void* stream);

}  // namespace bigops::cuda
