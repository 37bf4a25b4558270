// One extension module per instruction set; the bindings themselves are compiled once.
#include <pybind11/pybind11.h>

#include "module.h"

#define BIGOPS_MODULE(name, variable) PYBIND11_MODULE(name, variable)

BIGOPS_MODULE(BIGOPS_MODULE_NAME, m) {
    m.doc() = "bigops native CPU kernels for one instruction set";
    bigops::bind_attention(m);
    bigops::bind_conv2d(m);
    bigops::bind_adam(m);
}
