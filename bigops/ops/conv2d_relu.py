"""conv2d_relu: a convolution with its bias and ReLU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import native, triton
from ..reference.conv2d_relu import conv2d_relu as reference
from . import configurations, route
from . import conv2d_cases as cases
from . import conv2d_fuzz as fuzz
from .conv2d_arguments import (
    Size,
    conv_arguments,
    conv_sizes,
    empty_gradients,
    empty_output,
    memory_format,
)
from .conv2d_native import (
    ATEN,
    NATIVE_DTYPES,
    convolution,
    convolution_gradients,
    few_taps,
    fits_native,
    laid_out,
    native_why_not,
    onednn_fails,
)
from .declare import Backend, Op, declare
from .dispatch import is_fast


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """relu(conv2d(input, weight, bias)) in one op that saves only its output.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, bfloat16, float16 or float64; any strides.
        weight: (K, C / groups, KH, KW), input's dtype.
        bias: (K,), input's dtype, or None.
        stride, dilation: in pixels, one int or (height, width).
        padding: zeros on each side, one int or (height, width), or "valid" (none), or "same" (as
            many as keep the size; stride 1 only).
        groups: the channels are cut into this many groups, each with its own K / groups filters.

    Returns:
        (N, K, H', W'), H' = (H + 2 padding - dilation (KH - 1) - 1) // stride + 1; channels_last
        when input or weight is, else contiguous.

    Raises:
        TypeError, ValueError (also RuntimeError, torch's own kind): naming the argument.

    Example:
        >>> image, weight = torch.randn(8, 3, 32, 32), torch.randn(16, 3, 3, 3)
        >>> bigops.conv2d_relu(image, weight, padding=1).shape
        torch.Size([8, 16, 32, 32])
    """
    tensors, options = (input, weight, bias), (stride, padding, dilation, groups)
    if (known := route.find(OP, tensors, options)) is not None:
        return known(*tensors)
    call = conv_arguments(input, weight, bias, stride, padding, dilation, groups)
    if is_fast(OP, call):
        route.leave(OP, tensors, options, call)
        out = OP.call(*call)
    else:
        out = reference(*call)
    return out if input.dim() == 4 else out.squeeze(0)


NO_POOL = ([1, 1], [1, 1], [0, 0])
TINY = 2**18  # below this product of sizes oneDNN's calls take longer than our arithmetic


def _ours(input: Tensor, weight: Tensor, groups: int, *sizes: list[int]) -> bool:
    """Whether our own kernels do better than oneDNN's and a pass over their output."""
    if input.dtype == torch.float64 or input.numel() * weight.numel() < TINY:
        return True
    few = few_taps(weight) and weight.shape[0] > 8 * groups
    return (few or onednn_fails(input, weight, *sizes)) and fits_native(input, weight)


def _native_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    if _ours(input, weight, groups, stride, padding, dilation):
        out = _fake(input, weight, bias, stride, padding, dilation, groups)
        native.kernels.conv2d_relu_pool_forward(
            input, weight, bias, out, None, stride, padding, dilation, groups, *NO_POOL
        )
        return out
    # Not oneDNN's convolution with its own ReLU: that one turns NaN into 0.
    got = convolution(input, weight, bias, stride, padding, dilation, groups).relu_()
    return laid_out(got, memory_format(input, weight))


def _native_backward(
    grad_out: Tensor,
    input: Tensor,
    weight: Tensor,
    out: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    sizes = (stride, padding, dilation, groups)
    if _ours(input, weight, groups, stride, padding, dilation):
        grads = empty_gradients(input, weight, needs)
        native.kernels.conv2d_relu_pool_backward(
            grad_out, input, weight, out, *grads, *sizes, *NO_POOL
        )
        return grads
    grad_conv = torch.empty_like(out)
    grad_bias = weight.new_empty(weight.shape[0]) if needs[2] else None
    native.kernels.relu_pool_backward(grad_out, out, grad_conv, grad_bias, *NO_POOL)
    return (*convolution_gradients(grad_conv, input, weight, needs, *sizes), grad_bias)


def _triton_why_not(*args: Any) -> str | None:
    if reason := triton.why_not(args[0].device.type):
        return reason
    from ..kernels import conv2d_relu as kernels

    return kernels.why_not(*args)


def _triton_forward(*args: Any) -> Tensor:
    from ..kernels import conv2d_relu as kernels

    return kernels.forward(*args)


def _triton_backward(*args: Any) -> tuple[Tensor | None, ...]:
    from ..kernels import conv2d_relu as kernels

    return kernels.backward(*args)


def _fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    sizes = conv_sizes(input, weight, stride, padding, dilation)
    return empty_output(input, weight, (input.shape[0], weight.shape[0], *sizes))


def _backward_fake(
    grad_out: Tensor, input: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    return empty_gradients(input, weight, rest[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, *ctx.sizes = inputs
    ctx.save_for_backward(input, weight, output)


def _backward_args(ctx: Any, grad_out: Tensor) -> Any:
    return (grad_out, *ctx.saved_tensors, *ctx.sizes, ctx.needs_input_grad[:3])


def _forward_args(grad_out: Tensor, input: Tensor, weight: Tensor, out: Tensor, *rest: Any) -> Any:
    return (input, weight, None, *rest[:-1])


def _reference_bytes(*args: Any) -> int:
    meta: tuple[Any, ...] = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in args)
    out = _fake(*meta)
    return out.numel() * out.element_size()


OP = declare(
    Op(
        name="conv2d_relu",
        schema="(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, "
        "int[] dilation, int groups) -> Tensor",
        backward_schema="(Tensor grad_out, Tensor input, Tensor weight, Tensor out, int[] stride, "
        "int[] padding, int[] dilation, int groups, bool[] needs) -> (Tensor, Tensor, Tensor)",
        function=conv2d_relu,
        eager=cases.relu_eager,
        backends=(
            Backend("native", ("cpu",), native_why_not, _native_forward, _native_backward, ATEN),
            Backend("triton", ("cuda", "cpu"), _triton_why_not, _triton_forward, _triton_backward),
        ),
        fake=_fake,
        backward_fake=_backward_fake,
        setup_context=_setup_context,
        backward_args=_backward_args,
        forward_args=_forward_args,
        samples=cases.RELU_SAMPLES,
        arbitrary=fuzz.arbitrary_relu,
        illegal=fuzz.illegal_relu,
        sweeps=cases.SWEEPS,
        configurations=configurations.conv2d_relu,
        dtypes=NATIVE_DTYPES[:3],
        cost=cases.relu_cost,
        reference_bytes=_reference_bytes,
    )
)
