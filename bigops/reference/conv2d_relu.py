"""Convolution, bias and ReLU, each by torch's own function."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import conv2d, relu


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """relu(conv2d(input, weight, bias))."""
    return relu(conv2d(input, weight, bias, stride, padding, dilation, groups))
