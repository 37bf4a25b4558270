// torch.Tensor -> bigops::View through the DLPack C exchange API that the tensor's type carries
// (DLPack 1.2, "DLPackExchangeAPI"; torch 2.11 on): no allocation, no torch header, no ABI to break.
// The structs below restate that ABI.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "../view.h"

namespace bigops::dlpack {

struct Device {
    int32_t type;
    int32_t id;
};
struct DataType {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
};
struct Tensor {
    void* data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};
struct ExchangeApi {
    uint32_t major;
    uint32_t minor;
    ExchangeApi* previous;
    void* allocator;
    void* managed_from_object;
    void* managed_to_object;
    int (*tensor_from_object)(void* object, Tensor* out);
    int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

constexpr uint32_t kMajorVersion = 1;
constexpr int kCpu = 1;

inline const ExchangeApi* find_api(PyTypeObject* type) {
    // Few types ever appear here (Tensor, Parameter), so a short list beats a map.
    static std::vector<std::pair<PyTypeObject*, const ExchangeApi*>> known;
    for (const auto& [known_type, api] : known)
        if (known_type == type) return api;
    auto capsule = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttrString(
        reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__"));
    if (!capsule) {
        PyErr_Clear();
        throw pybind11::type_error(std::string("expected a torch.Tensor, got ") + type->tp_name);
    }
    const auto* api = static_cast<const ExchangeApi*>(
        PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!api) throw pybind11::error_already_set();
    while (api && api->major != kMajorVersion) api = api->previous;
    if (!api || !api->tensor_from_object)
        throw pybind11::type_error("this torch's DLPack exchange API has no version 1 table");
    Py_INCREF(type);
    known.emplace_back(type, api);
    return api;
}

inline DType to_dtype(DataType dtype) {
    enum : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };
    if (dtype.lanes == 1) {
        switch (dtype.code << 8 | dtype.bits) {
            case kFloat << 8 | 64: return DType::f64;
            case kFloat << 8 | 32: return DType::f32;
            case kFloat << 8 | 16: return DType::f16;
            case kBfloat << 8 | 16: return DType::bf16;
            case kInt << 8 | 64: return DType::i64;
            case kInt << 8 | 32: return DType::i32;
            case kUInt << 8 | 8: return DType::u8;
            case kBool << 8 | 8: return DType::boolean;
            default: break;
        }
    }
    throw pybind11::type_error("native kernels take no tensor of this dtype (DLPack code " +
                               std::to_string(dtype.code) + ", " + std::to_string(dtype.bits) +
                               " bits)");
}

// The exchange API hands out a negative view as if it were none.
inline bool is_negative(pybind11::handle tensor) {
    static PyObject* const is_neg =
        pybind11::object(pybind11::module_::import("torch").attr("Tensor").attr("is_neg"))
            .release()
            .ptr();
    const auto negative =
        pybind11::reinterpret_steal<pybind11::object>(PyObject_CallOneArg(is_neg, tensor.ptr()));
    if (!negative) throw pybind11::error_already_set();
    return negative.ptr() == Py_True;
}

inline View to_view(pybind11::handle object) {
    const ExchangeApi* api = find_api(Py_TYPE(object.ptr()));
    Tensor tensor;
    if (api->tensor_from_object(object.ptr(), &tensor) != 0) throw pybind11::error_already_set();
    if (tensor.ndim > kMaxDims)
        throw pybind11::value_error("native kernels take at most 8 dimensions, got " +
                                    std::to_string(tensor.ndim));
    View view;
    view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    view.ndim = tensor.ndim;
    view.dtype = to_dtype(tensor.dtype);
    view.device_type = tensor.device.type;
    view.device_id = tensor.device.id;
    for (int i = 0; i < tensor.ndim; ++i) {
        view.shape[i] = tensor.shape[i];
        view.strides[i] = tensor.strides[i];
    }
    // The exchange API lets a FakeTensor through, which has no memory.
    if (!tensor.data && view.numel() != 0)
        throw pybind11::value_error("a tensor without memory (fake or meta) reached a native kernel");
    if (is_negative(object))
        throw pybind11::value_error("a negative view reached a native kernel; call resolve_neg()");
    if (view.device_type != kCpu &&
        api->current_stream(view.device_type, view.device_id, &view.stream) != 0)
        throw pybind11::error_already_set();
    return view;
}

}  // namespace bigops::dlpack

namespace bigops {

template <class T>
const T* pointer(const std::optional<T>& value) {
    return value ? &*value : nullptr;
}

}  // namespace bigops

namespace pybind11::detail {

template <>
struct type_caster<bigops::View> {
    PYBIND11_TYPE_CASTER(bigops::View, const_name("torch.Tensor"));
    bool load(handle source, bool) {
        if (source.is_none()) return false;
        value = bigops::dlpack::to_view(source);
        return true;
    }
};

}  // namespace pybind11::detail
