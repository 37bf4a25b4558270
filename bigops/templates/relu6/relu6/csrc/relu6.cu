// relu6 on a GPU: a thread an element, neighbours to neighbours.
#include "relu6.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

using namespace bigops;

namespace {

constexpr int kThreads = 256;

template <class T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
__global__ void forward_kernel(const T* x, T* out, int64_t numel) {
    const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (i >= numel) return;
    using A = compute_t<T>;
    const A v = static_cast<A>(x[i]);
    out[i] = static_cast<T>(v < 0 ? A{0} : v > 6 ? A{6} : v);
}

template <class T>
__global__ void backward_kernel(const T* grad_out, const T* x, T* grad_x, int64_t numel) {
    const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (i >= numel) return;
    const auto v = static_cast<compute_t<T>>(x[i]);
    grad_x[i] = v >= 0 && v <= 6 ? grad_out[i] : static_cast<T>(0.0f);
}

// launch(T, blocks) on the device of `x`.
template <class Launch>
void with_type(const View& x, const Launch& launch) {
    require(x.dtype <= DType::f16, "relu6 takes floating tensors");
    const int64_t blocks = (x.numel() + kThreads - 1) / kThreads;
    if (blocks == 0) return;
    require(blocks <= INT32_MAX, "relu6 takes at most 2^39 elements");
    int previous = 0;
    cudaGetDevice(&previous);
    cudaSetDevice(x.device_id);
    switch (x.dtype) {
        case DType::f32: launch(float{}, static_cast<unsigned>(blocks)); break;
        case DType::f64: launch(double{}, static_cast<unsigned>(blocks)); break;
        case DType::bf16: launch(__nv_bfloat16{}, static_cast<unsigned>(blocks)); break;
        default: launch(__half{}, static_cast<unsigned>(blocks)); break;
    }
    const cudaError_t error = cudaGetLastError();
    cudaSetDevice(previous);
    require(error == cudaSuccess, cudaGetErrorString(error));
}

}  // namespace

void forward(const View& x, const View& out) {
    require(x.numel() == out.numel() && x.dtype == out.dtype, "x and out differ");
    with_type(x, [&]<class T>(T, unsigned blocks) {
        forward_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(x.stream)>>>(
            x.ptr<const T>(), out.ptr<T>(), x.numel());
    });
}

void backward(const View& grad_out, const View& x, const View& grad_x) {
    require(x.numel() == grad_x.numel() && x.dtype == grad_x.dtype, "x and grad_x differ");
    require(x.numel() == grad_out.numel() && x.dtype == grad_out.dtype, "x and grad_out differ");
    with_type(x, [&]<class T>(T, unsigned blocks) {
        backward_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(x.stream)>>>(
            grad_out.ptr<const T>(), x.ptr<const T>(), grad_x.ptr<T>(), x.numel());
    });
}
