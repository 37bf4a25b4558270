"""What both convolution ops share: their arguments' checks, their sizes, and how results lie.

Results are laid out as torch lays out a convolution's: channels_last when the input or the weight
is, by its strides, else contiguous; the gradients of input and weight alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import arguments
from .arguments import ArgumentError

Size = int | Sequence[int]
ConvCall = tuple[Tensor, Tensor, Tensor | None, list[int], list[int], list[int], int]


def pair(name: str, value: Any, least: int) -> list[int]:
    """`value` for height and width; ArgumentError below `least`."""
    sizes = list(value) if isinstance(value, Sequence) else [value]
    if len(sizes) == 1:
        sizes *= 2
    if len(sizes) != 2 or not all(isinstance(s, int) for s in sizes):
        raise ArgumentError(f"{name} must be one or two ints, got {value!r}")
    if sizes[0] < least or sizes[1] < least:
        raise ArgumentError(f"{name} must be at least {least}, got {value!r}")
    return sizes


def out_size(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    """How many places a window of `kernel` pixels has along an axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def conv_sizes(
    input: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> list[int]:
    """Height and width of the convolution's output."""
    h, w = input.shape[2:]
    kernel_h, kernel_w = weight.shape[2:]
    return [
        out_size(h, kernel_h, stride[0], padding[0], dilation[0]),
        out_size(w, kernel_w, stride[1], padding[1], dilation[1]),
    ]


def conv_arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
) -> ConvCall:
    """The torch op's arguments: checked, batched, cast under autocast, padding as numbers."""
    arguments.tensor("input", input)
    arguments.tensor("weight", weight, dims=4)
    if bias is not None:
        arguments.tensor("bias", bias, dims=1)
    if input.dim() == 3:
        input = input.unsqueeze(0)
    elif input.dim() != 4:
        raise ArgumentError(f"input must have 3 or 4 dimensions, got shape {tuple(input.shape)}")
    input, weight, bias = arguments.autocast(input, weight, bias)  # type: ignore[assignment]
    arguments.alike(input=input, weight=weight, bias=bias)
    stride, dilation = pair("stride", stride, 1), pair("dilation", dilation, 1)
    filters, group_channels, *kernel = weight.shape
    if not isinstance(groups, int) or groups < 1 or filters % groups:
        raise ArgumentError(f"groups must divide weight's {filters} filters, got {groups!r}")
    if input.shape[1] != group_channels * groups:
        raise ArgumentError(
            f"input must have {group_channels * groups} channels (weight's {group_channels} x "
            f"{groups} groups), got {input.shape[1]}"
        )
    if bias is not None and bias.shape[0] != filters:
        raise ArgumentError(f"bias must have weight's {filters} filters, got {bias.shape[0]}")
    if isinstance(padding, str):
        input, padding = _named_padding(input, kernel, stride, padding, dilation)
    padding = pair("padding", padding, 0)
    rows, columns = conv_sizes(input, weight, stride, padding, dilation)
    if rows < 1 or columns < 1:
        raise ArgumentError(
            f"weight's kernel {tuple(kernel)} must fit into the padded input, got an input of "
            f"{tuple(input.shape[2:])} with padding {tuple(padding)}, dilation {tuple(dilation)}"
        )
    return input, weight, bias, stride, padding, dilation, groups


def residual_argument(residual: Tensor | None, input: Tensor, conv: ConvCall) -> Tensor | None:
    """The residual of a convolution: checked, batched as `conv`, cast under autocast."""
    if residual is None:
        return None
    arguments.tensor("residual", residual)
    shape = _output_shape(input, conv)
    if residual.shape != shape:
        raise ArgumentError(
            f"residual must have the output's shape {shape}, got {tuple(residual.shape)}"
        )
    (residual,) = arguments.autocast(residual)
    assert residual is not None
    arguments.alike(input=conv[0], residual=residual)
    return residual.unsqueeze(0) if input.dim() == 3 else residual


