// What both depthwise convolutions check of their tensors.
#pragma once

#include "conv2d_act.h"
#include "conv2d_tile.h"

namespace bigops {

inline Conv2dShape depthwise_shape(const View& input, const View& weight, const View& out,
                                   const Conv2dParams& conv) {
    const Conv2dShape s = conv2d_shape(input, weight, out, conv, kNoPool);
    require(s.group_channels == 1, "a depthwise convolution has one channel a group");
    return s;
}

// Neighbours along `dim` must lie side by side.
inline void depthwise_fits(const View& like, int dim, std::initializer_list<OptionalView> views) {
    for (const OptionalView& view : views)
        require(!view || (same_shape(*view, like) && view->dtype == like.dtype &&
                          (view->strides[dim] == 1 || view->shape[dim] == 1)),
                "tensors differ in shape or dtype, or do not lie as they must");
}

inline void bias_fits(const OptionalView& bias, const View& weight) {
    require(!bias || (bias->ndim == 1 && bias->shape[0] == weight.shape[0] &&
                      bias->dtype == weight.dtype),
            "bias does not fit the weight");
}

inline void depthwise_gradients_fit(int dim, const View& grad_out, const View& input,
                                    const View& weight, const OptionalView& saved,
                                    const OptionalView& grad_input,
                                    const OptionalView& grad_weight, const OptionalView& grad_bias,
                                    const OptionalView& grad_residual, Activation activation) {
    require(saved || activation == Activation::none, "the activation's gradient needs what was saved");
    bias_fits(grad_bias, weight);
    depthwise_fits(grad_out, dim, {grad_out, saved, grad_residual});
    depthwise_fits(input, dim, {input, grad_input});
    require(!grad_weight || (same_shape(*grad_weight, weight) && grad_weight->dtype == input.dtype),
            "grad_weight does not fit weight");
}

}  // namespace bigops
