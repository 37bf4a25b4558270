// Adam over lists of tensors, the norm that clips gradients, and how an optimizer's tensors are found.
#include "../cpu/adam.h"

#include <pybind11/stl.h>

#include <cmath>
#include <optional>

#include "cpu_lists.h"

namespace py = pybind11;

namespace bigops {
namespace {

using OptionalList = std::optional<py::list>;

const py::list* pointer(const OptionalList& list) { return list ? &*list : nullptr; }

void adam_lists(const py::list& params, const py::list& grads, const py::list& exp_avgs,
                const py::list& exp_avg_sqs, const py::list& max_exp_avg_sqs,
                const py::list& state_steps, double lr, double beta1, double beta2, double eps,
                double weight_decay, bool decoupled_weight_decay, bool amsgrad, bool maximize,
                const py::object& max_grad_norm, const py::object& total_norm,
                const py::object& grad_scale, const OptionalList& copies,
                const OptionalList& exp_avg_scales, const OptionalList& exp_avg_sq_scales,
                const py::object& rounding_seed) {
    StepLists lists;
    lists.roles = {&params, &grads, &exp_avgs, &exp_avg_sqs, amsgrad ? &max_exp_avg_sqs : nullptr,
                   pointer(copies)};
    lists.scales = {pointer(exp_avg_scales), pointer(exp_avg_sq_scales)};
    lists.read_seed(rounding_seed);
    require(state_steps.size() == params.size(), "lists differ in length");
    StepTensors tensors = lists.read_all();
    for (size_t i = 0; i < params.size(); ++i) {
        look_ahead(state_steps, i);
        const dlpack::Tensor step = read_any(item(state_steps, i));  // ours: a count is no view
        StepTensor& entry = tensors.tensors[i];
        entry.step = step.data;
        entry.step_dtype = dlpack::to_dtype(step.dtype);
        require(step.data && step.ndim == 0 &&
                    (entry.step_dtype == DType::f32 || entry.step_dtype == DType::f64),
                "a step is not one float32 or float64");
    }
    const AdamOptions options = {lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay,
                                 amsgrad, maximize};
    const Clipping clipping(maximize, max_grad_norm, total_norm, grad_scale);
    const Unlocked unlocked;
    adam(tensors, options, clipping.factor(tensors));
}

PyObject* attribute(PyObject* object, PyObject* name) {
    PyObject* const value = PyObject_GetAttr(object, name);
    if (!value) throw py::error_already_set();
    return value;
}

constexpr int kCpuDevice = -1, kUnknownDevice = -2;

int device_number(py::handle tensor) {
    static PyObject* const cpu_name = PyUnicode_InternFromString("is_cpu");
    static PyObject* const cuda_name = PyUnicode_InternFromString("is_cuda");
    static PyObject* const number_name = PyUnicode_InternFromString("get_device");
    const auto cpu = py::reinterpret_steal<py::object>(attribute(tensor.ptr(), cpu_name));
    if (cpu.ptr() == Py_True) return kCpuDevice;
    const auto cuda = py::reinterpret_steal<py::object>(attribute(tensor.ptr(), cuda_name));
    if (cuda.ptr() != Py_True) return kUnknownDevice;
    const auto number =
        py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), number_name));
    if (!number) throw py::error_already_set();
    return number.cast<int>();
}

// The parameters of a group that have a gradient, their gradients, and each state by name; None
// where the optimizer has more to do than to look them up: a state that is not there yet, a
// gradient that is sparse, a tensor that is complex, parameters on several devices.
py::object collect(const py::list& group, const py::dict& state, const py::tuple& names) {
    static PyObject* const grad_name = PyUnicode_InternFromString("grad");
    static PyObject* const sparse_name = PyUnicode_InternFromString("is_sparse");
    static PyObject* const dtype_name = PyUnicode_InternFromString("dtype");
    py::list params, grads;
    std::vector<py::list> states(names.size());
    PyObject* known = nullptr;  // the last dtype that was found not to be complex
    int common = kUnknownDevice;
    for (size_t i = 0; i < group.size(); ++i) {
        look_ahead(group, i);
        const py::handle param = item(group, i);
        const auto grad = py::reinterpret_steal<py::object>(attribute(param.ptr(), grad_name));
        if (grad.is_none()) continue;
        const auto sparse = py::reinterpret_steal<py::object>(attribute(grad.ptr(), sparse_name));
        const int device = device_number(param);
        if (common == kUnknownDevice) common = device;
        if (sparse.ptr() == Py_True || device == kUnknownDevice || device != common)
            return py::none();
        const auto dtype = py::reinterpret_steal<py::object>(attribute(param.ptr(), dtype_name));
        if (dtype.ptr() != known && dtype.attr("is_complex").cast<bool>()) return py::none();
        known = dtype.ptr();
        PyObject* const own =
            names.empty() ? nullptr : PyDict_GetItemWithError(state.ptr(), param.ptr());
        if (!own && PyErr_Occurred()) throw py::error_already_set();
        if (!names.empty() && (!own || !PyDict_CheckExact(own))) return py::none();
        for (size_t k = 0; k < names.size(); ++k) {
            PyObject* const value = PyDict_GetItemWithError(own, names[k].ptr());
            if (!value && PyErr_Occurred()) throw py::error_already_set();
            if (!value || value == Py_None) return py::none();
            states[k].append(py::handle(value));
        }
        params.append(param);
        grads.append(grad);
    }
    py::list lists;
    lists.append(params);
    lists.append(grads);
    for (const py::list& values : states) lists.append(values);
    return lists;
}

void grad_norm(const py::list& grads, const View& out) {
    StepTensors tensors;
    tensors.tensors.reserve(grads.size());
    for (size_t i = 0; i < grads.size(); ++i) {
        look_ahead(grads, i);
        const dlpack::Tensor view = read(item(grads, i));
        Roles roles = {};
        roles[kGrad] = &view;
        add(tensors, roles);
    }
    const Unlocked unlocked;
    const double norm = std::sqrt(squared_norm(tensors));
    if (out.dtype == DType::f64)
        *out.ptr<double>() = norm;
    else
        *out.ptr<float>() = static_cast<float>(norm);
}

}  // namespace

void bind_adam(py::module_& m) {
    m.def("adam", &adam_lists, "one Adam step over lists of tensors, in place");
    m.def("collect", &collect, py::arg("group"), py::arg("state"), py::arg("names"));
    m.def("grad_norm", &grad_norm, "2-norm of a list of tensors taken as one vector, into a tensor");
}

}  // namespace bigops
