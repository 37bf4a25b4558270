// Lists of CPU tensors as the optimizers' bindings read them. A call reads each list's views anew, so
// there is nothing to go stale when gradients, parameters or states move; it checks only what would
// crash, since the precise answer to a wrong argument is bigops/ops/'s.
#pragma once

#include <cmath>
#include <optional>

#include "../cpu/codes.h"
#include "module.h"
#include "step_lists.h"
#include "tensor_memory.h"

namespace bigops {

inline constexpr const char* kMismatch = "tensors of one parameter differ in shape or dtype";

inline dlpack::Tensor read_any(pybind11::handle object) {
    dlpack::Tensor tensor;
    const auto* api = dlpack::find_api(Py_TYPE(object.ptr()));
    if (api->tensor_from_object(object.ptr(), &tensor) != 0) throw pybind11::error_already_set();
    require(tensor.device.type == dlpack::kCpu, "a tensor is not on the CPU");
    require(tensor.ndim <= kMaxDims, "a tensor has more than 8 dimensions");
    tensor.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    return tensor;
}

inline dlpack::Tensor read(pybind11::handle object) {
    require(!dlpack::is_negative(object), "a tensor is a negative view");
    return read_any(object);
}

inline int64_t elements(const dlpack::Tensor& tensor) {
    return std::accumulate(tensor.shape, tensor.shape + tensor.ndim, int64_t{1},
                           std::multiplies<int64_t>());
}

// The dtypes that a role may have beside its parameter's: states are bf16 or codes where the
// parameter is no double, a float's copy is bf16 or f16, and its gradient then the same.
inline bool fits(StepTensor& entry, int role, DType dtype) {
    if (role == kCopy) {
        entry.copy_dtype = dtype;
        return entry.dtype == DType::f32 && (dtype == DType::bf16 || dtype == DType::f16) &&
               (entry.grad_dtype == DType::f32 || entry.grad_dtype == dtype);
    }
    if (role == kParam) return true;
    if (role == kGrad) {
        entry.grad_dtype = dtype;
        return dtype == entry.dtype || entry.dtype == DType::f32;
    }
    if (role == kFirstState) entry.state_dtype = dtype;
    return dtype == entry.state_dtype &&
           (dtype == entry.dtype ||
            (entry.dtype != DType::f64 && (dtype == DType::bf16 || dtype == DType::u8)));
}

inline void add(StepTensors& list, const Roles& roles) {
    const dlpack::Tensor& first = *(roles[kParam] ? roles[kParam] : roles[kGrad]);
    StepTensor entry;
    entry.dtype = dlpack::to_dtype(first.dtype);
    require(entry.dtype <= DType::f16, "a tensor is not of floating-point numbers");
    entry.numel = elements(first);
    bool flat = true;
    for (int role = 0; role < kRoles; ++role) {
        const dlpack::Tensor* tensor = roles[role];
        if (!tensor) continue;
        require(tensor->ndim == first.ndim &&
                    std::equal(tensor->shape, tensor->shape + tensor->ndim, first.shape) &&
                    fits(entry, role, dlpack::to_dtype(tensor->dtype)),
                kMismatch);
        require(tensor->data || entry.numel == 0, "a tensor has no memory (fake or meta)");
        entry.data[role] = tensor->data;
        flat = flat && contiguous(*tensor);
    }
    require(!roles[kParam] || roles[kCopy] || entry.grad_dtype == entry.dtype, kMismatch);
    if (!flat && entry.numel > 0) {
        StepLayout layout = sorted_layout(roles, first);
        for (int role = 0; role < kRoles; ++role)
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

inline void add_gradient(StepTensors& list, pybind11::handle grad) {
    const dlpack::Tensor view = read(grad);
    Roles roles = {};
    roles[kGrad] = &view;
    add(list, roles);
}

inline double read_number(pybind11::handle object) {
    const dlpack::Tensor tensor = read_any(object);
    const DType dtype = dlpack::to_dtype(tensor.dtype);
    require(tensor.data && elements(tensor) == 1 && (dtype == DType::f32 || dtype == DType::f64),
            "a number is not one float32 or float64");
    return dtype == DType::f64 ? *static_cast<double*>(tensor.data)
                               : static_cast<double>(*static_cast<float*>(tensor.data));
}

// The objects of one parameter by role, null where there is none: what it is updated with, the scales
// of states that are codes, and its step count.
struct StepObjects {
    std::array<pybind11::handle, kRoles> roles = {};
    std::array<pybind11::handle, kMostStates> scales = {};
    pybind11::handle step;
};

inline void read_scales(StepTensor& entry, const StepObjects& objects) {
    for (size_t s = 0; s < kMostStates; ++s) {
        const bool coded = objects.roles[kFirstState + s] && entry.state_dtype == DType::u8;
        require(coded == !!objects.scales[s], "codes and their scales do not go together");
        if (!coded) continue;
        const dlpack::Tensor tensor = read_any(objects.scales[s]);
        require(dlpack::to_dtype(tensor.dtype) == DType::f32 && tensor.ndim == 1 &&
                    contiguous(tensor) &&
                    tensor.shape[0] == (entry.numel + kCodeBlock - 1) / kCodeBlock,
                "scales are not one float32 for each block of codes");
        entry.scales[s] = static_cast<float*>(tensor.data);
    }
}

inline void read_step(StepTensor& entry, pybind11::handle object) {
    const dlpack::Tensor step = read_any(object);
    entry.step = step.data;
    entry.step_dtype = dlpack::to_dtype(step.dtype);
    require(step.data && step.ndim == 0 &&
                (entry.step_dtype == DType::f32 || entry.step_dtype == DType::f64),
            "a step is not one float32 or float64");
    __builtin_prefetch(step.data, 1);
}

// One parameter more. `plain`: all objects are of exactly torch's classes.
inline void read_into(StepTensors& tensors, const StepObjects& objects, bool plain = false) {
    const TensorMemory& memory = TensorMemory::get();
    std::array<dlpack::Tensor, kRoles> views;
    Roles found = {};
    for (size_t role = 0; role < kRoles; ++role) {
        if (!objects.roles[role]) continue;
        // The states are the optimizer's own; asking whether a tensor is negated costs as much as
        // updating two hundred elements.
        const pybind11::handle object = objects.roles[role];
        const bool ask = role <= kGrad && !(plain && !memory.may_be_negative(object));
        views[role] = ask ? read(object) : read_any(object);
        found[role] = &views[role];
    }
    add(tensors, found);
    StepTensor& entry = tensors.tensors.back();
    entry.number = static_cast<int64_t>(tensors.tensors.size()) - 1;
    read_scales(entry, objects);
    if (objects.step) read_step(entry, objects.step);
}

// Of bf16 parameters that are rounded stochastically: a tensor of one int64, or None.
inline void set_seed(StepTensors& tensors, pybind11::handle object) {
    if (object.is_none()) return;
    const dlpack::Tensor tensor = read_any(object);
    require(dlpack::to_dtype(tensor.dtype) == DType::i64 && elements(tensor) == 1 && tensor.data,
            "a seed is not one int64");
    for (StepTensor& entry : tensors.tensors) {
        entry.rounded = true;
        entry.seed = static_cast<uint64_t>(*static_cast<int64_t*>(tensor.data));
    }
}

// The lists of a step as StepObjects has their items, null where there is none.
struct StepLists {
    std::array<const pybind11::list*, kRoles> roles = {};
    std::array<const pybind11::list*, kMostStates> scales = {};
    const pybind11::list* steps = nullptr;

    StepTensors read_all() const {
        const size_t count = roles[kParam]->size();
        const auto fits_in = [&](const pybind11::list* list) { return !list || list->size() == count; };
        require(std::ranges::all_of(roles, fits_in) && std::ranges::all_of(scales, fits_in) &&
                    fits_in(steps),
                "lists differ in length");
        StepTensors tensors;
        tensors.tensors.reserve(count);
        for (size_t i = 0; i < count; ++i) {
            StepObjects objects;
            const auto take = [&](const pybind11::list* list, pybind11::handle& object) {
                if (!list) return;
                look_ahead(*list, i);
                object = item(*list, i);
            };
            for (size_t role = 0; role < kRoles; ++role) take(roles[role], objects.roles[role]);
            for (size_t s = 0; s < kMostStates; ++s) take(scales[s], objects.scales[s]);
            take(steps, objects.step);
            read_into(tensors, objects);
        }
        return tensors;
    }
};

// What gradients are multiplied by, where no role but the gradient's is asked.
struct Clipping {
    bool maximize, own_norm;
    double most, length, scale;

    Clipping(bool negate, const pybind11::object& max_grad_norm, const pybind11::object& total_norm,
             const pybind11::object& grad_scale)
        : maximize(negate),
          own_norm(!max_grad_norm.is_none() && total_norm.is_none()),
          most(max_grad_norm.is_none() ? std::numeric_limits<double>::infinity()
                                       : max_grad_norm.cast<double>()),
          length(total_norm.is_none() ? 0 : read_number(total_norm)),
          scale(grad_scale.is_none() ? 1 : read_number(grad_scale)) {}

    double factor(const StepTensors& tensors) const {
        return grad_factor(most, maximize, own_norm ? std::sqrt(squared_norm(tensors)) : length,
                           scale);
    }
};

}  // namespace bigops
