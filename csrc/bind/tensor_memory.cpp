#include "tensor_memory.h"

#include <unistd.h>

#include <bit>
#include <optional>

namespace py = pybind11;

namespace bigops {
namespace {

void load(const char* address) { (void)*static_cast<const volatile char*>(address); }

void load_all(const char* address, size_t size) {
    for (size_t at = 0; at < size; at += 64) load(address + at);
    load(address + size - 1);
}

// What Python says of a C++ object of torch's.
const char* address_of(py::handle object) {
    return reinterpret_cast<const char*>(object.attr("_cdata").cast<uintptr_t>());
}

// Asks the kernel, which returns an error where a load would be the end.
bool readable(const char* address, size_t size) {
    int ends[2];
    if (pipe(ends) != 0) return false;
    const bool all = write(ends[1], address, size) == static_cast<ssize_t>(size);
    close(ends[0]);
    close(ends[1]);
    return all;
}

}  // namespace

TensorMemory::TensorMemory() {
    try {
        const auto torch = py::module_::import("torch");
        find_impl(torch);
        if (!has_impl_) return;
        find_grad(torch);
        find_negative(torch);
    } catch (const py::error_already_set&) {
        // A torch that answers none of this is asked the long way.
    }
}

void TensorMemory::find_impl(const py::module_& torch) {
    const py::object tensor = torch.attr("empty")(1);
    const auto size = static_cast<size_t>(Py_TYPE(tensor.ptr())->tp_basicsize);
    has_impl_ = size >= kImpl + kWord && impl_of(tensor) == address_of(tensor) &&
                word_at(impl_of(tensor), kStorage) == address_of(tensor.attr("untyped_storage")());
}

void TensorMemory::find_grad(const py::module_& torch) {
    const py::object param = torch.attr("nn").attr("Parameter")(torch.attr("empty")(1));
    param.attr("grad") = torch.attr("empty")(1);
    const char* meta = word_at(impl_of(param), kMeta);
    const py::object grad = param.attr("grad");
    has_grad_ = meta && readable(meta, kGrad + kWord) &&
                word_at(meta, kGrad) == address_of(grad) && !word_at(impl_of(grad), kMeta) &&
                word_at(impl_of(grad), kObject) == reinterpret_cast<const char*>(grad.ptr());
}

// The one bit by which views differ of which one is negative, and nothing else.
void TensorMemory::find_negative(const py::module_& torch) {
    const py::object type = torch.attr("complex64");
    std::optional<std::pair<size_t, uint64_t>> found;
    for (size_t offset = kMeta; offset < kImplSize; offset += kWord) {
        uint64_t common = ~uint64_t{0};
        bool same = true;
        for (int numel = 1; numel < 5; ++numel) {
            const py::object tensor = torch.attr("empty")(numel, py::arg("dtype") = type);
            const py::object plain = tensor.attr("imag"), negative = tensor.attr("conj")().attr("imag");
            if (plain.attr("is_neg")().cast<bool>() || !negative.attr("is_neg")().cast<bool>()) return;
            const uint64_t set = bits_at(impl_of(negative), offset);
            const uint64_t differs = set ^ bits_at(impl_of(plain), offset);
            same = same && std::has_single_bit(differs) && (set & differs);
            common &= differs;
        }
        if (!same || !common) continue;
        if (found) return;
        found = {offset, common};
    }
    const py::object param = torch.attr("nn").attr("Parameter")(torch.attr("empty")(1));
    if (!found || (bits_at(impl_of(param), found->first) & found->second)) return;
    keys_ = found->first;
    negative_ = found->second;
}

void TensorMemory::touch(const py::handle* tensors, size_t count, With with) const {
    const auto each = [&](auto call) {
        for (size_t i = 0; i < count; ++i) call(tensors[i]);
    };
    each([](py::handle tensor) { load(reinterpret_cast<const char*>(tensor.ptr())); });
    if (!has_impl_) return;
    each([](py::handle tensor) { load_all(impl_of(tensor), kImplSize); });
    if (with == kStorages) {
        each([](py::handle tensor) {
            if (const char* storage = word_at(impl_of(tensor), kStorage))
                load_all(storage + 2 * kWord, 6 * kWord);
        });
    } else if (with == kGrads && has_grad_) {
        const auto grad_of = [](py::handle tensor) -> const char* {
            const char* meta = word_at(impl_of(tensor), kMeta);
            return meta ? word_at(meta, kGrad) : nullptr;
        };
        each([&](py::handle tensor) { if (const char* grad = grad_of(tensor)) load(grad + kObject); });
        each([&](py::handle tensor) {
            const char* grad = grad_of(tensor);
            if (const char* object = grad ? word_at(grad, kObject) : nullptr) load(object);
        });
    }
}

}  // namespace bigops
