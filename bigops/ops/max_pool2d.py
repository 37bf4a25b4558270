"""max_pool2d: torch's, with a byte per window kept for its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import native
from ..reference.max_pool2d import max_pool2d as reference
from . import arguments, configurations, route
from . import max_pool2d_cases as cases
from .arguments import ArgumentError
from .conv2d_arguments import Size, is_channels_last, pair
from .declare import Backend, Op, declare
from .dispatch import is_fast

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_PLACES = 255  # a winner's place in its window is saved as one byte; 255: of none in the image


def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """torch.nn.functional.max_pool2d.

    As there, NaN wins, the first of equal maxima gets the gradient, and padding is never a
    maximum. The backward pass keeps a byte per window, where torch keeps the input and eight.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, bfloat16, float16 or (native) float64. Integers
            run the reference.
        kernel_size, stride, padding, dilation: in pixels, one int or (height, width); the stride
            defaults to the kernel size, the padding is at most half of it. Windows up to 255
            places; larger ones run the reference.
        ceil_mode: whether a last window counts that ends beyond the padding.
        return_indices: whether to return also where the maxima are.

    Returns:
        (N, C, H', W') or (C, H', W'), channels_last when input is; with `return_indices` also their
        int64 places row * W + column in the image.

    Raises:
        TypeError, ValueError (also RuntimeError, torch's own kind): naming the argument.

    Example:
        >>> bigops.max_pool2d(torch.randn(8, 64, 56, 56), 2).shape
        torch.Size([8, 64, 28, 28])
    """
    options = (kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    if not return_indices and (known := route.find(OP, (input,), options)) is not None:
        return known(input)[0]
    images = _images(input)
    windows = _windows(kernel_size, stride, padding, dilation, ceil_mode)
    kernel, _, pad, spread = windows
    size = [_pooled(images.shape[2 + axis], axis, windows, ceil_mode) for axis in (0, 1)]
    if size[0] < 1 or size[1] < 1:
        raise ArgumentError(
            f"kernel_size {tuple(kernel)} must fit into the padded input, got an input of "
            f"{tuple(images.shape[2:])} with padding {tuple(pad)}, dilation {tuple(spread)}"
        )
    call = (images, *windows, size, is_channels_last(images))
    beyond = None
    if kernel[0] * kernel[1] > MAX_PLACES:
        beyond = f"kernel_size above {MAX_PLACES} pixels is not served"
    if not is_fast(OP, call, beyond):
        return reference(input, *windows, ceil_mode, return_indices)
    if not return_indices:
        route.leave(OP, (input,), options, call)
    out, places = OP.call(*call)
    found = out if input.dim() == 4 else out.squeeze(0)
    if not return_indices:
        return found
    indices = _in_image(places, images.shape[3], windows)
    return found, indices if input.dim() == 4 else indices.squeeze(0)


Windows = tuple[list[int], list[int], list[int], list[int]]  # kernel, stride, padding, dilation


def _images(input: Tensor) -> Tensor:
    arguments.tensor("input", input)
    if input.dim() not in (3, 4) or 0 in input.shape[-3:]:
        raise ArgumentError(
            "input must have 3 or 4 dimensions, of which the first of 4 may be 0, got shape "
            f"{tuple(input.shape)}"
        )
    if input.dtype.is_complex or input.dtype == torch.bool:
        raise ArgumentError(f"input must be of real numbers, got {input.dtype}")
    return input if input.dim() == 4 else input.unsqueeze(0)


def _windows(
    kernel_size: Size, stride: Size | None, padding: Size, dilation: Size, ceil_mode: bool
) -> Windows:
    if not isinstance(ceil_mode, bool):
        raise TypeError(f"ceil_mode must be a bool, got {ceil_mode!r}")
    kernel = pair("kernel_size", kernel_size, 1)
    # An empty list means the kernel size in torch, too.
    steps = pair("stride", stride, 1) if stride or stride == 0 else kernel
    pad, spread = pair("padding", padding, 0), pair("dilation", dilation, 1)
    if 2 * pad[0] > kernel[0] or 2 * pad[1] > kernel[1]:
        raise ArgumentError(
            f"padding must be at most half of kernel_size {tuple(kernel)}, got {padding!r}"
        )
    return kernel, steps, pad, spread


def _pooled(size: int, axis: int, windows: Windows, ceil: bool) -> int:
    """Windows along an axis: one that starts in the padding behind the image is none."""
    kernel, stride, padding, dilation = (w[axis] for w in windows)
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    found = (room + (stride - 1 if ceil else 0)) // stride + 1
    return found - 1 if ceil and (found - 1) * stride >= size + padding else found


def _in_image(places: Tensor, width: int, windows: Windows) -> Tensor:
    """Places in the windows as places in the image."""
    kernel, stride, padding, dilation = windows
    rows, columns = (
        torch.arange(places.shape[2 + axis], device=places.device) * stride[axis] - padding[axis]
        for axis in (0, 1)
    )
    place = places.long()
    row = rows.unsqueeze(1) + place // kernel[1] * dilation[0]
    return row * width + columns + place % kernel[1] * dilation[1]


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _fake(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, size, channels_last = rest
    out = torch.empty(
        (*input.shape[:2], *size),
        dtype=input.dtype,
        device=input.device,
        memory_format=_layout(channels_last),
    )
    return out, torch.empty_like(out, dtype=torch.uint8)


def _backward_fake(grad_out: Tensor, index: Tensor, *rest: Any) -> Tensor:
    *_, size, channels_last = rest
    return torch.empty(
        (*index.shape[:2], *size),
        dtype=grad_out.dtype,
        device=grad_out.device,
        memory_format=_layout(channels_last),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, *ctx.windows, _, ctx.channels_last = inputs
    ctx.size = list(input.shape[2:])
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward_args(ctx: Any, grad_out: Tensor | None, _: Any) -> Any:
    if grad_out is None:
        return None
    return (grad_out, *ctx.saved_tensors, *ctx.windows, ctx.size, ctx.channels_last)


def _forward_args(grad_out: Tensor, index: Tensor, *rest: Any) -> Any:
    return (grad_out, *rest)


def _native_forward(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out, index = _fake(input, *rest)
    native.kernels.max_pool2d_forward(input, out, index, *rest[:4])
    return out, index


def _native_backward(grad_out: Tensor, index: Tensor, *rest: Any) -> Tensor:
    grad_input = _backward_fake(grad_out, index, *rest)
    native.kernels.max_pool2d_backward(grad_out, index, grad_input, *rest[:4])
    return grad_input


def _native_why_not(input: Tensor, *rest: Any) -> str | None:
    if input.dtype not in (*DTYPES, torch.float64):
        return f"dtype {input.dtype}"
    return native.why_not()


def _reference_bytes(input: Tensor, *rest: Any) -> int:
    rows, columns = rest[-2]
    return 8 * input.shape[0] * input.shape[1] * rows * columns  # its indices


WINDOWS = "int[] kernel, int[] stride, int[] padding, int[] dilation, SymInt[] size"

OP = declare(
    Op(
        name="max_pool2d",
        schema=f"(Tensor input, {WINDOWS}, bool channels_last) -> (Tensor, Tensor)",
        backward_schema=f"(Tensor grad_out, Tensor index, {WINDOWS}, bool channels_last) -> Tensor",
        function=max_pool2d,
        eager=cases.eager,
        backends=(
            Backend("native", ("cpu",), _native_why_not, _native_forward, _native_backward),
            Backend.triton("bigops.kernels.max_pool2d"),
        ),
        fake=_fake,
        backward_fake=_backward_fake,
        setup_context=_setup_context,
        backward_args=_backward_args,
        forward_args=_forward_args,
        samples=cases.SAMPLES,
        arbitrary=cases.arbitrary,
        illegal=cases.illegal,
        sweeps=cases.SWEEPS,
        configurations=configurations.max_pool2d,
        dtypes=DTYPES,
        cost=cases.cost,
        reference_bytes=_reference_bytes,
    )
)
