// What the convolution files share: sizes read off the views, a strided image, scratch memory.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "conv2d.h"
#include "conv2d_copy.h"
#include "vec.h"

namespace bigops {

// Everything a kernel needs to know about the sizes, named as in the maths.
struct Conv2dShape {
    int64_t batch, channels, height, width;           // of the input
    int64_t filters, group_filters, group_channels;   // of the weight
    int64_t kernel_h, kernel_w, taps;                 // taps = kernel_h * kernel_w * group_channels
    int64_t conv_h, conv_w, pool_h, pool_w;           // of the output before and after pooling

    double operations() const {  // of the forward pass
        return 2.0 * static_cast<double>(batch * filters) * static_cast<double>(conv_h * conv_w * taps);
    }
};

inline int64_t conv_size(int64_t in, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
    return (in + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1;
}

inline Conv2dShape conv2d_shape(const View& input, const View& weight, const View& out,
                                const Conv2dParams& conv, const Pool2dParams& pool) {
    require(input.ndim == 4 && weight.ndim == 4 && out.ndim == 4, "conv2d takes 4-d tensors");
    require(input.dtype == weight.dtype && input.dtype == out.dtype, "conv2d dtypes differ");
    Conv2dShape s;
    s.batch = input.shape[0], s.channels = input.shape[1];
    s.height = input.shape[2], s.width = input.shape[3];
    s.filters = weight.shape[0], s.group_channels = weight.shape[1];
    s.kernel_h = weight.shape[2], s.kernel_w = weight.shape[3];
    s.taps = s.kernel_h * s.kernel_w * s.group_channels;
    require(conv.groups > 0 && s.filters % conv.groups == 0, "groups do not divide the filters");
    require(s.channels == s.group_channels * conv.groups, "input channels do not fit the weight");
    s.group_filters = s.filters / conv.groups;
    s.conv_h = conv_size(s.height, s.kernel_h, conv.stride[0], conv.padding[0], conv.dilation[0]);
    s.conv_w = conv_size(s.width, s.kernel_w, conv.stride[1], conv.padding[1], conv.dilation[1]);
    s.pool_h = conv_size(s.conv_h, pool.kernel[0], pool.stride[0], pool.padding[0], 1);
    s.pool_w = conv_size(s.conv_w, pool.kernel[1], pool.stride[1], pool.padding[1], 1);
    require(s.conv_h > 0 && s.conv_w > 0 && s.pool_h > 0 && s.pool_w > 0, "kernel exceeds input");
    require(out.shape[0] == s.batch && out.shape[1] == s.filters && out.shape[2] == s.pool_h &&
                out.shape[3] == s.pool_w,
            "out has the wrong shape");
    require(pool.kernel[0] * pool.kernel[1] <= kBlocked, "a window's place must fit a byte");
    return s;
}

inline bool same_shape(const View& a, const View& b) {
    return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape);
}

// What a backward pass has of the output: its bytes or, without pooling, itself.
inline void require_saved(const View& saved, const View& grad_out, const Pool2dParams& pool) {
    require(saved.dtype == DType::u8 || saved.dtype == grad_out.dtype,
            "saved must be the index or the output");
    require(same_shape(saved, grad_out), "saved does not fit grad_out");
    require(saved.dtype == DType::u8 || (pool.kernel[0] == 1 && pool.kernel[1] == 1),
            "pooling needs its index");
}

// A 4-d tensor of any strides; `at` is a pixel of one channel.
template <class T>
struct Image {
    T* data;
    int64_t stride_n, stride_c, stride_h, stride_w;

    explicit Image(const View& view)
        : data(view.ptr<T>()), stride_n(view.strides[0]), stride_c(view.strides[1]),
          stride_h(view.strides[2]), stride_w(view.strides[3]) {}

    T* at(int64_t n, int64_t c, int64_t h, int64_t w) const {
        return data + n * stride_n + c * stride_c + h * stride_h + w * stride_w;
    }
};

// Fetches `count` numbers that will be read soon.
template <class T>
inline void fetch(const T* p, int64_t count) {
    asm volatile("");  // GCC drops calls of functions that do nothing but prefetch
    for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(p + i);
}

// Cache-line aligned memory of a kernel's own; not initialised.
template <class T>
class Scratch {
public:
    explicit Scratch(int64_t count) {
        const auto bytes = (static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T) + 63) / 64;
        memory_.reset(static_cast<T*>(std::aligned_alloc(64, bytes * 64)));
        if (!memory_) throw std::bad_alloc();
    }
    operator T*() { return memory_.get(); }
    T* get() { return memory_.get(); }

private:
    struct Free {
        void operator()(T* p) const { std::free(p); }
    };
    std::unique_ptr<T, Free> memory_;
};

// Calls f with a value of the dtype's storage type.
template <class F>
inline void with_float_type(DType dtype, F&& f) {
    switch (dtype) {
        case DType::f64: return f(double{});
        case DType::f32: return f(float{});
        case DType::bf16: return f(bf16{});
        case DType::f16: return f(f16{});
        default: throw std::invalid_argument("conv2d takes floating-point tensors");
    }
}

}  // namespace bigops
