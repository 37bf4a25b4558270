"""Convolution, bias, ReLU and max-pooling, each by torch's own function."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import max_pool2d

from .conv2d_act import conv2d_act


def conv2d_relu_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    pool_kernel: list[int],
    pool_stride: list[int],
    pool_padding: list[int],
) -> Tensor:
    """max_pool2d(relu(conv2d(input, weight, bias)))."""
    out = conv2d_act(input, weight, bias, None, stride, padding, dilation, groups, "relu")
    return max_pool2d(out, pool_kernel, pool_stride, pool_padding)
