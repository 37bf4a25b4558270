// The module of one instruction set; all of them share these bindings, compiled once.
#include <string>

#include "module.h"
#include "tensor.h"

namespace py = pybind11;

namespace bigops {
namespace {

template <class T>
void append(std::string& bytes, const T* values, size_t count) {
    bytes.append(reinterpret_cast<const char*>(values), count * sizeof(T));
}

// What a decision about a call may depend on, as bytes to compare: of every tensor its shape,
// strides, dtype, device and whether it requires a gradient; of every option its type (1, 1.0 and
// True are equal, and not all of them are a stride). bigops/ops/route.py uses it.
//
// None if one of `tensors` is neither None nor of exactly one of `types`, or has no plain strides.
py::object signature(const py::tuple& tensors, const py::tuple& options, const py::tuple& types) {
    static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
    std::string bytes;
    for (py::handle object : tensors) {
        if (object.is_none()) {
            bytes.push_back('-');
            continue;
        }
        bool plain = false;
        for (py::handle type : types)
            plain = plain || reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) == type.ptr();
        if (!plain) return py::none();
        dlpack::Tensor tensor;
        const auto* api = dlpack::find_api(Py_TYPE(object.ptr()));
        if (api->tensor_from_object(object.ptr(), &tensor) != 0) {  // sparse, nested
            PyErr_Clear();
            return py::none();
        }
        const auto grad = py::reinterpret_steal<py::object>(
            PyObject_GetAttr(object.ptr(), requires_grad));
        if (!grad) throw py::error_already_set();
        bytes.push_back(grad.ptr() == Py_True ? 'g' : 't');
        append(bytes, &tensor.ndim, 1);
        append(bytes, &tensor.dtype, 1);
        append(bytes, &tensor.device, 1);
        append(bytes, tensor.shape, static_cast<size_t>(tensor.ndim));
        append(bytes, tensor.strides, static_cast<size_t>(tensor.ndim));
    }
    for (py::handle option : options) {
        const PyTypeObject* type = Py_TYPE(option.ptr());
        append(bytes, &type, 1);
    }
    return py::bytes(bytes);
}

}  // namespace
}  // namespace bigops

extern "C" PyObject* bigops_create_module(const char* name) {
    try {
        // The definition has to outlive the module; a process imports one instruction set.
        static pybind11::module_::module_def definition;
        auto m = pybind11::module_::create_extension_module(
            name, "bigops native CPU kernels for one instruction set", &definition);
        bigops::bind_collected(m);  // before what takes it
        bigops::bind_attention(m);
        bigops::bind_batch_norm_act(m);
        bigops::bind_conv2d(m);
        bigops::bind_adam(m);
        bigops::bind_decode_attention(m);
        bigops::bind_max_pool2d(m);
        bigops::bind_sgd(m);
        m.def("signature", &bigops::signature, pybind11::arg("tensors"), pybind11::arg("options"),
              pybind11::arg("types"));
        return m.release().ptr();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_ImportError, error.what());
        return nullptr;
    }
}
