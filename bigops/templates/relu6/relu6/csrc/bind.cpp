// What Python sees of the kernels. Alone in its file, since pybind11 takes the longest to compile.
#include "bind/module.h"
#include "bind/tensor.h"
#include "relu6.h"

PYBIND11_MODULE(BIGOPS_EXTENSION, m) {
    using unlocked = pybind11::call_guard<bigops::Unlocked>;
    m.def("forward", &forward, unlocked());
    m.def("backward", &backward, unlocked());
}
