// Lists of tensors as the optimizers' bindings read them, on the CPU and on CUDA devices.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>

#include "../cpu/step_lists.h"
#include "tensor.h"

namespace bigops {

inline pybind11::handle item(const pybind11::list& list, size_t i) {
    return PyList_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i));
}

// Thousands of tensor objects lie scattered, and a step comes when the backward pass has pushed them
// out of the caches, so those that are read soon are fetched ahead (1.5 ms become 0.85 for 5000).
// A tensor object's first field points to torch's data about it; were it anything else, lines that
// nobody wants would be fetched, and nothing worse, since a prefetch never faults.
inline void look_ahead(const pybind11::list& list, size_t i) {
    constexpr size_t kObject = 16, kFields = 8;
    if (i + kObject < list.size()) __builtin_prefetch(item(list, i + kObject).ptr());
    if (i + kFields >= list.size()) return;
    const PyObject* object = item(list, i + kFields).ptr();
    if (Py_TYPE(object)->tp_basicsize < Py_ssize_t{sizeof(PyObject) + sizeof(void*)}) return;
    const char* fields;
    std::memcpy(&fields, object + 1, sizeof fields);
    for (int line = 0; line < 4; ++line) __builtin_prefetch(fields + line * 64);
}

inline bool contiguous(const dlpack::Tensor& tensor) {
    int64_t expected = 1;
    for (int d = tensor.ndim - 1; d >= 0; --d) {
        if (tensor.shape[d] != 1 && tensor.strides[d] != expected) return false;
        expected *= tensor.shape[d];
    }
    return true;
}

using Roles = std::array<const dlpack::Tensor*, kRoles>;

// Sorted by the parameter's strides, so that tensors of one memory order, whichever it is, turn out
// to lie alike, and others are walked in the order in which most of them lie.
inline StepLayout sorted_layout(const Roles& roles, const dlpack::Tensor& first) {
    std::array<int, kMaxDims> order;
    const auto end = order.begin() + first.ndim;
    std::iota(order.begin(), end, 0);
    std::stable_sort(order.begin(), end,
                     [&](int a, int b) { return first.strides[a] > first.strides[b]; });
    StepLayout layout;
    for (auto it = order.begin(); it != end; ++it) {
        const int d = *it;
        if (first.shape[d] == 1) continue;
        for (int role = 0; role < kRoles; ++role)
            if (roles[role]) layout.strides[role][layout.ndim] = roles[role]->strides[d];
        layout.shape[layout.ndim++] = first.shape[d];
    }
    return layout;
}

inline bool dense_and_alike(const StepLayout& layout, const Roles& roles) {
    int64_t expected = 1;
    for (int d = layout.ndim - 1; d >= 0; --d) {
        for (int role = 0; role < kRoles; ++role)
            if (roles[role] && layout.strides[role][d] != expected) return false;
        expected *= layout.shape[d];
    }
    return true;
}

}  // namespace bigops
