// Batch normalisation + residual + ReLU on the CPU. bigops/ops/batch_norm_act.py says what is
// computed.
#pragma once

#include <cstdint>
#include <optional>

#include "../view.h"

namespace bigops {

using OptionalView = std::optional<View>;

struct BatchNormParams {
    bool training;       // mean and var are the batch's, else given
    bool relu;
    bool channels_last;  // how input, residual, out and their gradients lie, all alike; else contiguous
    double eps;
};

// Tensors are (N, C, *). Training writes the channels' mean and var, the unbiased one.
void batch_norm_act_forward(const View& input, const OptionalView& residual,
                            const OptionalView& weight, const OptionalView& bias, const View& mean,
                            const View& var, const View& out, const BatchNormParams& params);

// Gradients of the above, with mean and var as it had or wrote them; those not wanted are absent.
void batch_norm_act_backward(const View& grad_out, const View& input, const View& out,
                             const OptionalView& weight, const View& mean, const View& var,
                             const OptionalView& grad_input, const OptionalView& grad_weight,
                             const OptionalView& grad_bias, const OptionalView& grad_residual,
                             const BatchNormParams& params);

}  // namespace bigops
