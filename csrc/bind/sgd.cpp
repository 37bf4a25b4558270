// Stochastic gradient descent over lists of tensors.
#include "../cpu/sgd.h"

#include <pybind11/stl.h>

#include <optional>

#include "cpu_lists.h"

namespace py = pybind11;

namespace bigops {
namespace {

using OptionalList = std::optional<py::list>;

void sgd_lists(const py::list& params, const py::list& grads, const py::list& momentum_buffers,
               double lr, double momentum, double dampening, double weight_decay, bool nesterov,
               bool maximize, bool is_first_step, const py::object& max_grad_norm,
               const py::object& total_norm, const py::object& grad_scale,
               const OptionalList& copies, const OptionalList& scales, const py::object& rounding_seed) {
    StepLists lists;
    lists.roles[kParam] = &params;
    lists.roles[kGrad] = &grads;
    if (momentum != 0) lists.roles[kFirstState] = &momentum_buffers;
    if (copies) lists.roles[kCopy] = &*copies;
    if (scales) lists.scales[0] = &*scales;
    lists.read_seed(rounding_seed);
    const StepTensors tensors = lists.read_all();
    const SgdOptions options = {lr,       momentum, dampening,    weight_decay,
                                nesterov, maximize, is_first_step};
    const Clipping clipping(maximize, max_grad_norm, total_norm, grad_scale);
    const Unlocked unlocked;
    sgd(tensors, options, clipping.factor(tensors));
}

}  // namespace

void bind_sgd(py::module_& m) {
    m.def("sgd", &sgd_lists, "one step of stochastic gradient descent over lists, in place");
}

}  // namespace bigops
