"""conv2d_act: a convolution with its bias, a residual and an activation; conv2d_relu, its common
face."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import native, triton
from ..reference.conv2d_act import conv2d_act as reference
from . import arguments, configurations, kept_memory, route
from . import conv2d_cases as cases
from . import conv2d_cudnn as cudnn
from . import conv2d_fuzz as fuzz
from .activation import NUMBERS, OF_INPUT, named
from .arguments import ArgumentError
from .conv2d_arguments import (
    Size,
    conv_arguments,
    conv_sizes,
    empty_gradients,
    empty_output,
    residual_argument,
)
from .conv2d_choice import choose
from .conv2d_native import (
    ATEN,
    NATIVE_DTYPES,
    convolution,
    convolution_gradients,
    inside,
    is_laid_out,
    laid_out,
    native_why_not,
)
from .declare import Backend, Op, declare
from .dispatch import is_fast


def conv2d_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    activation: str | None = "relu",
    residual: Tensor | None = None,
) -> Tensor:
    """activation(conv2d(input, weight, bias) + residual) in one op.

    For gradients relu, sigmoid and tanh keep the output alone, gelu and silu what they are given.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, bfloat16, float16 or float64; any strides.
        weight: (K, C / groups, KH, KW), input's dtype.
        bias: (K,), input's dtype, or None.
        stride, dilation: in pixels, one int or (height, width).
        padding: zeros on each side, one int or (height, width), or "valid" (none), or "same" (as
            many as keep the size; stride 1 only).
        groups: the channels are cut into this many groups, each with its own K / groups filters.
        activation: "relu", "sigmoid", "tanh", "gelu" (by the error function), "silu", or "none".
        residual: of the output's shape, input's dtype: added before the activation.

    Returns:
        (N, K, H', W'), H' = (H + 2 padding - dilation (KH - 1) - 1) // stride + 1; channels_last
        when input or weight is, else contiguous.

    Raises:
        TypeError, ValueError (also RuntimeError, torch's own kind): naming the argument.

    Source: He et al. 2016, "Deep residual learning for image recognition", for the residual.

    Example:
        >>> image, weight = torch.randn(8, 16, 32, 32), torch.randn(16, 16, 3, 3)
        >>> bigops.conv2d_act(image, weight, padding=1, activation="silu", residual=image).shape
        torch.Size([8, 16, 32, 32])
    """
    tensors = (input, weight, bias, residual)
    options = (stride, padding, dilation, groups, activation)
    if (known := route.find(OP, tensors, options)) is not None:
        return known(*tensors)[0]
    name = named(activation)
    conv = conv_arguments(input, weight, bias, stride, padding, dilation, groups)
    added = residual_argument(residual, input, conv)
    needed = (*conv[:3], added)
    keep = name in OF_INPUT and torch.is_grad_enabled() and any(map(_differentiated, needed))
    call = (*needed, *conv[3:], name, keep)
    if is_fast(OP, call):
        route.leave(OP, tensors, options, call)
        out = OP.call(*call)[0]
    else:
        out = reference(*call[:-1])
    return out if input.dim() == 4 else out.squeeze(0)


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
        input, weight, bias, stride, padding, dilation, groups: as in `conv2d_act`.

    Returns:
        As `conv2d_act`.

    Raises:
        TypeError, ValueError (also RuntimeError, torch's own kind): naming the argument.

    Example:
        >>> image, weight = torch.randn(8, 3, 32, 32), torch.randn(16, 3, 3, 3)
        >>> bigops.conv2d_relu(image, weight, padding=1).shape
        torch.Size([8, 16, 32, 32])
    """
    return conv2d_act(input, weight, bias, stride, padding, dilation, groups)


def conv1d_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    activation: str | None = "relu",
    residual: Tensor | None = None,
) -> Tensor:
    """activation(conv1d(input, weight, bias) + residual): `conv2d_act` of images one pixel high.

    Args:
        input: (N, C, L) or (C, L); float32, bfloat16, float16 or float64; any strides.
        weight: (K, C / groups, KL), input's dtype.
        stride, padding, dilation: one int each (padding also "valid" or "same").
        bias, groups, activation, residual: as in `conv2d_act`.

    Returns:
        (N, K, L'), contiguous; or (K, L').

    Raises:
        TypeError, ValueError (also RuntimeError, torch's own kind): naming the argument.

    Example:
        >>> sound, weight = torch.randn(8, 2, 1000), torch.randn(16, 2, 9)
        >>> bigops.conv1d_act(sound, weight, stride=2, activation="gelu").shape
        torch.Size([8, 16, 496])
    """
    for tensor_name, tensor, dims in (("input", input, (2, 3)), ("weight", weight, (3,))):
        arguments.tensor(tensor_name, tensor)
        if tensor.dim() not in dims:
            wanted = " or ".join(map(str, dims))
            shape = tuple(tensor.shape)
            raise ArgumentError(f"{tensor_name} must have {wanted} dimensions, got shape {shape}")
    if residual is not None:
        arguments.tensor("residual", residual, dims=input.dim())
        residual = residual.unsqueeze(-2)
    sizes = (_row("stride", stride, 1), padding, _row("dilation", dilation, 1))
    if not isinstance(padding, str):
        sizes = (sizes[0], _row("padding", padding, 0), sizes[2])
    out = conv2d_act(
        input.unsqueeze(-2),
        weight.unsqueeze(-2),
        bias,
        *sizes,
        groups,
        activation=activation,
        residual=residual,
    )
    return out.squeeze(-2)


