// What the bindings of the CUDA kernels share.
#pragma once

#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "../view.h"

namespace bigops::cuda {

inline void check_cuda(cudaError_t error, const char* what) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// A tensor's device is the current one for as long as this lives, and nobody holds the GIL.
class OnDevice {
public:
    explicit OnDevice(const View& tensor) {
        require(tensor.device_type == 2, "tensors must be on a CUDA device");
        check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
        if (tensor.device_id != previous_)
            check_cuda(cudaSetDevice(tensor.device_id), "cudaSetDevice");
        device_ = tensor.device_id;
    }
    ~OnDevice() {
        if (device_ != previous_) cudaSetDevice(previous_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

private:
    pybind11::gil_scoped_release unlocked_;
    int previous_ = 0, device_ = 0;
};

}  // namespace bigops::cuda

namespace bigops {

void bind_cuda_attention(pybind11::module_& m);
void bind_cuda_adam(pybind11::module_& m);
void bind_cuda_sgd(pybind11::module_& m);

}  // namespace bigops
