"""What both convolution ops share of the native backend: products that are not of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import native
from . import conv2d_winograd as winograd
from .conv2d_arguments import memory_format
from .conv2d_choice import WIDENED, few_taps
from .conv2d_few_pixels import few_pixels, weight_gradient

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ATEN = {
    "aten::convolution": "oneDNN's convolution, near the processor's limit where products "
    "dominate; on a GPU cuDNN's",
    "aten::convolution_backward": "the same for the products of the gradients",
    "aten::to": "to float32 and back where oneDNN has no products of the dtype",
    "aten::copy_": "to the strides of the layout, which oneDNN does not always take or give",
    "aten::mm": "the weight's gradient in 16 bits where the output has few pixels",
    "aten::constant_pad_nd": "the windows for that product",
    "aten::unfold": "the same",
    "aten::clone": "a residual's gradient, where no activation changes it",
}


def inside(input: Tensor, weight: Tensor, groups: int) -> torch.memory_format:
    """The layout in which oneDNN is given a convolution: the call's, but channels_last for groups
    with few taps.

    These gain 1.2 to 1.5 times from it. Others do not gain what it takes to turn the input and its
    gradient around, and in float32 lose digits: there oneDNN adds up all taps of all channels in
    one running sum, with errors up to 7 times those in planes.
    """
    if groups > 1 and few_taps(weight):
        return torch.channels_last
    return memory_format(input, weight)


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: torch.memory_format,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool = False,
) -> tuple[Tensor, bool]:
    """The convolution, and whether it is rectified already: if `relu`, by Winograd's products.

    Others are torch's in `layout`, in float32 where the dtype has no fast one.
    """
    dtype = input.dtype
    if winograd.serves(input, weight, stride, padding, dilation, groups):
        out = winograd.convolution(input, weight, bias, padding, relu)
        if out is not None:
            return out, relu
    weight = laid_out(weight, layout)  # torch misreads some other strides
    if groups > 1 and layout is torch.channels_last:
        input = laid_out(input, layout)
    if dtype in WIDENED:
        input, weight = input.float(), weight.float()
        bias = None if bias is None else bias.float()
    out = torch.convolution(input, weight, bias, stride, padding, dilation, False, [0, 0], groups)
    return _as(dtype, out), False


def _as(dtype: torch.dtype, t: Tensor) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)


def laid_out(t: Tensor, layout: torch.memory_format) -> Tensor:
    """`t` with the strides that a new tensor of `layout` has; a copy only if they differ."""
    if is_laid_out(t, layout):
        return t
    return torch.empty_like(t, memory_format=layout).copy_(t)


def is_laid_out(t: Tensor, layout: torch.memory_format) -> bool:
    """Whether `t` has the strides that a new tensor of `layout` has."""
    _, channels, height, width = t.shape
    if layout == torch.channels_last:
        return t.stride() == (height * width * channels, 1, width * channels, channels)
    return t.stride() == (channels * height * width, height * width, width, 1)


def convolution_gradients(
    grad_conv: Tensor,
    input: Tensor,
    weight: Tensor,
    needs: Sequence[bool],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias, laid out as the output is: Winograd's or torch's."""
    found: list[Tensor | None] = [None, None]
    if winograd.serves(input, weight, stride, padding, dilation, groups):
        found = list(winograd.gradients(grad_conv, input, weight, padding, needs))
        needs = [wanted and got is None for wanted, got in zip(needs, (*found, None), strict=True)]
    if not any(needs):
        return found[0], found[1], None
    layout, dtype = inside(input, weight, groups), input.dtype
    if needs[1] and dilation[0] > 1 and dtype in (torch.bfloat16, torch.float16):
        # In channels_last oneDNN's gradient of the weight is wrong.
        layout = torch.contiguous_format
    outside = memory_format(input, weight)
    if layout is not outside:
        input, grad_conv = laid_out(input, layout), laid_out(grad_conv, layout)
    weight = laid_out(weight, layout)
    if dtype in WIDENED:
        grad_conv, input, weight = grad_conv.float(), input.float(), weight.float()
    few = needs[1] and groups == 1 and few_pixels(grad_conv, layout, dilation)
    grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward.default(
        grad_conv, input, weight, weight.shape[:1], stride, padding, dilation, False, [0, 0],
        groups, [needs[0], needs[1] and not few, needs[2]],
    )  # fmt: skip
    if few:
        grad_weight = weight_gradient(grad_conv, input, weight, stride, padding, dilation)
    return (
        laid_out(_as(dtype, grad_input), outside) if needs[0] else found[0],
        laid_out(_as(dtype, grad_weight), outside) if needs[1] else found[1],
        _as(dtype, grad_bias) if needs[2] else None,
    )


def native_why_not(input: Tensor, weight: Tensor, *rest: Any) -> str | None:
    """None when the native kernels serve the call, else the reason."""
    if input.dtype not in NATIVE_DTYPES:
        return f"dtype {input.dtype}"
    return native.why_not()
