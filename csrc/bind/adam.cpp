// Adam over lists of tensors or a group's, and the norm that clips gradients.
#include "../cpu/adam.h"

#include <pybind11/stl.h>

#include <cmath>
#include <optional>

#include "collected.h"

namespace py = pybind11;

namespace bigops {
namespace {

using OptionalList = std::optional<py::list>;

void step(StepTensors& tensors, const Collected* group, double lr, double beta1, double beta2, double eps,
          double weight_decay, bool decoupled_weight_decay, bool amsgrad, bool maximize,
          const py::object& max_grad_norm, const py::object& total_norm,
          const py::object& grad_scale, const py::object& rounding_seed) {
    const AdamOptions options = {lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay,
                                 amsgrad, maximize};
    const Clipping clipping(maximize, max_grad_norm, total_norm, grad_scale);
    set_seed(tensors, rounding_seed);
    if (group) group->increment_versions();
    const Unlocked unlocked;
    adam(tensors, options, clipping.factor(tensors));
}

void adam_lists(const py::list& params, const py::list& grads, const py::list& exp_avgs,
                const py::list& exp_avg_sqs, const py::list& max_exp_avg_sqs,
                const py::list& state_steps, const OptionalList& copies,
                const OptionalList& exp_avg_scales, const OptionalList& exp_avg_sq_scales,
                double lr, double beta1, double beta2, double eps, double weight_decay,
                bool decoupled_weight_decay, bool amsgrad, bool maximize,
                const py::object& max_grad_norm, const py::object& total_norm,
                const py::object& grad_scale, const py::object& rounding_seed) {
    StepLists lists;
    lists.roles = {&params, &grads, &exp_avgs, &exp_avg_sqs, amsgrad ? &max_exp_avg_sqs : nullptr,
                   pointer(copies)};
    lists.scales = {pointer(exp_avg_scales), pointer(exp_avg_sq_scales)};
    lists.steps = &state_steps;
    StepTensors tensors = lists.read_all();
    step(tensors, nullptr, lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay, amsgrad, maximize,
         max_grad_norm, total_norm, grad_scale, rounding_seed);
}

void write_norm(const StepTensors& tensors, const View& out) {
    const Unlocked unlocked;
    const double norm = std::sqrt(squared_norm(tensors));
    if (out.dtype == DType::f64)
        *out.ptr<double>() = norm;
    else
        *out.ptr<float>() = static_cast<float>(norm);
}

void grad_norm(const py::list& grads, const View& out) {
    StepTensors tensors;
    tensors.tensors.reserve(grads.size());
    for (size_t i = 0; i < grads.size(); ++i) {
        look_ahead(grads, i);
        add_gradient(tensors, item(grads, i));
    }
    write_norm(tensors, out);
}

void adam_group(Collected& group, double lr, double beta1, double beta2, double eps,
                double weight_decay, bool decoupled_weight_decay, bool amsgrad, bool maximize,
                const py::object& max_grad_norm, const py::object& total_norm,
                const py::object& grad_scale, const py::object& rounding_seed) {
    require(group.on_cpu && group.states() == (amsgrad ? 3 : 2), "a group has not what Adam wants");
    step(group.tensors, &group, lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay, amsgrad,
         maximize, max_grad_norm, total_norm, grad_scale, rounding_seed);
}

// Of all groups together; the same bits as of their gradients in one list.
void norm_of_groups(const std::vector<Collected*>& groups, const View& out) {
    StepTensors tensors;
    for (const Collected* group : groups) group->add_gradients(tensors);
    write_norm(tensors, out);
}

}  // namespace

void bind_adam(py::module_& m) {
    m.def("adam", &adam_group, "one Adam step over what `collect` found, in place");
    m.def("adam", &adam_lists, "one Adam step over lists of tensors, in place");
    m.def("grad_norm", &norm_of_groups, "2-norm of all gradients that `collect` found, into a tensor");
    m.def("grad_norm", &grad_norm, "the same of a list of tensors");
}

}  // namespace bigops
