"""The weight's gradient of a convolution with few output pixels: one matrix product.

oneDNN's takes the sum over pixels image by image, a few products at a time: over 64 pixels of 512
channels it took up to 6 times as long in float32 and 20 times in bfloat16 as the product of the
output's gradient (P, K) and the windows (P, C KH KW), which are small as there are few. The other
two products of a convolution oneDNN does best at any size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Of a batch's output; above, the windows cost more than the product gains.
PIXELS, PIXELS_OF_16_BITS = 64, 256


def few_pixels(grad_conv: Tensor, layout: torch.memory_format, dilation: Sequence[int]) -> bool:
    """Whether `weight_gradient` does better than oneDNN; `layout` is the weight's."""
    pixels = grad_conv.numel() // grad_conv.shape[1]
    most = PIXELS if grad_conv.dtype == torch.float32 else PIXELS_OF_16_BITS
    return layout is torch.channels_last and 0 < pixels <= most and tuple(dilation) == (1, 1)


def weight_gradient(
    grad_conv: Tensor, input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """In channels_last, of a convolution in one group."""
    filters, channels, rows, columns = weight.shape
    padded = torch.constant_pad_nd(input, (padding[1], padding[1], padding[0], padding[0]))
    windows = padded.unfold(2, rows, stride[0]).unfold(3, columns, stride[1])
    windows = windows.permute(0, 2, 3, 4, 5, 1).reshape(-1, rows * columns * channels)
    grads = grad_conv.permute(0, 2, 3, 1).reshape(-1, filters)
    return torch.mm(grads.t(), windows).view(filters, rows, columns, channels).permute(0, 3, 1, 2)
