#pragma once

#include "../adam_rule.h"
#include "step_tensors.h"

namespace bigops::cuda {

struct AdamTensor : StepTensor {
    double step = 0;     // after this step, where there is no
    DeviceNumber count;  // of steps, which the call advances
};
static_assert(kAdamRoles == kMostRoles);

using AdamScalars = StepScalars;

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
