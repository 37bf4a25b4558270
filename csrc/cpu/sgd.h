#pragma once

#include "../sgd_rule.h"
#include "step_lists.h"

namespace bigops {

// Updates parameters and, where momentum is not 0, momentum buffers in place. Gradients count as
// multiplied by `factor`.
void sgd(const StepTensors& tensors, const SgdOptions& options, double factor);

}  // namespace bigops
