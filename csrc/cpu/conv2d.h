// 2-d convolution + ReLU (+ max-pooling) on the CPU. A convolution without pooling is pooled by
// 1x1 windows here, so that every kernel exists once; its index is then absent, and its backward
// pass is given `out` in place of it.
#pragma once

#include <array>
#include <cstdint>
#include <optional>

#include "../view.h"

namespace bigops {

using Size2 = std::array<int64_t, 2>;  // (height, width)
using OptionalView = std::optional<View>;

struct Conv2dParams {
    Size2 stride, padding, dilation;
    int64_t groups;
};
struct Pool2dParams {
    Size2 kernel, stride, padding;
    bool relu = true;  // before the windows; only 1x1 windows can do without
};
constexpr Pool2dParams kNoPool = {.kernel = {1, 1}, .stride = {1, 1}, .padding = {0, 0}};

// A window's byte when ReLU makes its maximum 0: no gradient passes. Places are below it.
constexpr uint8_t kBlocked = 255;

// out = max_pool2d(relu(conv2d(input))), index = the winner's place kh*KW+kw within its window, or
// kBlocked: all that the backward pass needs of the output.
void conv2d_relu_pool_forward(const View& input, const View& weight, const OptionalView& bias,
                              const View& out, const OptionalView& index,
                              const Conv2dParams& conv, const Pool2dParams& pool);

// Gradients of the above; those not wanted are absent. `saved` is index, or out without pooling, or
// absent where there is neither pooling nor ReLU.
void conv2d_relu_pool_backward(const View& grad_out, const View& input, const View& weight,
                               const OptionalView& saved, const OptionalView& grad_input,
                               const OptionalView& grad_weight, const OptionalView& grad_bias,
                               const Conv2dParams& conv, const Pool2dParams& pool);

// The same around somebody else's convolution: ReLU + pooling of its output in one reading, and
// the gradient of its output (and of its bias) in one writing.
void relu_pool_forward(const View& conv_out, const View& out, const OptionalView& index,
                       const Pool2dParams& pool);
void relu_pool_backward(const View& grad_out, const View& index, const View& grad_conv,
                        const OptionalView& grad_bias, const Pool2dParams& pool);

}  // namespace bigops
