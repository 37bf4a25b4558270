"""conv2d_relu_max_pool2d: a convolutional block that keeps a byte per window for its gradients.

On the CPU the gradients of a block whose windows do not overlap much are computed through the
winners only (csrc/cpu/conv2d_backward.cpp): as many products as there are windows, a quarter of
those of the dense convolutions over the scattered gradient for 2x2 windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import native, triton
from ..reference.conv2d_relu_max_pool2d import conv2d_relu_max_pool2d as reference
from . import configurations, kept_memory, route
from . import conv2d_cases as cases
from . import conv2d_fuzz as fuzz
from . import conv2d_winograd as winograd
from .conv2d_arguments import (
    Size,
    conv_arguments,
    conv_sizes,
    empty_gradients,
    empty_output,
    pool_arguments,
    pooled_sizes,
)
from .conv2d_choice import WIDENED, few_taps, fits_native, onednn_fails
from .conv2d_native import (
    ATEN,
    NATIVE_DTYPES,
    convolution,
    convolution_gradients,
    inside,
    laid_out,
    native_why_not,
)
from .declare import Backend, Op, declare
from .dispatch import is_fast

MAX_PLACES = 255  # a winner's place in its window is saved as one byte, 255 saying that it is 0


def conv2d_relu_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    pool_kernel_size: Size = 2,
    pool_stride: Size | None = None,
    pool_padding: Size = 0,
) -> Tensor:
    """max_pool2d(relu(conv2d(input, weight, bias))) in one op.

    None of the three outputs is kept for the backward pass, only one byte per window: where its
    maximum was, or that ReLU made it 0.

    Args:
        input, weight, bias, stride, padding, dilation, groups: as in `conv2d_relu`.
        pool_kernel_size, pool_stride, pool_padding: of the pooling windows, one int or
            (height, width); the stride defaults to the kernel size, the padding (never a maximum)
            is at most half of it. Windows up to 255 pixels; larger ones run the reference.

    Returns:
        (N, K, H', W'): channels_last when input or weight is, else contiguous.

    Raises:
        TypeError, ValueError (also RuntimeError, torch's own kind): naming the argument.

    Example:
        >>> image, weight = torch.randn(8, 1, 28, 28), torch.randn(32, 1, 3, 3)
        >>> bigops.conv2d_relu_max_pool2d(image, weight, padding=1).shape
        torch.Size([8, 32, 14, 14])
    """
    tensors = (input, weight, bias)
    options = (stride, padding, dilation, groups, pool_kernel_size, pool_stride, pool_padding)
    if (known := route.find(OP, tensors, options)) is not None:
        return known(*tensors)[0]
    conv = conv_arguments(input, weight, bias, stride, padding, dilation, groups)
    pool = pool_arguments(conv, pool_kernel_size, pool_stride, pool_padding)
    call = (*conv, *pool)
    beyond = None
    if pool[0][0] * pool[0][1] > MAX_PLACES:
        beyond = f"pool_kernel_size above {MAX_PLACES} pixels is not served"
    if is_fast(OP, call, beyond):
        route.leave(OP, tensors, options, call)
        out = OP.call(*call)[0]
    else:
        out = reference(*call)
    return out if input.dim() == 4 else out.squeeze(0)


# Dtypes whose products our kernels do best: only the winners' are made, in float32.
OWN = {torch.float64, torch.float32, *WIDENED}


def _ours(input: Tensor, weight: Tensor, *sizes: list[int]) -> bool:
    """Whether our own kernels do better than oneDNN's and passes over their results."""
    own = input.dtype in OWN or onednn_fails(input, weight, *sizes)
    return own and fits_native(input, weight)


def _ours_backward(input: Tensor, weight: Tensor, *sizes: list[int]) -> bool:
    """The same of gradients: dense products of bfloat16 are faster than the winners' by AMX only,
    and of a first layer not even so."""
    few = few_taps(weight) or (input.dtype == torch.bfloat16 and "v4_amx" not in native.SUPPORTED)
    return (few and fits_native(input, weight)) or _ours(input, weight, *sizes)


def _native_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    *pool: list[int],
) -> tuple[Tensor, Tensor]:
    out, index = _fake(input, weight, bias, stride, padding, dilation, groups, *pool)
    sizes = (stride, padding, dilation, groups)
    if (
        pool == ([2, 2], [2, 2], [0, 0])
        and winograd.serves(input, weight, *sizes, winograd.POOLED)
        and winograd.pooled(input, weight, bias, out, index, padding)
    ):
        return out, index
    few = few_taps(weight) and fits_native(input, weight)
    if few or _ours(input, weight, stride, padding, dilation):
        native.kernels.conv2d_relu_pool_forward(
            input, weight, bias, out, index, *sizes, *pool, True
        )
    elif out.numel():
        conv_out, _ = convolution(input, weight, bias, inside(input, weight, groups), *sizes)
        native.kernels.relu_pool_forward(conv_out, out, index, *pool)
    return out, index


