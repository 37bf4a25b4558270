#include "../cpu/batch_norm_act.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "module.h"
#include "tensor.h"

namespace bigops {

namespace py = pybind11;

void bind_batch_norm_act(py::module_& m) {
    m.def(
        "batch_norm_act_forward",
        [](const View& input, const OptionalView& residual, const OptionalView& weight,
           const OptionalView& bias, const View& mean, const View& var, const View& out,
           bool training, bool relu, bool channels_last, double eps) {
            batch_norm_act_forward(input, residual, weight, bias, mean, var, out,
                                   {training, relu, channels_last, eps});
        },
        py::call_guard<Unlocked>());
    m.def(
        "batch_norm_act_backward",
        [](const View& grad_out, const View& input, const View& out, const OptionalView& weight,
           const View& mean, const View& var, const OptionalView& grad_input,
           const OptionalView& grad_weight, const OptionalView& grad_bias,
           const OptionalView& grad_residual, bool training, bool relu, bool channels_last,
           double eps) {
            batch_norm_act_backward(grad_out, input, out, weight, mean, var, grad_input,
                                    grad_weight, grad_bias, grad_residual,
                                    {training, relu, channels_last, eps});
        },
        py::call_guard<Unlocked>());
}

}  // namespace bigops
