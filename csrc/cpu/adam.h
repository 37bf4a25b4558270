#pragma once

#include "../adam_rule.h"
#include "step_lists.h"

namespace bigops {

// Advances every step count and updates parameters and states in place. Gradients count as
// multiplied by `factor`.
void adam(const StepTensors& tensors, const AdamOptions& options, double factor);

}  // namespace bigops
