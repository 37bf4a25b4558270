"""batch_norm_act: batch normalisation, residual and ReLU in four passes over memory, not ten.

The torch op returns the batch's mean and unbiased variance beside the output, and the function
updates the running statistics with them: so the op itself writes nothing that it was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import native, triton
from ..reference.batch_norm_act import batch_norm_act as reference
from . import arguments, configurations, route
from . import batch_norm_act_cases as cases
from .arguments import ArgumentError
from .conv2d_arguments import is_channels_last
from .declare import Backend, Op, declare
from .dispatch import is_fast

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("relu", "none")
ATEN = {"aten::copy_": "of tensors that lie neither as the input nor contiguous"}


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str = "relu",
    residual: Tensor | None = None,
) -> Tensor:
    """activation(batch_norm(input) + residual), with torch.nn.functional.batch_norm's meaning.

        out = activation((input - mean) / sqrt(var + eps) * weight + bias + residual)

    mean and var are each channel's over batch and pixels (var biased) in training, else the running
    ones. Kept for the backward pass are input, output, and two numbers per channel.

    Args:
        input: (N, C, *); float32, bfloat16, float16 or (native) float64.
        running_mean, running_var: (C,). In training they may be None, else they become
            (1 - momentum) * running + momentum * batch, in place (of the variance: the unbiased).
        weight, bias: (C,), or None for 1 and 0. These and the running statistics share one dtype:
            input's, or float32 beside a 16-bit input.
        training: whether the batch's own statistics are used, which takes more than one number per
            channel.
        momentum, eps: real numbers.
        activation: "relu" or "none".
        residual: of input's shape and dtype, added before the activation.

    Returns:
        input's shape and dtype, channels_last when input is, else contiguous.

    Raises:
        TypeError, ValueError (also RuntimeError, torch's own kind): naming the argument.

    Source: Ioffe and Szegedy 2015, "Batch normalization"; He et al. 2016, "Deep residual learning",
    for where the residual is added.

    Example:
        >>> images, residual = torch.randn(2, 8, 64, 16, 16).unbind()
        >>> mean, var = torch.zeros(64), torch.ones(64)
        >>> bigops.batch_norm_act(images, mean, var, training=True, residual=residual).shape
        torch.Size([8, 64, 16, 16])
    """
    tensors = (input, weight, bias, residual, running_mean, running_var)
    options = (training, momentum, eps, activation)
    if (known := route.find(OP, tensors, options)) is not None:
        out, mean, var = known(*tensors)
    else:
        _check(*tensors, *options)
        call = (*tensors, training, eps, activation == "relu")
        if not is_fast(OP, call):
            return reference(
                input, running_mean, running_var, weight, bias,
                training, momentum, eps, activation, residual,
            )  # fmt: skip
        route.leave(OP, tensors, options, call)
        out, mean, var = OP.call(*call)
    if training and input.numel():
        for running, found in ((running_mean, mean), (running_var, var)):
            if running is not None:
                _update(running, found, momentum)
    return out


def _update(running: Tensor, found: Tensor, momentum: float) -> None:
    with torch.no_grad():
        running.lerp_(found if found.dtype == running.dtype else found.to(running.dtype), momentum)


def _check(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
) -> None:
    arguments.tensor("input", input)
    if input.dim() < 2:
        raise ArgumentError(f"input must have 2 dimensions or more, got shape {tuple(input.shape)}")
    arguments.alike(input=input, residual=_dense("residual", residual))
    if residual is not None and residual.shape != input.shape:
        raise ArgumentError(
            f"residual must have input's shape {tuple(input.shape)}, got {tuple(residual.shape)}"
        )
    if not isinstance(training, bool):
        raise TypeError(f"training must be a bool, got {training!r}")
    arguments.number("momentum", momentum)
    arguments.number("eps", eps)
    if activation not in ACTIVATIONS:
        raise ArgumentError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    _check_parameters(
        input,
        running_mean=running_mean,
        running_var=running_var,
        weight=weight,
        bias=bias,
    )
    if not training and (running_mean is None or running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ArgumentError(f"{missing} must be a tensor unless training, got None")
    if training and input.numel() == input.shape[1] > 0:
        raise ArgumentError(
            f"input must have more than 1 value per channel when training, got {tuple(input.shape)}"
        )


def _dense(name: str, value: Tensor | None) -> Tensor | None:
    if value is not None:
        arguments.tensor(name, value)
    return value


def _check_parameters(input: Tensor, **parameters: Tensor | None) -> None:
    shared: torch.dtype | None = None
    for name, given in parameters.items():
        if given is None:
            continue
        arguments.tensor(name, given, dims=1)
        if given.shape[0] != input.shape[1]:
            raise ArgumentError(
                f"{name} must have input's {input.shape[1]} channels, got {given.shape[0]}"
            )
        allowed = {input.dtype} if shared is None else {shared}
        if shared is None and input.dtype in (torch.bfloat16, torch.float16):
            allowed.add(torch.float32)
        if given.dtype not in allowed:
            wanted = " or ".join(sorted(map(str, allowed)))
            raise ArgumentError(f"{name} must be {wanted}, got {given.dtype}")
        shared = given.dtype
        if given.device != input.device:
            raise ArgumentError(
                f"{name} must be on input's device {input.device}, got {given.device}"
            )


def layout(input: Tensor) -> torch.memory_format:
    """How the output and all gradients lie."""
    if input.dim() == 4 and is_channels_last(input):
        return torch.channels_last
    deep = input.dim() == 5 and not input.is_contiguous()
    if deep and input.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def laid(t: Tensor | None, like: torch.memory_format) -> Tensor | None:
    """`t` in that layout; a copy only if it is in another."""
    if t is None or t.is_contiguous(memory_format=like):
        return t
    return torch.empty_like(t, memory_format=like).copy_(t)


def statistics_dtype(input: Tensor) -> torch.dtype:
    """Of mean and variance: float32, float64 for float64."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _fake(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty_like(input, memory_format=layout(input))
    channels, dtype = input.shape[1] if training else 0, statistics_dtype(input)
    mean, var = (input.new_empty(channels, dtype=dtype) for _ in range(2))
    return out, mean, var


def _backward_fake(
    grad_out: Tensor,
    input: Tensor,
    out: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
    relu: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    dtype = mean.dtype if weight is None else weight.dtype
    return (
        torch.empty_like(input, memory_format=layout(input)) if needs[0] else None,
        input.new_empty(input.shape[1], dtype=dtype) if needs[1] else None,
        input.new_empty(input.shape[1], dtype=dtype) if needs[2] else None,
        torch.empty_like(input, memory_format=layout(input)) if needs[3] else None,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, weight, _, _, *running, training, eps, relu = inputs
    out, *batch = output
    ctx.save_for_backward(input, out, weight, *(batch if training else running))
    ctx.options = training, eps, relu
    ctx.mark_non_differentiable(*batch)
    ctx.set_materialize_grads(False)


def _backward_args(ctx: Any, grad_out: Tensor | None, *rest: Any) -> Any:
    if grad_out is None:
        return None
    return (grad_out, *ctx.saved_tensors, *ctx.options, ctx.needs_input_grad[:4])


def _forward_args(
    grad_out: Tensor, input: Tensor, out: Tensor, weight: Tensor | None, *rest: Any
) -> Any:
    mean, var, *options, _ = rest
    return (input, weight, None, None, mean, var, *options)


def _native_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    how = layout(input)
    out, mean, var = _fake(
        input, weight, bias, residual, running_mean, running_var, training, eps, relu
    )
    used = (mean, var) if training else (running_mean, running_var)
    native.kernels.batch_norm_act_forward(
        laid(input, how), laid(residual, how), weight, bias, *used, out,
        training, relu, how is not torch.contiguous_format, eps,
    )  # fmt: skip
    return out, mean, var


def _native_backward(
    grad_out: Tensor,
    input: Tensor,
    out: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
    relu: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    how = layout(input)
    grads = _backward_fake(grad_out, input, out, weight, mean, var, training, eps, relu, needs)
    grad_input, grad_weight, grad_bias, grad_residual = grads
    native.kernels.batch_norm_act_backward(
        laid(grad_out, how), laid(input, how), out, weight, mean, var,
        grad_input, grad_weight, grad_bias, grad_residual,
        training, relu, how is not torch.contiguous_format, eps,
    )  # fmt: skip
    return grads


def _native_why_not(input: Tensor, *rest: Any) -> str | None:
    if input.dtype not in (*DTYPES, torch.float64):
        return f"dtype {input.dtype}"
    return native.why_not()


def _triton_why_not(input: Tensor, *rest: Any) -> str | None:
    if reason := triton.why_not(input.device.type):
        return reason
    from ..kernels import batch_norm_act as kernels

    return kernels.why_not(input)


def _triton_forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels import batch_norm_act as kernels

    how = layout(input)
    rows = (_dense_row(row) for row in (weight, bias))
    running = (_dense_row(row) for row in rest[:2])
    return kernels.forward(
        laid(input, how), *rows, laid(residual, how), *running, *rest[2:],
        how is not torch.contiguous_format,
    )  # fmt: skip


def _triton_backward(
    grad_out: Tensor, input: Tensor, out: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    from ..kernels import batch_norm_act as kernels

    how = layout(input)
    rows = (_dense_row(row) for row in rest[:3])
    return kernels.backward(
        laid(grad_out, how), laid(input, how), out, *rows, *rest[3:],
        how is not torch.contiguous_format,
    )  # fmt: skip


def _dense_row(row: Tensor | None) -> Tensor | None:
    return laid(row, torch.contiguous_format)


def _reference_bytes(input: Tensor, weight: Any, bias: Any, residual: Any, *rest: Any) -> int:
    return input.numel() * input.element_size() * (2 if residual is None else 3)


OP = declare(
    Op(
        name="batch_norm_act",
        schema="(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, "
        "Tensor? running_mean, Tensor? running_var, bool training, float eps, bool relu) "
        "-> (Tensor, Tensor, Tensor)",
        backward_schema="(Tensor grad_out, Tensor input, Tensor out, Tensor? weight, Tensor mean, "
        "Tensor var, bool training, float eps, bool relu, bool[] needs) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        function=batch_norm_act,
        eager=cases.eager,
        backends=(
            Backend("native", ("cpu",), _native_why_not, _native_forward, _native_backward, ATEN),
            Backend(
                "triton", ("cuda", "cpu"), _triton_why_not, _triton_forward, _triton_backward, ATEN
            ),
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
        configurations=configurations.batch_norm_act,
        mutates=("running_mean", "running_var"),
        dtypes=DTYPES,
        cost=cases.cost,
        reference_bytes=_reference_bytes,
    )
)
