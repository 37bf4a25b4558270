// The activations around somebody else's convolution, and the depthwise convolution with both in it.
#pragma once

#include "activation.h"
#include "conv2d.h"

namespace bigops {

// out = activation(conv_out + residual); conv_out and out may be the same memory. pre, if given, is
// what the activation was given. Fastest where all lie alike, in planes or channels_last.
void activation_forward(const View& conv_out, const OptionalView& residual, const View& out,
                        const OptionalView& pre, Activation activation);

// grad_conv = the gradient of conv_out (and of residual), grad_bias = its sum over each channel.
// saved is out or pre, as activation.h says; absent for no activation.
void activation_backward(const View& grad_out, const OptionalView& saved, const View& grad_conv,
                         const OptionalView& grad_bias, Activation activation);

// Of a convolution with one channel a group, by whatever filters, of images in planes: everything in
// one pass over planes that stay in the cache.
void conv2d_depthwise_planes_forward(const View& input, const View& weight, const OptionalView& bias,
                              const OptionalView& residual, const View& out,
                              const OptionalView& pre, const Conv2dParams& conv,
                              Activation activation);
void conv2d_depthwise_planes_backward(const View& grad_out, const View& input, const View& weight,
                               const OptionalView& saved, const OptionalView& grad_input,
                               const OptionalView& grad_weight, const OptionalView& grad_bias,
                               const OptionalView& grad_residual, const Conv2dParams& conv,
                               Activation activation);

// The same of images in channels_last, with one filter a channel.
void conv2d_depthwise_pixels_forward(const View& input, const View& weight,
                                     const OptionalView& bias, const OptionalView& residual,
                                     const View& out, const OptionalView& pre,
                                     const Conv2dParams& conv, Activation activation);
void conv2d_depthwise_pixels_backward(const View& grad_out, const View& input, const View& weight,
                                      const OptionalView& saved, const OptionalView& grad_input,
                                      const OptionalView& grad_weight,
                                      const OptionalView& grad_bias,
                                      const OptionalView& grad_residual, const Conv2dParams& conv,
                                      Activation activation);

// The same of filters of one pixel in one group, without padding, in either layout.
void conv2d_pointwise_forward(const View& input, const View& weight, const OptionalView& bias,
                              const OptionalView& residual, const View& out, const OptionalView& pre,
                              const Conv2dParams& conv, Activation activation);
void conv2d_pointwise_backward(const View& grad_out, const View& input, const View& weight,
                               const OptionalView& saved, const OptionalView& grad_input,
                               const OptionalView& grad_weight, const OptionalView& grad_bias,
                               const OptionalView& grad_residual, const Conv2dParams& conv,
                               Activation activation);

// The same of any convolution, in any layout: by products of windows.
void conv2d_windows_forward(const View& input, const View& weight, const OptionalView& bias,
                            const OptionalView& residual, const View& out, const OptionalView& pre,
                            const Conv2dParams& conv, Activation activation);
void conv2d_windows_backward(const View& grad_out, const View& input, const View& weight,
                             const OptionalView& saved, const OptionalView& grad_input,
                             const OptionalView& grad_weight, const OptionalView& grad_bias,
                             const OptionalView& grad_residual, const Conv2dParams& conv,
                             Activation activation);

}  // namespace bigops
