#pragma once

#include "../sgd_rule.h"
#include "step_tensors.h"

namespace bigops::cuda {

// One step of all tensors, on the current device; a momentum buffer, if momentum is not 0, is the role
// after the gradient's. Copies, if any: of float32 in bf16 or f16.
void sgd(const std::vector<StepTensor>& tensors, DType dtype, std::optional<DType> copies,
         const SgdOptions& options, const StepScalars& scalars, void* stream);

}  // namespace bigops::cuda
