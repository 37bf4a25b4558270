// 2-d max-pooling on the CPU. bigops/ops/max_pool2d.py says what is computed.
#pragma once

#include "conv2d.h"

namespace bigops {

struct MaxPool2dParams {
    Size2 kernel, stride, padding, dilation;
};

// A window's byte where none of its places is in the image. Places are below it.
constexpr uint8_t kNowhere = 255;

// out (N, C, H', W') of input (N, C, H, W), and the winners' places kh*KW+kw within their windows.
// out and index are both contiguous or both channels_last; input may lie anyhow.
void max_pool2d_forward(const View& input, const View& out, const View& index,
                        const MaxPool2dParams& params);

// grad_input lies as out and index did; grad_out may lie anyhow.
void max_pool2d_backward(const View& grad_out, const View& index, const View& grad_input,
                         const MaxPool2dParams& params);

}  // namespace bigops
