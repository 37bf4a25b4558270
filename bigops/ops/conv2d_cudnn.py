"""conv2d_act on a GPU by cuDNN's convolution and one pass of our own on either side of it.

What native is on a CPU, where oneDNN has the products: bias, residual and activation in a single
reading of the convolution's output; their gradients in one writing before the products'.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import triton
from .conv2d_arguments import memory_format
from .conv2d_native import laid_out

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def serves(input: Tensor) -> bool:
    """Whether the call is a GPU's; in the compile ledger a tensor on the CPU stands for one."""
    return input.is_cuda or triton.is_compiling()


def why_not(input: Tensor) -> str | None:
    """None when cuDNN's convolution and our passes serve the call, else the reason."""
    if reason := triton.why_not(input.device.type):
        return reason
    return None if input.dtype in DTYPES else f"dtype {input.dtype}"


def forward(
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
    """The output, and what the activation was given, of no elements unless to be kept."""
    from ..kernels import conv2d_act as kernels

    layout = memory_format(input, weight)
    out = torch.convolution(input, weight, None, stride, padding, dilation, False, [0, 0], groups)
    out = laid_out(out, layout)
    pre = torch.empty_like(out) if keep else out.new_empty(0)
    if (bias, residual, activation) != (None, None, "none"):
        kernels.activate_(out, bias, residual, pre if keep else None, layout, activation)
    return out, pre


def backward(
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
    """Gradients of input, weight, bias and residual; None where not needed."""
    from ..kernels import conv2d_act as kernels

    layout, grad = memory_format(input, weight), grad_out
    if activation != "none":
        grad = kernels.activation_gradient(grad_out, saved, layout, activation)
    grads: Sequence[Tensor | None] = (None, None, None)
    if any(needs[:3]):
        grads = torch.ops.aten.convolution_backward.default(
            grad, input, weight, weight.shape[:1], stride, padding, dilation, False, [0, 0],
            groups, list(needs[:3]),
        )  # fmt: skip
    grad_input, grad_weight = (None if g is None else laid_out(g, layout) for g in grads[:2])
    residual = None
    if needs[3]:
        residual = laid_out(grad, layout)
        residual = residual.clone() if residual is grad_out else residual
    return grad_input, grad_weight, grads[2] if needs[2] else None, residual
