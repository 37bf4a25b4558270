#pragma once

#include <cstdint>
#include <vector>

#include "../adam_rule.h"
#include "../view.h"

namespace bigops::cuda {

// One parameter with its gradient and states, dense, of one dtype, lying alike.
struct AdamTensor {
    void* data[kAdamRoles] = {};  // a role that is not there is null
    int64_t numel = 0;
    double step = 0;  // after this step
};

// Bytes of device memory that a call over this many tensors (of this many elements in all) takes.
int64_t adam_workspace(size_t tensors);
int64_t grad_norm_workspace(size_t tensors, int64_t numel);

// One step of all tensors in one launch. `total_norm`, `grad_scale` and `found_inf` are read on the
// device (null: no clipping, no scale, no skipping), so nothing waits.
void adam(const std::vector<AdamTensor>& tensors, DType dtype, const AdamOptions& options,
          const float* total_norm, const float* grad_scale, const float* found_inf,
          const View& workspace, void* stream);

// out[0] = the 2-norm of all gradients as one vector; one launch, the same bits in every run.
void grad_norm(const std::vector<AdamTensor>& tensors, const std::vector<DType>& dtypes, float* out,
               const View& workspace, void* stream);

}  // namespace bigops::cuda
