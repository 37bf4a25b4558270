// Lists of CPU tensors as the optimizers' bindings read them. A call reads each list's views anew, so
// there is nothing to go stale when gradients, parameters or states move; it checks only what would
// crash, since the precise answer to a wrong argument is bigops/ops/'s.
#pragma once

#include <cmath>

#include "../cpu/codes.h"
#include "module.h"
#include "step_lists.h"

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

inline double read_number(pybind11::handle object) {
    const dlpack::Tensor tensor = read_any(object);
    const DType dtype = dlpack::to_dtype(tensor.dtype);
    require(tensor.data && elements(tensor) == 1 && (dtype == DType::f32 || dtype == DType::f64),
            "a number is not one float32 or float64");
    return dtype == DType::f64 ? *static_cast<double*>(tensor.data)
                               : static_cast<double>(*static_cast<float*>(tensor.data));
}

// The lists of a step by role, null where there is none, and the scales of states that are codes.
struct StepLists {
    std::array<const pybind11::list*, kRoles> roles = {};
    std::array<const pybind11::list*, kMostStates> scales = {};

    StepTensors read_all() const {
        const size_t count = roles[kParam]->size();
        const auto fits_in = [&](const pybind11::list* list) { return !list || list->size() == count; };
        require(std::ranges::all_of(roles, fits_in) && std::ranges::all_of(scales, fits_in),
                "lists differ in length");
        StepTensors tensors;
        tensors.tensors.reserve(count);
        for (size_t i = 0; i < count; ++i) {
            for (const pybind11::list* list : roles)
                if (list) look_ahead(*list, i);
            std::array<dlpack::Tensor, kRoles> views;
            Roles found = {};
            for (size_t role = 0; role < kRoles; ++role) {
                if (!roles[role]) continue;
                // The states are the optimizer's own; asking whether a tensor is negated costs as
                // much as updating a hundred elements.
                const pybind11::handle tensor = item(*roles[role], i);
                views[role] = role <= kGrad ? read(tensor) : read_any(tensor);
                found[role] = &views[role];
            }
            add(tensors, found);
            read_scales(tensors.tensors.back(), i);
        }
        return tensors;
    }

   private:
    void read_scales(StepTensor& entry, size_t i) const {
        for (size_t s = 0; s < kMostStates; ++s) {
            const bool coded = roles[kFirstState + s] && entry.state_dtype == DType::u8;
            require(coded == (scales[s] != nullptr), "codes and their scales do not go together");
            if (!coded) continue;
            const dlpack::Tensor tensor = read_any(item(*scales[s], i));
            require(dlpack::to_dtype(tensor.dtype) == DType::f32 && tensor.ndim == 1 &&
                        contiguous(tensor) &&
                        tensor.shape[0] == (entry.numel + kCodeBlock - 1) / kCodeBlock,
                    "scales are not one float32 for each block of codes");
            entry.scales[s] = static_cast<float*>(tensor.data);
        }
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
