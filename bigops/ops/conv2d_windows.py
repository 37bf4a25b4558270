"""The weight's gradient by products of windows (csrc/cpu/conv2d_windows.h), for convolutions whose
other products are not theirs."""

from __future__ import annotations

from torch import Tensor

from ..backends import native
from .activation import NUMBERS


def grad_weight(
    grad_conv: Tensor,
    input: Tensor,
    weight: Tensor,
    out: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """Written to `out`, of a convolution in one group."""
    native.kernels.conv2d_windows_backward(
        grad_conv, input, weight, None, None, out, None, None, stride, padding, dilation, 1,
        NUMBERS["none"],
    )  # fmt: skip
    return out
