// Stochastic gradient descent over lists of tensors or a group's.
#include "../cpu/sgd.h"

#include <pybind11/stl.h>

#include <optional>

#include "collected.h"

namespace py = pybind11;

namespace bigops {
namespace {

using OptionalList = std::optional<py::list>;

void step(StepTensors& tensors, const Collected* group, double lr, double momentum, double dampening, double weight_decay,
          bool nesterov, bool maximize, bool is_first_step, const py::object& max_grad_norm,
          const py::object& total_norm, const py::object& grad_scale,
          const py::object& rounding_seed) {
    const SgdOptions options = {lr,       momentum, dampening,    weight_decay,
                                nesterov, maximize, is_first_step};
    const Clipping clipping(maximize, max_grad_norm, total_norm, grad_scale);
    set_seed(tensors, rounding_seed);
    if (group) group->increment_versions();
    const Unlocked unlocked;
    sgd(tensors, options, clipping.factor(tensors));
}

void sgd_lists(const py::list& params, const py::list& grads, const py::list& momentum_buffers,
               const OptionalList& copies, const OptionalList& scales, double lr, double momentum,
               double dampening, double weight_decay, bool nesterov, bool maximize,
               bool is_first_step, const py::object& max_grad_norm, const py::object& total_norm,
               const py::object& grad_scale, const py::object& rounding_seed) {
    StepLists lists;
    lists.roles[kParam] = &params;
    lists.roles[kGrad] = &grads;
    if (momentum != 0) lists.roles[kFirstState] = &momentum_buffers;
    if (copies) lists.roles[kCopy] = &*copies;
    if (scales) lists.scales[0] = &*scales;
    StepTensors tensors = lists.read_all();
    step(tensors, nullptr, lr, momentum, dampening, weight_decay, nesterov, maximize, is_first_step,
         max_grad_norm, total_norm, grad_scale, rounding_seed);
}

void sgd_group(Collected& group, double lr, double momentum, double dampening, double weight_decay,
               bool nesterov, bool maximize, bool is_first_step, const py::object& max_grad_norm,
               const py::object& total_norm, const py::object& grad_scale,
               const py::object& rounding_seed) {
    require(group.on_cpu && group.states() == (momentum != 0 ? 1 : 0),
            "a group has not what SGD wants");
    step(group.tensors, &group, lr, momentum, dampening, weight_decay, nesterov, maximize, is_first_step,
         max_grad_norm, total_norm, grad_scale, rounding_seed);
}

}  // namespace

void bind_sgd(py::module_& m) {
    m.def("sgd", &sgd_group, "one step of stochastic gradient descent over what `collect` found");
    m.def("sgd", &sgd_lists, "one step of stochastic gradient descent over lists, in place");
}

}  // namespace bigops
