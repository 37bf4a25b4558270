// Lists of CUDA tensors as the optimizers' bindings read them: views anew by each call, as
// cpu_lists.h does, and everything is checked that would crash before anything is launched.
#pragma once

#include <pybind11/stl.h>

#include <optional>

#include "../cuda/step_tensors.h"
#include "cuda_module.h"
#include "step_lists.h"

namespace bigops {

namespace py = pybind11;

inline constexpr int kCuda = 2;  // DLPack's DLDeviceType
inline constexpr const char* kMismatch = "tensors of one parameter differ in shape or dtype";

inline bool is_tensor(py::handle object) {
    PyTypeObject* const type = Py_TYPE(object.ptr());
    return py::hasattr(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
}

inline dlpack::Tensor read(py::handle object) {
    dlpack::Tensor tensor;
    const auto* api = dlpack::find_api(Py_TYPE(object.ptr()));
    if (api->tensor_from_object(object.ptr(), &tensor) != 0) throw py::error_already_set();
    require(tensor.ndim <= kMaxDims, "a tensor has more than 8 dimensions");
    tensor.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    return tensor;
}

inline int64_t numel(const dlpack::Tensor& tensor) {
    return std::accumulate(tensor.shape, tensor.shape + tensor.ndim, int64_t{1},
                           std::multiplies<int64_t>());
}

inline DType floating(const dlpack::Tensor& tensor) {
    const DType dtype = dlpack::to_dtype(tensor.dtype);
    require(dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16,
            "a tensor is not of float32, bfloat16 or float16");
    return dtype;
}

// The tensors of one parameter; false where they have gaps or lie differently.
inline bool fill(cuda::StepTensor& entry, const Roles& roles, dlpack::Device device) {
    const dlpack::Tensor& first = *(roles[kParam] ? roles[kParam] : roles[kGrad]);
    entry.numel = numel(first);
    bool flat = true;
    for (int role = 0; role < cuda::kMostRoles; ++role) {
        const dlpack::Tensor* tensor = roles[role];
        if (!tensor) continue;
        require(tensor->device.type == device.type && tensor->device.id == device.id,
                "tensors are on different devices");
        require(tensor->ndim == first.ndim &&
                    std::equal(tensor->shape, tensor->shape + tensor->ndim, first.shape) &&
                    dlpack::to_dtype(tensor->dtype) == dlpack::to_dtype(first.dtype),
                kMismatch);
        require(tensor->data || entry.numel == 0, "a tensor has no memory (fake or meta)");
        entry.data[role] = tensor->data;
        flat = flat && contiguous(*tensor);
    }
    if (flat || entry.numel == 0) return true;
    const StepLayout layout = sorted_layout(roles, first);
    for (int role = 0; role < cuda::kMostRoles; ++role)
        for (int d = 0; d < layout.ndim; ++d)
            require(!roles[role] || role == kGrad || layout.strides[role][d] != 0,
                    "an expanded tensor cannot be written");
    return dense_and_alike(layout, roles);
}

inline bool is_wide(const dlpack::Tensor& number) {
    const DType dtype = dlpack::to_dtype(number.dtype);
    require(number.data && numel(number) == 1 && (dtype == DType::f32 || dtype == DType::f64),
            "a number is not one float32 or float64");
    return dtype == DType::f64;
}

// A learning rate: a number, or a tensor of one on the tensors' device.
inline double read_rate(py::handle lr, dlpack::Device device, cuda::StepScalars& scalars) {
    if (!is_tensor(lr)) return lr.cast<double>();
    const dlpack::Tensor number = read(lr);
    require(number.device.type == device.type && number.device.id == device.id,
            "lr is on another device");
    scalars.lr = {number.data, is_wide(number)};
    return 0;
}

// A float32 on the device that the tensors are on.
inline const float* scalar(const std::optional<View>& view, dlpack::Device device) {
    if (!view) return nullptr;
    require(view->dtype == DType::f32 && view->numel() == 1 && view->device_type == device.type &&
                view->device_id == device.id,
            "total_norm, grad_scale and found_inf are one float32 each, on the tensors' device");
    return view->ptr<float>();
}

// Groups of tensors that one launch updates.
struct Kind {
    DType dtype;
    std::optional<DType> copies;

    bool operator==(const Kind&) const = default;
};
inline constexpr Kind kKinds[] = {{DType::f32, {}},
                           {DType::bf16, {}},
                           {DType::f16, {}},
                           {DType::f32, DType::bf16},
                           {DType::f32, DType::f16}};

// Whether the copy lies as the parameter, whose shape it has.
inline bool alike(const dlpack::Tensor& copy, const dlpack::Tensor& param) {
    require(copy.device.type == param.device.type && copy.device.id == param.device.id,
            "tensors are on different devices");
    require(copy.ndim == param.ndim && std::equal(copy.shape, copy.shape + copy.ndim, param.shape),
            kMismatch);
    require(copy.data || numel(copy) == 0, "a tensor has no memory (fake or meta)");
    for (int d = 0; d < copy.ndim; ++d) {
        require(copy.shape[d] <= 1 || copy.strides[d] != 0, "an expanded tensor cannot be written");
        if (copy.shape[d] > 1 && copy.strides[d] != param.strides[d]) return false;
    }
    return true;
}

inline size_t kind_index(const Kind& kind) {
    const auto* const found = std::find(std::begin(kKinds), std::end(kKinds), kind);
    require(found != std::end(kKinds), "copies are of float32, in bfloat16 or float16");
    return static_cast<size_t>(found - std::begin(kKinds));
}

// One parameter's tensors by role, and its copy if there is one; false where they have gaps or lie
// differently.
inline bool read_entry(cuda::StepTensor& entry, Kind& kind,
                       const std::array<py::handle, cuda::kMostRoles>& objects, py::handle copy,
                       dlpack::Device device) {
    std::array<dlpack::Tensor, cuda::kMostRoles> views;
    Roles roles = {};
    for (size_t role = 0; role < objects.size(); ++role) {
        if (!objects[role]) continue;
        // The states are the optimizer's own.
        require(role > kGrad || !dlpack::is_negative(objects[role]), "a tensor is a negative view");
        views[role] = read(objects[role]);
        roles[role] = &views[role];
    }
    kind = {floating(views[kParam]), {}};
    bool flat = fill(entry, roles, device);
    if (!copy) return flat;
    require(!dlpack::is_negative(copy), "a tensor is a negative view");
    const dlpack::Tensor view = read(copy);
    flat = alike(view, views[kParam]) && flat;
    kind.copies = dlpack::to_dtype(view.dtype);
    entry.copy = view.data;
    return flat;
}

}  // namespace bigops
