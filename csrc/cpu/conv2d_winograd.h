// 3x3 convolutions of stride 1 with 16 products where 36 are usual, for each 2x2 outputs of a
// channel and a filter: F(2x2, 3x3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural
// Networks" (2016), after Winograd. A tile's 4x4 pixels (or 2x2 gradients) become 16 numbers, whose
// products are plain matrix products over the channels; the transforms only add, subtract and halve.
//
// An output's rounding error is relative to the largest number of its tile, which reaches one pixel
// beyond the output's own window; sums are 9 times shorter than direct ones. Where a tile holds an
// infinity or a NaN, outputs that do not see it may get one: such calls are told, and are to be done
// directly.
#pragma once

#include "conv2d.h"

namespace bigops {

// out = conv2d(input, weight, bias), rectified if `relu`. Where `transposed`, the gradient of such a
// convolution's input: `input` is the output's gradient and `padding` still the convolution's.
// With `index`, out = max_pool2d(relu(conv2d), 2) and index as conv2d.h says, for each whole window.
// Returns whether all of the convolution is finite.
bool conv2d_winograd(const View& input, const View& weight, const OptionalView& bias,
                     const View& out, const OptionalView& index, Size2 padding, bool relu,
                     bool transposed);

// The gradient of weight: grad_weight = sum over pixels of input * grad_out. Returns the same.
bool conv2d_winograd_weight(const View& grad_out, const View& input, const View& grad_weight,
                            Size2 padding);

}  // namespace bigops
