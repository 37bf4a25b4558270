"""When the native backend takes Winograd's products for a 3x3 convolution: 16 instead of 36.

csrc/cpu/conv2d_winograd.h says how. Wherever `serves` says so they took 0.4 to 1.0 of the time of
oneDNN's direct products in float32 (AVX2 and AVX-512), with 0.2 to 1.9 times the RMS error. Sums
are float32 for 16-bit dtypes too: oneDNN's own products of these, where it has them, are as fast
with AVX-512 and faster with AMX. Float64 is left to the kernels that the others are held against.

Beyond results it takes 16/9 of a weight's size, and of each thread a megabyte or two (64, if rows
are as long as `ROW` lets them); that is kept for the next call (csrc/cpu/kept_memory.h).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import native
from . import conv2d_windows as windows
from .conv2d_arguments import conv_sizes, empty_gradients, empty_output

# Convolved in float32 and rounded.
WIDENED = {d for d in (torch.bfloat16, torch.float16) if not native.torch_multiplies(d)}
DTYPES = {torch.float32, *WIDENED}
# With the pooling in the same pass they are faster than oneDNN's bfloat16 without AMX.
POOLED = DTYPES if "v4_amx" in native.SUPPORTED else {*DTYPES, torch.bfloat16}
CHANNELS = 16  # and filters; below, the transforms cost what the products gain
WEIGHT_CHANNELS = 32  # of the weight's gradient; below, the threads share what they transform
TILES = 32  # of a batch; below, so do the filters' transforms
ROW = 2**20  # columns times channels of a row of tiles; each thread takes 64 bytes for each


def serves(
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dtypes: set[torch.dtype] = DTYPES,
) -> bool:
    """Whether Winograd's products are taken, unless something is not finite."""
    filters, channels, *kernel = weight.shape
    if input.dtype not in dtypes or groups != 1 or kernel != [3, 3]:
        return False
    ones = all(n == 1 for n in (*stride, *dilation))
    if not ones or max(padding) > 2 or min(filters, channels) < CHANNELS:
        return False
    rows, columns = conv_sizes(input, weight, stride, padding, dilation)
    across = (columns + 1) // 2
    tiles = input.shape[0] * ((rows + 1) // 2) * across
    # An image that is a pixel high or wide leaves half of each tile unused.
    fit = min(rows, columns) > 1 and across * (channels + filters) <= ROW
    return fit and tiles >= TILES


def convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int], relu: bool = False
) -> Tensor | None:
    """Rectified if `relu`; None where not all is finite: that is to be done directly then."""
    sizes = conv_sizes(input, weight, [1, 1], padding, [1, 1])
    out = empty_output(input, weight, (input.shape[0], weight.shape[0], *sizes))
    finite = native.kernels.conv2d_winograd(input, weight, bias, out, None, padding, relu, False)
    return out if finite else None


def pooled(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    index: Tensor,
    padding: list[int],
) -> bool:
    """Writes conv2d_relu_max_pool2d's results of 2x2 windows; returns whether all is finite."""
    kernel = native.kernels.conv2d_winograd
    return kernel(input, weight, bias, out, index, padding, True, False)


def gradients(
    grad_conv: Tensor, input: Tensor, weight: Tensor, padding: list[int], needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Of input and weight; None also for one that is not finite."""
    few = input.shape[1] < WEIGHT_CHANNELS
    grad_input, grad_weight, _ = empty_gradients(input, weight, [*needs[:2], False])
    kernels = native.kernels
    if grad_input is not None and not kernels.conv2d_winograd(
        grad_conv, weight, None, grad_input, None, padding, False, True
    ):
        grad_input = None
    if grad_weight is not None and few:
        windows.grad_weight(grad_conv, input, weight, grad_weight, [1, 1], padding, [1, 1])
    elif grad_weight is not None and not kernels.conv2d_winograd_weight(
        grad_conv, input, grad_weight, padding
    ):
        grad_weight = None
    return grad_input, grad_weight
