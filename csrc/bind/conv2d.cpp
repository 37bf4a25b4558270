#include "../cpu/conv2d.h"
#include "../cpu/conv2d_act.h"
#include "../cpu/conv2d_winograd.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "module.h"
#include "tensor.h"

namespace bigops {

namespace py = pybind11;

using WholeForward = decltype(conv2d_depthwise_planes_forward);
using WholeBackward = decltype(conv2d_depthwise_planes_backward);

// Convolutions with all that is around them.
static void bind_whole(py::module_& m, const std::string& name, WholeForward* forward,
                           WholeBackward* backward) {
    using unlocked = py::call_guard<Unlocked>;
    m.def(
        (name + "_forward").c_str(),
        [forward](const View& input, const View& weight, const OptionalView& bias,
                  const OptionalView& residual, const View& out, const OptionalView& pre,
                  Size2 stride, Size2 padding, Size2 dilation, int64_t groups, int activation) {
            forward(input, weight, bias, residual, out, pre, {stride, padding, dilation, groups},
                    static_cast<Activation>(activation));
        },
        unlocked());
    m.def(
        (name + "_backward").c_str(),
        [backward](const View& grad_out, const View& input, const View& weight,
                   const OptionalView& saved, const OptionalView& grad_input,
                   const OptionalView& grad_weight, const OptionalView& grad_bias,
                   const OptionalView& grad_residual, Size2 stride, Size2 padding, Size2 dilation,
                   int64_t groups, int activation) {
            backward(grad_out, input, weight, saved, grad_input, grad_weight, grad_bias,
                     grad_residual, {stride, padding, dilation, groups},
                     static_cast<Activation>(activation));
        },
        unlocked());
}

void bind_conv2d(py::module_& m) {
    using unlocked = py::call_guard<Unlocked>;
    m.def(
        "conv2d_relu_pool_forward",
        [](const View& input, const View& weight, const OptionalView& bias, const View& out,
           const OptionalView& index, Size2 stride, Size2 padding, Size2 dilation, int64_t groups,
           Size2 pool_kernel, Size2 pool_stride, Size2 pool_padding, bool relu) {
            conv2d_relu_pool_forward(input, weight, bias, out, index,
                                     {stride, padding, dilation, groups},
                                     {pool_kernel, pool_stride, pool_padding, relu});
        },
        unlocked());
    m.def(
        "conv2d_relu_pool_backward",
        [](const View& grad_out, const View& input, const View& weight, const OptionalView& saved,
           const OptionalView& grad_input, const OptionalView& grad_weight,
           const OptionalView& grad_bias, Size2 stride, Size2 padding, Size2 dilation,
           int64_t groups, Size2 pool_kernel, Size2 pool_stride, Size2 pool_padding) {
            conv2d_relu_pool_backward(grad_out, input, weight, saved, grad_input, grad_weight,
                                      grad_bias, {stride, padding, dilation, groups},
                                      {pool_kernel, pool_stride, pool_padding, saved.has_value()});
        },
        unlocked());
    bind_whole(m, "conv2d_depthwise_planes", conv2d_depthwise_planes_forward,
                   conv2d_depthwise_planes_backward);
    bind_whole(m, "conv2d_depthwise_pixels", conv2d_depthwise_pixels_forward,
                   conv2d_depthwise_pixels_backward);
    bind_whole(m, "conv2d_pointwise", conv2d_pointwise_forward, conv2d_pointwise_backward);
    bind_whole(m, "conv2d_windows", conv2d_windows_forward, conv2d_windows_backward);
    m.def("conv2d_winograd", conv2d_winograd, unlocked());
    m.def("conv2d_winograd_weight", conv2d_winograd_weight, unlocked());
    m.def(
        "activation_forward",
        [](const View& conv_out, const OptionalView& residual, const View& out,
           const OptionalView& pre, int activation) {
            activation_forward(conv_out, residual, out, pre, static_cast<Activation>(activation));
        },
        unlocked());
    m.def(
        "activation_backward",
        [](const View& grad_out, const OptionalView& saved, const View& grad_conv,
           const OptionalView& grad_bias, int activation) {
            activation_backward(grad_out, saved, grad_conv, grad_bias,
                                static_cast<Activation>(activation));
        },
        unlocked());
    m.def(
        "relu_pool_forward",
        [](const View& conv_out, const View& out, const OptionalView& index, Size2 pool_kernel,
           Size2 pool_stride, Size2 pool_padding) {
            relu_pool_forward(conv_out, out, index, {pool_kernel, pool_stride, pool_padding});
        },
        unlocked());
    m.def(
        "relu_pool_backward",
        [](const View& grad_out, const View& index, const View& grad_conv,
           const OptionalView& grad_bias, Size2 pool_kernel, Size2 pool_stride,
           Size2 pool_padding) {
            relu_pool_backward(grad_out, index, grad_conv, grad_bias,
                               {pool_kernel, pool_stride, pool_padding});
        },
        unlocked());
}

}  // namespace bigops
