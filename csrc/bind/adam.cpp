// Adam over lists of tensors. A call reads each list's views anew, so there is nothing to go stale
// when gradients, parameters or states move; it checks only what would crash, since the precise
// answer to a wrong argument is bigops/ops/adam.py's.
#include "adam_lists.h"

#include <cmath>

#include "module.h"

namespace py = pybind11;

namespace bigops {
namespace {

constexpr const char* kMismatch = "tensors of one parameter differ in shape or dtype";

dlpack::Tensor read_any(py::handle object) {
    dlpack::Tensor tensor;
    const auto* api = dlpack::find_api(Py_TYPE(object.ptr()));
    if (api->tensor_from_object(object.ptr(), &tensor) != 0) throw py::error_already_set();
    require(tensor.device.type == dlpack::kCpu, "a tensor is not on the CPU");
    require(tensor.ndim <= kMaxDims, "a tensor has more than 8 dimensions");
    tensor.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    return tensor;
}

dlpack::Tensor read(py::handle object) {
    require(!dlpack::is_negative(object), "a tensor is a negative view");
    return read_any(object);
}

void add(AdamTensors& list, const Roles& roles) {
    const dlpack::Tensor& first = *(roles[kParam] ? roles[kParam] : roles[kGrad]);
    AdamTensor entry;
    entry.dtype = dlpack::to_dtype(first.dtype);
    require(entry.dtype <= DType::f16, "a tensor is not of floating-point numbers");
    entry.numel = std::accumulate(first.shape, first.shape + first.ndim, int64_t{1},
                                  std::multiplies<int64_t>());
    bool flat = true;
    for (int role = 0; role < kAdamRoles; ++role) {
        const dlpack::Tensor* tensor = roles[role];
        if (!tensor) continue;
        require(tensor->ndim == first.ndim &&
                    std::equal(tensor->shape, tensor->shape + tensor->ndim, first.shape) &&
                    dlpack::to_dtype(tensor->dtype) == entry.dtype,
                kMismatch);
        require(tensor->data || entry.numel == 0, "a tensor has no memory (fake or meta)");
        entry.data[role] = tensor->data;
        flat = flat && contiguous(*tensor);
    }
    if (!flat && entry.numel > 0) {
        AdamLayout layout = sorted_layout(roles, first);
        for (int role = 0; role < kAdamRoles; ++role)
            for (int d = 0; d < layout.ndim; ++d)
                require(!roles[role] || role == kGrad || layout.strides[role][d] != 0,
                        "an expanded tensor cannot be written");
        if (!dense_and_alike(layout, roles)) {
            entry.layout = static_cast<int>(list.layouts.size());
            list.layouts.push_back(layout);
        }
    }
    list.tensors.push_back(entry);
}

double read_number(py::handle object) {
    const dlpack::Tensor tensor = read_any(object);
    const DType dtype = dlpack::to_dtype(tensor.dtype);
    const int64_t numel = std::accumulate(tensor.shape, tensor.shape + tensor.ndim, int64_t{1},
                                          std::multiplies<int64_t>());
    require(tensor.data && numel == 1 && (dtype == DType::f32 || dtype == DType::f64),
            "a number is not one float32 or float64");
    return dtype == DType::f64 ? *static_cast<double*>(tensor.data)
                               : static_cast<double>(*static_cast<float*>(tensor.data));
}

void adam_lists(const py::list& params, const py::list& grads, const py::list& exp_avgs,
                const py::list& exp_avg_sqs, const py::list& max_exp_avg_sqs,
                const py::list& state_steps, double lr, double beta1, double beta2, double eps,
                double weight_decay, bool decoupled_weight_decay, bool amsgrad, bool maximize,
                const py::object& max_grad_norm, const py::object& total_norm,
                const py::object& grad_scale) {
    const std::array<const py::list*, kAdamRoles> lists = {&params, &grads, &exp_avgs, &exp_avg_sqs,
                                                           amsgrad ? &max_exp_avg_sqs : nullptr};
    for (const py::list* list : lists)
        require(!list || list->size() == params.size(), "lists differ in length");
    require(state_steps.size() == params.size(), "lists differ in length");
    AdamTensors tensors;
    tensors.tensors.reserve(params.size());
    for (size_t i = 0; i < params.size(); ++i) {
        for (const py::list* list : lists)
            if (list) look_ahead(*list, i);
        look_ahead(state_steps, i);
        std::array<dlpack::Tensor, kAdamRoles> views;
        Roles roles = {};
        for (size_t role = 0; role < lists.size(); ++role) {
            if (!lists[role]) continue;
            // The averages are the optimizer's own; asking whether a tensor is negated costs as
            // much as updating a hundred elements.
            const py::handle tensor = item(*lists[role], i);
            views[role] = role <= kGrad ? read(tensor) : read_any(tensor);
            roles[role] = &views[role];
        }
        add(tensors, roles);
        const dlpack::Tensor step = read_any(item(state_steps, i));  // ours: a count is no view
        AdamTensor& entry = tensors.tensors.back();
        entry.step = step.data;
        entry.step_dtype = dlpack::to_dtype(step.dtype);
        require(step.data && step.ndim == 0 &&
                    (entry.step_dtype == DType::f32 || entry.step_dtype == DType::f64),
                "a step is not one float32 or float64");
    }
    AdamOptions options = {lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay, amsgrad,
                           maximize};
    if (!max_grad_norm.is_none()) options.max_grad_norm = max_grad_norm.cast<double>();
    const double scale = grad_scale.is_none() ? 1 : read_number(grad_scale);
    double length = total_norm.is_none() ? 0 : read_number(total_norm);
    const bool own_norm = !max_grad_norm.is_none() && total_norm.is_none();
    const Unlocked unlocked;
    if (own_norm) length = std::sqrt(squared_norm(tensors));
    adam(tensors, options, grad_factor(options.max_grad_norm, maximize, length, scale));
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
        PyObject* const own = PyDict_GetItemWithError(state.ptr(), param.ptr());
        if (!own && PyErr_Occurred()) throw py::error_already_set();
        if (!own || !PyDict_CheckExact(own)) return py::none();
        for (size_t k = 0; k < names.size(); ++k) {
            PyObject* const value = PyDict_GetItemWithError(own, names[k].ptr());
            if (!value) {
                if (PyErr_Occurred()) throw py::error_already_set();
                return py::none();
            }
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
    AdamTensors tensors;
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
    m.def("adam_collect", &collect, py::arg("group"), py::arg("state"), py::arg("names"));
    m.def("grad_norm", &grad_norm, "2-norm of a list of tensors taken as one vector, into a tensor");
}

}  // namespace bigops