def _row(name: str, value: Size, alone: int) -> tuple[int, int]:
    """A length's size as that of an image one pixel high."""
    sizes = list(value) if isinstance(value, Sequence) else [value]
    if len(sizes) != 1 or not isinstance(sizes[0], int):
        raise ArgumentError(f"{name} must be one int, got {value!r}")
    return alone, sizes[0]


def _differentiated(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


NO_POOL = ([1, 1], [1, 1], [0, 0])


def _native_why_not(input: Tensor, *rest: Any) -> str | None:
    return cudnn.why_not(input) if cudnn.serves(input) else native_why_not(input, *rest)


def _native_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    sizes, number = (stride, padding, dilation, groups), NUMBERS[activation]
    if cudnn.serves(input):
        return cudnn.forward(input, weight, bias, residual, *sizes, activation, keep)
    chosen = choose(input, weight, *sizes)
    layout = chosen.layout
    if chosen.forward not in (None, "direct"):
        out, pre = _fake(input, weight, bias, residual, *sizes, activation, keep)
        getattr(native.kernels, f"conv2d_{chosen.forward}_forward")(
            laid_out(input, layout), weight, bias, _as_output(residual, layout), out,
            pre if keep else None, *sizes, number,
        )  # fmt: skip
        return out, pre
    fused = residual is None and activation in ("relu", "none")
    if chosen.forward:
        shape = (input.shape[0], weight.shape[0], *conv_sizes(input, weight, *sizes[:3]))
        out = empty_output(input, weight, shape)
        native.kernels.conv2d_relu_pool_forward(
            input, weight, bias, out, None, *sizes, *NO_POOL, fused and activation == "relu"
        )
    else:
        # Not oneDNN's convolution with its own ReLU: that one turns NaN into 0.
        rectified = fused and activation == "relu"
        within = inside(input, weight, groups)
        out, rectified = convolution(input, weight, bias, within, *sizes, rectified)
        fused = fused and (rectified or activation == "none") and is_laid_out(out, layout)
    pre = torch.empty_like(out, memory_format=layout) if keep else out.new_empty(0)
    if not fused:
        conv_out = out
        out = out if is_laid_out(out, layout) else torch.empty_like(out, memory_format=layout)
        native.kernels.activation_forward(
            conv_out, _as_output(residual, layout), out, pre if keep else None, number
        )
    return out, pre


def _as_output(tensor: Tensor | None, layout: torch.memory_format) -> Tensor | None:
    return None if tensor is None else laid_out(tensor, layout)


def _native_backward(
    grad_out: Tensor,
    input: Tensor,
    weight: Tensor,
    saved: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    sizes, number = (stride, padding, dilation, groups), NUMBERS[activation]
    if cudnn.serves(input):
        return cudnn.backward(grad_out, input, weight, saved, *sizes, activation, needs)
    chosen = choose(input, weight, *sizes)
    layout, kernels = chosen.layout, chosen.backward if needs[0] else chosen.weight
    kept = None if activation == "none" else saved
    if kernels not in (None, "direct"):
        all_grads = _backward_fake(grad_out, input, weight, needs)
        getattr(native.kernels, f"conv2d_{kernels}_backward")(
            laid_out(grad_out, layout), laid_out(input, layout), weight, kept, *all_grads, *sizes,
            number,
        )  # fmt: skip
        return all_grads
    ours = kernels == "direct"
    at_once = ours and activation in ("relu", "none") and not needs[3]
    grad_conv, grad_bias = grad_out, None
    within = layout if ours or needs[3] else inside(input, weight, groups)
    if not at_once and activation == "none":
        grad_conv = laid_out(grad_out, within)
    elif not at_once:
        empty_like = torch.empty_like if needs[3] else kept_memory.empty_like
        grad_conv = empty_like(saved, memory_format=within)
        grad_bias = weight.new_empty(weight.shape[0]) if needs[2] else None
        native.kernels.activation_backward(grad_out, saved, grad_conv, grad_bias, number)
    wanted = [needs[0], needs[1], needs[2] and grad_bias is None]
    if ours:
        grads = empty_gradients(input, weight, wanted)
        native.kernels.conv2d_relu_pool_backward(
            grad_conv, input, weight, kept if at_once else None, *grads, *sizes, *NO_POOL
        )
    else:
        grads = convolution_gradients(grad_conv, input, weight, wanted, *sizes)
    grad_residual = None
    if needs[3]:
        grad_residual = grad_conv.clone() if grad_conv is grad_out else grad_conv
    return (*grads[:2], grads[2] if grad_bias is None else grad_bias, grad_residual)


def _triton_why_not(*args: Any) -> str | None:
    if reason := triton.why_not(args[0].device.type):
        return reason
    from ..kernels import conv2d_act as kernels

    return kernels.why_not(*args)


def _triton_forward(*args: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import conv2d_act as kernels

    return kernels.forward(*args)


def _triton_backward(*args: Any) -> tuple[Tensor | None, ...]:
    from ..kernels import conv2d_act as kernels

    return kernels.backward(*args)


def _fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    sizes = conv_sizes(input, weight, stride, padding, dilation)
    out = empty_output(input, weight, (input.shape[0], weight.shape[0], *sizes))
    return out, torch.empty_like(out) if keep else out.new_empty(0)


def _backward_fake(
    grad_out: Tensor, input: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    needs = rest[-1]
    residual = empty_output(input, weight, grad_out.shape) if needs[3] else None
    return (*empty_gradients(input, weight, needs), residual)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, weight, _, _, *ctx.options, keep = inputs
    activation = ctx.options[-1]
    # Of no activation the second, which is empty, stands for what nobody needs.
    saved = output[1] if activation in (*OF_INPUT, "none") else output[0]
    ctx.kept = keep or activation not in OF_INPUT
    ctx.save_for_backward(input, weight, saved)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward_args(ctx: Any, grad_out: Tensor | None, _: Any) -> Any:
    if grad_out is None:
        return None
    if not ctx.kept:
        raise RuntimeError("torch.ops.bigops.conv2d_act needs keep=True for this gradient")
    return (grad_out, *ctx.saved_tensors, *ctx.options, ctx.needs_input_grad[:4])


def _forward_args(
    grad_out: Tensor, input: Tensor, weight: Tensor, saved: Tensor, *rest: Any
) -> Any:
    return (input, weight, None, None, *rest[:-1], False)


def _reference_bytes(input: Tensor, weight: Tensor, *rest: Any) -> int:
    rows, columns = conv_sizes(input, weight, *rest[2:5])
    return input.shape[0] * weight.shape[0] * rows * columns * input.element_size()


SIZES = "int[] stride, int[] padding, int[] dilation, int groups, str activation"

OP = declare(
    Op(
        name="conv2d_act",
        schema=f"(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, {SIZES}, bool keep) "
        "-> (Tensor, Tensor)",
        backward_schema=f"(Tensor grad_out, Tensor input, Tensor weight, Tensor saved, {SIZES}, "
        "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
        function=conv2d_act,
        eager=cases.act_eager,
        backends=(
            # On a GPU cuDNN's products, before Triton's: these took two to three times as long on
            # an H200 (bench/results/nvidia-h200).
            Backend(
                "native",
                ("cpu", "cuda"),
                _native_why_not,
                _native_forward,
                _native_backward,
                ATEN,
                launches_triton=True,
            ),
            Backend("triton", ("cuda", "cpu"), _triton_why_not, _triton_forward, _triton_backward),
        ),
        fake=_fake,
        backward_fake=_backward_fake,
        setup_context=_setup_context,
        backward_args=_backward_args,
        forward_args=_forward_args,
        samples=cases.ACT_SAMPLES,
        arbitrary=fuzz.arbitrary_act,
        illegal=fuzz.illegal_act,
        sweeps=cases.SWEEPS,
        configurations=configurations.conv2d_act,
        dtypes=NATIVE_DTYPES[:3],
        cost=cases.act_cost,
        reference_bytes=_reference_bytes,
    )
)
