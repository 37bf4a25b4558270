// The module of the CUDA C++ kernels. It can be imported without a GPU: the CUDA runtime is linked
// statically and finds the driver when it is first asked.
#include "cuda_module.h"

#include <pybind11/stl.h>

#include <optional>

namespace py = pybind11;

namespace bigops {
namespace {

std::string version(int number) {
    return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

// Why no kernel of this module can run here; None if they can.
std::optional<std::string> why_not() {
    int driver = 0, runtime = 0, devices = 0;
    cudaRuntimeGetVersion(&runtime);
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no CUDA driver";
    if (driver < runtime)
        return "the driver knows CUDA " + version(driver) + ", the kernels were built with " +
               version(runtime);
    if (const cudaError_t error = cudaGetDeviceCount(&devices); error != cudaSuccess)
        return std::string("no CUDA device: ") + cudaGetErrorString(error);
    if (devices == 0) return "no CUDA device";
    return std::nullopt;
}

}  // namespace
}  // namespace bigops

PYBIND11_MODULE(_native_cuda, m) {
    m.doc() = "bigops CUDA C++ kernels";
    m.def("why_not", &bigops::why_not);
    bigops::bind_cuda_attention(m);
    bigops::bind_cuda_adam(m);
    bigops::bind_cuda_sgd(m);
}
