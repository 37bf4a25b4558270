"""Which of the native kernels serves a convolution on the CPU: decided once for all calls alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import native
from . import conv2d_winograd as winograd
from .conv2d_arguments import conv_sizes, memory_format, out_size
from .registration import PLAIN

WIDENED = winograd.WIDENED
TINY = 2**18  # below this product of sizes oneDNN's calls take longer than our arithmetic
DEPTHWISE_PIXELS = 100  # of a plane: below, what a plane costs besides its pixels is too much
DIRECT_TAPS = 64  # below: too few products per output for oneDNN to be worth its ways
MOST_PADDED = 1.75  # times the products; beyond, our kernels' lower rate is made up for
POINTWISE_WEIGHT = 2**19  # beyond, each thread's sum of its gradient leaves the cache
POINTWISE_PIXELS = 128  # for each thread, whose tiles have 64
FIRST_CHANNELS = 16  # below, a layer counts as a first one
WINDOW_PIXELS = 32  # of an image, for which all of the weight is read
MOST = 1024  # choices kept; shapes that never return must not fill the memory


class Choice(NamedTuple):
    """What serves forward, backward without the input's gradient, and backward with it.

    Each is the name of kernels that do all of it ("depthwise_planes", "depthwise_pixels",
    "pointwise", "windows"), "direct" for our direct kernels, or None: oneDNN (or Winograd's
    products) between passes of ours. layout is that of output and gradients.
    """

    layout: torch.memory_format
    forward: str | None
    weight: str | None
    backward: str | None


_kept: dict[tuple[object, ...], Choice] = {}


def choose(
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Choice:
    """Of a convolution on the CPU."""
    found = None if native.kernels is None else native.kernels.signature((input, weight), (), PLAIN)
    if found is None:
        return _choose(input, weight, stride, padding, dilation, groups)
    key = (found, *stride, *padding, *dilation, groups, torch.get_num_threads())
    if (choice := _kept.get(key)) is None:
        if len(_kept) >= MOST:
            _kept.clear()
        choice = _kept[key] = _choose(input, weight, stride, padding, dilation, groups)
    return choice


def _choose(
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Choice:
    layout, sizes = memory_format(input, weight), (stride, padding, dilation)
    if whole := _whole(input, weight, groups, layout, *sizes):
        return Choice(layout, whole, whole, whole)
    direct = "direct" if _direct(input, weight, groups, layout, *sizes) else None
    if input.dtype in WIDENED or _only_ours(input, weight, *sizes):
        return Choice(layout, direct, direct, direct)
    first = groups == 1 and weight.shape[1] < FIRST_CHANNELS and _windows(input, weight, *sizes)
    windows = "windows" if first else None
    return Choice(layout, direct or windows, windows, None)


def _whole(
    input: Tensor,
    weight: Tensor,
    groups: int,
    layout: torch.memory_format,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> str | None:
    if not fits_native(input, weight):
        return None
    last = layout is torch.channels_last
    if weight.shape[1] == 1 and groups > 1:
        if last:
            return "depthwise_pixels" if weight.shape[0] == groups else None
        return "depthwise_planes" if input.shape[2] * input.shape[3] >= DEPTHWISE_PIXELS else None
    if groups > 1:
        return None
    pixel = weight.shape[2:] == (1, 1) and padding == [0, 0]
    if pixel and _pointwise(input, weight, last, stride, padding, dilation):
        return "pointwise"
    worth = pixel or stride != [1, 1]
    if not worth and not last and pads_channels(input, weight):
        worth = not winograd.serves(input, weight, stride, padding, dilation, groups)
    return "windows" if worth and _windows(input, weight, stride, padding, dilation) else None


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


def _windows(input: Tensor, weight: Tensor, *sizes: list[int]) -> bool:
    """Whether products of windows are faster than oneDNN's and the passes around."""
    if input.dtype != torch.float32 and input.dtype not in WIDENED:
        return False
    rows, columns = conv_sizes(input, weight, *sizes)
    return rows * columns >= WINDOW_PIXELS and input.numel() * weight.numel() >= TINY


def _only_ours(input: Tensor, weight: Tensor, *sizes: list[int]) -> bool:
    """Whether oneDNN fails at a call, or takes longer to be called than we to compute."""
    return (
        input.dtype == torch.float64
        or input.numel() * weight.numel() < TINY
        or (fits_native(input, weight) and onednn_fails(input, weight, *sizes))
    )


def _direct(
    input: Tensor,
    weight: Tensor,
    groups: int,
    layout: torch.memory_format,
    stride: list[int],
    *sizes: list[int],
) -> bool:
    """Whether our direct kernels do better than oneDNN's and a pass over their output."""
    if _only_ours(input, weight, stride, *sizes):
        return True
    if weight.shape[0] <= 8 * groups or not fits_native(input, weight):
        return False
    if input.dtype in WIDENED:
        return few_taps(weight)
    planes = input.shape[1] == 1 or layout is not torch.channels_last
    return planes and stride == [1, 1] and few_taps(weight)


def fits_native(input: Tensor, weight: Tensor) -> bool:
    """Whether our own kernels can address one image and all filters."""
    _, channels, height, width = input.shape
    filters, group_channels, kernel_h, kernel_w = weight.shape
    return (
        channels * height * width * kernel_h * kernel_w < 2**31
        and filters * group_channels * kernel_h * kernel_w < 2**29
    )


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