def output_shape(
    input: Tensor,
    weight: Tensor,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> tuple[int, ...]:
    """Of a convolution, of one image or several."""
    conv = conv_arguments(input, weight, None, stride, padding, dilation, groups)
    return _output_shape(input, conv)


def _output_shape(input: Tensor, conv: ConvCall) -> tuple[int, ...]:
    # "same" may have padded conv's input.
    sizes = conv_sizes(conv[0], conv[1], *conv[3:6])
    return (*input.shape[:-3], conv[1].shape[0], *sizes)


def _named_padding(
    input: Tensor, kernel: list[int], stride: list[int], padding: str, dilation: list[int]
) -> tuple[Tensor, list[int]]:
    if padding == "valid":
        return input, [0, 0]
    if padding != "same":
        raise ArgumentError(f"padding must be ints, 'valid' or 'same', got {padding!r}")
    if stride != [1, 1]:
        raise ArgumentError(f"padding='same' takes stride 1 only, got {tuple(stride)}")
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(t % 2 for t in total):  # torch puts the odd one at the end
        input = F.pad(input, (0, total[1] % 2, 0, total[0] % 2))
    return input, [t // 2 for t in total]


def pool_arguments(
    conv: tuple[Any, ...], kernel_size: Size, stride: Size | None, padding: Size
) -> tuple[list[int], list[int], list[int]]:
    """The windows on the output of `conv`, which holds one at least."""
    kernel, steps, pad = pool_sizes(kernel_size, stride, padding)
    sizes = conv_sizes(conv[0], conv[1], *conv[3:6])
    if min(pooled_sizes(sizes, kernel, steps, pad)) < 1:
        raise ArgumentError(
            f"pool_kernel_size {tuple(kernel)} must fit into the convolution's output, "
            f"which is {tuple(sizes)}"
        )
    return kernel, steps, pad


def pool_sizes(
    kernel_size: Size, stride: Size | None, padding: Size
) -> tuple[list[int], list[int], list[int]]:
    kernel = pair("pool_kernel_size", kernel_size, 1)
    # An empty list means the kernel size in torch, too.
    steps = pair("pool_stride", stride, 1) if stride or stride == 0 else kernel
    pad = pair("pool_padding", padding, 0)
    if 2 * pad[0] > kernel[0] or 2 * pad[1] > kernel[1]:
        raise ArgumentError(
            f"pool_padding must be at most half of pool_kernel_size {tuple(kernel)}, "
            f"got {padding!r}"
        )
    return kernel, steps, pad


def pooled_sizes(
    sizes: list[int], kernel: list[int], stride: list[int], padding: list[int]
) -> list[int]:
    return [
        out_size(sizes[0], kernel[0], stride[0], padding[0]),
        out_size(sizes[1], kernel[1], stride[1], padding[1]),
    ]


def is_channels_last(x: Tensor) -> bool:
    """torch's rule, by strides: is_contiguous would call one channel or one pixel both."""
    step_n, step_c, step_h, step_w = x.stride()
    if step_w < step_c or step_c == 0 or x.numel() == 0:
        return False
    _, channels, height, width = x.shape
    image = step_h * height
    return (
        step_w >= step_c * channels
        and step_h >= step_w * width
        and step_n >= image
        and image != step_c
    )


def memory_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """The layout of a convolution's output and of its gradients."""
    if is_channels_last(input) or is_channels_last(weight):
        return torch.channels_last
    return torch.contiguous_format


def empty_output(input: Tensor, weight: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor without values, laid out as the convolution's output."""
    if memory_format(input, weight) is torch.channels_last:
        return torch.empty(
            shape, dtype=input.dtype, device=input.device, memory_format=torch.channels_last
        )
    return input.new_empty(shape)


def empty_gradients(
    input: Tensor, weight: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias without values; None where not needed."""
    layout = memory_format(input, weight)
    return (
        torch.empty_like(input, memory_format=layout) if needs[0] else None,
        torch.empty_like(weight, memory_format=layout) if needs[1] else None,
        weight.new_empty(weight.shape[0]) if needs[2] else None,
    )
