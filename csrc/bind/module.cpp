// The module of one instruction set; all of them share these bindings, compiled once.
#include "module.h"

extern "C" PyObject* bigops_create_module(const char* name) {
    try {
        // The definition has to outlive the module; a process imports one instruction set.
        static pybind11::module_::module_def definition;
        auto m = pybind11::module_::create_extension_module(
            name, "bigops native CPU kernels for one instruction set", &definition);
        bigops::bind_attention(m);
        bigops::bind_conv2d(m);
        bigops::bind_adam(m);
        bigops::bind_signature(m);
        return m.release().ptr();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_ImportError, error.what());
        return nullptr;
    }
}
