#include "../cpu/max_pool2d.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "module.h"
#include "tensor.h"

namespace bigops {

namespace py = pybind11;

void bind_max_pool2d(py::module_& m) {
    m.def(
        "max_pool2d_forward",
        [](const View& input, const View& out, const View& index, Size2 kernel, Size2 stride,
           Size2 padding, Size2 dilation) {
            max_pool2d_forward(input, out, index, {kernel, stride, padding, dilation});
        },
        py::call_guard<Unlocked>());
    m.def(
        "max_pool2d_backward",
        [](const View& grad_out, const View& index, const View& grad_input, Size2 kernel,
           Size2 stride, Size2 padding, Size2 dilation) {
            max_pool2d_backward(grad_out, index, grad_input, {kernel, stride, padding, dilation});
        },
        py::call_guard<Unlocked>());
}

}  // namespace bigops