def _native_backward(
    grad_out: Tensor,
    input: Tensor,
    weight: Tensor,
    index: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    pool_kernel: list[int],
    pool_stride: list[int],
    pool_padding: list[int],
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    sizes = (stride, padding, dilation, groups)
    pool = (pool_kernel, pool_stride, pool_padding)
    if _ours_backward(input, weight, stride, padding, dilation):
        grads = empty_gradients(input, weight, needs)
        native.kernels.conv2d_relu_pool_backward(
            grad_out, input, weight, index, *grads, *sizes, *pool
        )
        return grads
    conv = conv_sizes(input, weight, stride, padding, dilation)
    within = inside(input, weight, groups)
    shape = (*index.shape[:2], *conv)
    grad_conv = kept_memory.empty_like(grad_out.new_empty(()).expand(shape), memory_format=within)
    grad_bias = weight.new_empty(weight.shape[0]) if needs[2] else None
    native.kernels.relu_pool_backward(grad_out, index, grad_conv, grad_bias, *pool)
    products = convolution_gradients(grad_conv, input, weight, [*needs[:2], False], *sizes)
    return (*products[:2], grad_bias)


def _triton_why_not(*args: Any) -> str | None:
    if reason := triton.why_not(args[0].device.type):
        return reason
    from ..kernels import conv2d_relu_max_pool2d as kernels

    return kernels.why_not(*args)


def _triton_forward(*args: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import conv2d_relu_max_pool2d as kernels

    out, index = kernels.forward(*args)
    if index.device.type == "cpu":  # interpreted
        index = laid_out(index, torch.channels_last)
    return out, index


def _triton_backward(*args: Any) -> tuple[Tensor | None, ...]:
    from ..kernels import conv2d_relu_max_pool2d as kernels

    return kernels.backward(*args)


def _fake(
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
) -> tuple[Tensor, Tensor]:
    sizes = conv_sizes(input, weight, stride, padding, dilation)
    pooled = pooled_sizes(sizes, pool_kernel, pool_stride, pool_padding)
    out = empty_output(input, weight, (input.shape[0], weight.shape[0], *pooled))
    # The bytes are nobody's but ours. On the CPU they lie as the kernels compute them, a pixel's
    # filters together, which saves turning them; on a GPU as the output does.
    layout = torch.channels_last if out.device.type == "cpu" else torch.preserve_format
    return out, torch.empty_like(out, dtype=torch.uint8, memory_format=layout)


def _backward_fake(
    grad_out: Tensor, input: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    return empty_gradients(input, weight, rest[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, weight, _, *ctx.sizes = inputs
    ctx.save_for_backward(input, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward_args(ctx: Any, grad_out: Tensor | None, _: Any) -> Any:
    if grad_out is None:
        return None
    return (grad_out, *ctx.saved_tensors, *ctx.sizes, ctx.needs_input_grad[:3])


def _forward_args(
    grad_out: Tensor, input: Tensor, weight: Tensor, index: Tensor, *rest: Any
) -> Any:
    return (input, weight, None, *rest[:-1])


def _reference_bytes(input: Tensor, weight: Tensor, bias: Any, *rest: Any) -> int:
    rows, columns = conv_sizes(input, weight, *rest[:3])
    # The convolution's output, its ReLU, and the pooling's 8-byte indices (a quarter or less).
    return input.shape[0] * weight.shape[0] * rows * columns * (2 * input.element_size() + 2)


OP = declare(
    Op(
        name="conv2d_relu_max_pool2d",
        schema="(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, "
        "int[] dilation, int groups, int[] pool_kernel, int[] pool_stride, int[] pool_padding) "
        "-> (Tensor, Tensor)",
        backward_schema="(Tensor grad_out, Tensor input, Tensor weight, Tensor index, "
        "int[] stride, int[] padding, int[] dilation, int groups, int[] pool_kernel, "
        "int[] pool_stride, int[] pool_padding, bool[] needs) -> (Tensor, Tensor, Tensor)",
        function=conv2d_relu_max_pool2d,
        eager=cases.pool_eager,
        backends=(
            Backend("native", ("cpu",), native_why_not, _native_forward, _native_backward, ATEN),
            Backend("triton", ("cuda", "cpu"), _triton_why_not, _triton_forward, _triton_backward),
        ),
        fake=_fake,
        backward_fake=_backward_fake,
        setup_context=_setup_context,
        backward_args=_backward_args,
        forward_args=_forward_args,
        samples=cases.POOL_SAMPLES,
        arbitrary=fuzz.arbitrary_pool,
        illegal=fuzz.illegal_pool,
        sweeps=cases.SWEEPS,
        configurations=configurations.conv2d_relu_max_pool2d,
        dtypes=NATIVE_DTYPES[:3],
        cost=cases.pool_cost,
        reference_bytes=_reference_bytes,
    )
)
