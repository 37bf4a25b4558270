"""What both convolution ops share of the native backend: products that are not of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import native
from . import conv2d_winograd as winograd
from .conv2d_arguments import conv_sizes, memory_format, out_size
from .conv2d_few_pixels import few_pixels, weight_gradient

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEPTHWISE_PIXELS = 100  # of a plane: below, what a plane costs besides its pixels is too much
DIRECT_TAPS = 64  # below: too few products per output for oneDNN to be worth its ways
MOST_PADDED = 1.75  # times the products; beyond, our kernels' lower rate is made up for
POINTWISE_WEIGHT = 2**19  # beyond, each thread's sum of its gradient leaves the cache
POINTWISE_PIXELS = 128  # for each thread, whose tiles have 64
ATEN = {
    "aten::convolution": "oneDNN's convolution, near the processor's limit where products "
    "dominate; on a GPU cuDNN's",
    "aten::convolution_backward": "the same for the products of the gradients",
    "aten::to": "to float32 and back where oneDNN has no products of the dtype",
    "aten::copy_": "to the strides of the layout, which oneDNN does not always take or give",
    "aten::mm": "the weight's gradient where the output has few pixels",
    "aten::constant_pad_nd": "the windows for that product",
    "aten::unfold": "the same",
    "aten::clone": "a residual's gradient, where no activation changes it",
}
WIDENED = winograd.WIDENED


def fits_native(input: Tensor, weight: Tensor) -> bool:
    """Whether our own kernels can address one image and all filters."""
    _, channels, height, width = input.shape
    filters, group_channels, kernel_h, kernel_w = weight.shape
    return (
        channels * height * width * kernel_h * kernel_w < 2**31
        and filters * group_channels * kernel_h * kernel_w < 2**29
    )


def whole(
    input: Tensor,
    weight: Tensor,
    groups: int,
    layout: torch.memory_format,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> str | None:
    """Which of our kernels that do all of a convolution serves a call: "depthwise_planes",
    "depthwise_pixels", "pointwise" or none."""
    if not fits_native(input, weight):
        return None
    last = layout is torch.channels_last
    if weight.shape[1] == 1 and groups > 1:
        if last:
            return "depthwise_pixels" if weight.shape[0] == groups else None
        return "depthwise_planes" if input.shape[2] * input.shape[3] >= DEPTHWISE_PIXELS else None
    if weight.shape[2:] != (1, 1) or groups > 1 or padding != [0, 0]:
        return None
    return "pointwise" if _pointwise(input, weight, last, stride, padding, dilation) else None


def _pointwise(input: Tensor, weight: Tensor, last: bool, *sizes: list[int]) -> bool:
    """Whether our products of a pixel's channels are faster than oneDNN's and the passes around."""
    if input.dtype == torch.float64:
        return True
    if input.dtype == torch.bfloat16 and input.dtype not in WIDENED:
        return False
    rows, columns = conv_sizes(input, weight, *sizes)
    pixels = rows * columns
    few = input.shape[0] * pixels < POINTWISE_PIXELS * torch.get_num_threads()
    if few or weight.numel() > POINTWISE_WEIGHT:
        return False
    # An image's last pixels fill a block of 48, or in planes lanes of 16, only in part.
    return pixels >= 32 if last else -pixels % 16 <= 0.15 * pixels


def few_taps(weight: Tensor) -> bool:
    """Whether a filter is too small for oneDNN to be worth its ways."""
    return weight.numel() <= DIRECT_TAPS * weight.shape[0]


def pads_channels(input: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's padding makes our kernels the faster ones.

    In float32 it computes planes in blocks of 16 channels by 16 filters; only a first layer's few
    channels it takes as they are.
    """
    filters, channels = weight.shape[:2]
    padded = -(-filters // 16) * -(-channels // 16) * 256
    return (
        input.dtype == torch.float32 and channels > 3 and padded > MOST_PADDED * filters * channels
    )


def onednn_fails(
    input: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> bool:
    """Whether oneDNN computes nonsense, or crashes: all of it seen with PyTorch 2.13.

    Wrong are the output if it has a single column at a stride above 1, of half types and of one
    channel; and, of half types, the weight's gradient where an image is narrower than the stride,
    and where windows share no row but neighbour columns, and no padding is beside the image. With
    half types it crashes where a kernel of one pixel is dilated, where no window meets the image,
    and where it `overruns`.
    """
    half = input.dtype in (torch.bfloat16, torch.float16)
    wide = stride[1] > 1 and (half or (input.dtype == torch.float32 and input.shape[1] == 1))
    if wide and conv_sizes(input, weight, stride, padding, dilation)[1] == 1:
        return True
    if not half:
        return False
    if input.shape[3] < stride[1]:
        return True
    rows, columns = weight.shape[2:]
    apart = stride[0] > dilation[0] * (rows - 1) and stride[0] > 1
    if apart and columns > 1 and stride[1] == 1 and padding[1] == 0:
        return True
    axes = zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return overruns((rows, columns), stride, padding) or any(
        (k == 1 and d > 1) or misses(size, k, s, p, d) for size, k, s, p, d in axes
    )


def overruns(kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether oneDNN's bfloat16 forward, on AMX, writes past its memory."""
    return stride[0] > kernel[0] and padding[1] >= kernel[1]


def misses(size: int, kernel: int, stride: int, padding: int, dilation: int) -> bool:
    """Whether no window has a tap inside an image of `size` pixels along an axis."""
    if size >= dilation and padding <= dilation * (kernel - 1):
        return False
    places = range(out_size(size, kernel, stride, padding, dilation))
    return not any(
        0 <= place * stride - padding + tap * dilation < size
        for place in places
        for tap in range(kernel)
    )


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
    one_product = needs[1] and groups == 1 and few_pixels(grad_conv, layout, dilation)
    grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward.default(
        grad_conv, input, weight, weight.shape[:1], stride, padding, dilation, False, [0, 0],
        groups, [needs[0], needs[1] and not one_product, needs[2]],
    )  # fmt: skip
    if one_product:
        grad_weight = weight_gradient(grad_conv, input, weight, stride, padding)
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
