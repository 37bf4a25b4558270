#include "../cpu/conv2d.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "module.h"
#include "tensor.h"

namespace bigops {

namespace py = pybind11;

void bind_conv2d(py::module_& m) {
    using unlocked = py::call_guard<Unlocked>;
    m.def(
        "conv2d_relu_pool_forward",
        [](const View& input, const View& weight, const OptionalView& bias, const View& out,
           const OptionalView& index, Size2 stride, Size2 padding, Size2 dilation, int64_t groups,
           Size2 pool_kernel, Size2 pool_stride, Size2 pool_padding) {
            conv2d_relu_pool_forward(input, weight, bias, out, index,
                                     {stride, padding, dilation, groups},
                                     {pool_kernel, pool_stride, pool_padding});
        },
        unlocked());
    m.def(
        "conv2d_relu_pool_backward",
        [](const View& grad_out, const View& input, const View& weight, const View& saved,
           const OptionalView& grad_input, const OptionalView& grad_weight,
           const OptionalView& grad_bias, Size2 stride, Size2 padding, Size2 dilation,
           int64_t groups, Size2 pool_kernel, Size2 pool_stride, Size2 pool_padding) {
            conv2d_relu_pool_backward(grad_out, input, weight, saved, grad_input, grad_weight,
                                      grad_bias, {stride, padding, dilation, groups},
                                      {pool_kernel, pool_stride, pool_padding});
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
        [](const View& grad_out, const View& saved, const View& grad_conv,
           const OptionalView& grad_bias, Size2 pool_kernel, Size2 pool_stride,
           Size2 pool_padding) {
            relu_pool_backward(grad_out, saved, grad_conv, grad_bias,
                               {pool_kernel, pool_stride, pool_padding});
        },
        unlocked());
}

}  // namespace bigops
