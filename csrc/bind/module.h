// Every op's file in this folder adds its kernels to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace bigops {

void bind_attention(pybind11::module_& m);
void bind_conv2d(pybind11::module_& m);
void bind_adam(pybind11::module_& m);

}  // namespace bigops
