"""The weight's gradient of a convolution with few output pixels, which oneDNN does badly.

It takes the sum over pixels image by image, a few products at a time: over 64 pixels of 512
channels up to 14 times as long in float32 as our products of windows, and in bfloat16 12 times as
long as one matrix product of the output's gradient (P, K) and the windows (P, C KH KW), which are
small as there are few. The other two products of a convolution oneDNN does best at any size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import conv2d_windows as windows

PIXELS = 256  # of a batch's output


def few_pixels(grad_conv: Tensor, layout: torch.memory_format, dilation: Sequence[int]) -> bool:
    """Whether `weight_gradient` does better than oneDNN; `layout` is the weight's."""
    if not 0 < grad_conv.numel() <= PIXELS * grad_conv.shape[1]:
        return False
    if grad_conv.dtype == torch.float32:
        return True
    return layout is torch.channels_last and tuple(dilation) == (1, 1)


def weight_gradient(
    grad_conv: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """Of a convolution in one group, laid out as the weight."""
    if input.dtype == torch.float32:
        out = torch.empty_like(weight)
        return windows.grad_weight(grad_conv, input, weight, out, stride, padding, dilation)
    filters, channels, rows, columns = weight.shape
    padded = torch.constant_pad_nd(input, (padding[1], padding[1], padding[0], padding[0]))
    patches = padded.unfold(2, rows, stride[0]).unfold(3, columns, stride[1])
    patches = patches.permute(0, 2, 3, 4, 5, 1).reshape(-1, rows * columns * channels)
    grads = grad_conv.permute(0, 2, 3, 1).reshape(-1, filters)
    return torch.mm(grads.t(), patches).view(filters, rows, columns, channels).permute(0, 3, 1, 2)
