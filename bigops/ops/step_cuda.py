"""What the optimizers' steps share on CUDA tensors, and grad_norm, by the CUDA C++ kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import cuda
from . import dispatch
from .step import Named
from .step_arguments import WIDE, check_grads, check_low_precision

# What the kernels fill low_precision_params of, beside float32 parameters.
COPIES = (torch.bfloat16, torch.float16)


def why_not(op: str, tensors: Sequence[Tensor]) -> str | None:
    """None when the kernels serve these tensors, else the reason."""
    if reason := cuda.why_not():
        return reason
    device = tensors[0].device
    if cuda.capability(device) < (8, 0):
        return "architectures before sm_80"
    if dispatch.forced() != "native" and (reason := cuda.unproven(op, device)):
        return reason
    if torch.float64 in {tensor.dtype for tensor in tensors}:
        return "dtype torch.float64"
    return None


def update(
    kernel: Callable[..., list[int]], lists: Sequence[list[Tensor]], options: Any, *rest: Any
) -> None:
    """kernel(*lists, low_precision_params, *rest), which refuses tensors that have gaps or an order
    of their own: such are copied to it and, but for gradients, back."""
    copies = _copies(lists[0], options)
    odd = kernel(*lists, copies, *rest)
    if odd:  # and nothing is done yet
        given = (*lists, copies or [])
        *filled, low = dense = [_dense(tensors, odd) for tensors in given]
        kernel(*filled, None if copies is None else low, *rest)
        for role, tensors in enumerate(given):
            for i in odd if tensors and role != 1 else ():
                if dense[role][i] is not tensors[i]:
                    tensors[i].copy_(dense[role][i])
    if copies is None:
        _copy_later(lists[0], options)


def _copies(params: list[Tensor], options: Any) -> list[Tensor] | None:
    """low_precision_params, if the kernel fills them."""
    copies: list[Tensor] | None = options.low_precision_params
    if copies is None:
        return None
    check_low_precision(params, copies)
    of_params, of_copies = ({t.dtype for t in tensors} for tensors in (params, copies))
    return copies if of_params == {torch.float32} and of_copies <= set(COPIES) else None


def _copy_later(params: list[Tensor], options: Any) -> None:
    skipped = options.found_inf
    for copy, param in zip(options.low_precision_params or (), params, strict=False):
        rounded = param.to(copy.dtype)
        if skipped is not None:
            rounded = torch.where(skipped.to(param.device).reshape(()) != 0, copy, rounded)
        copy.copy_(rounded)


def grad_norm(grads: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients taken as one vector: float32, without dimensions."""
    with Named(check_grads, grads):
        kernels, device = cuda.kernels(), grads[0].device
        size = kernels.grad_norm_workspace(len(grads), sum(map(Tensor.numel, grads)))
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        out = torch.empty((), dtype=torch.float32, device=device)
        odd = kernels.grad_norm(grads, out, workspace)
        if odd:
            kernels.grad_norm(_dense(grads, odd), out, workspace)
    return out


def _dense(tensors: Sequence[Tensor], odd: Sequence[int]) -> list[Tensor]:
    """The same, those that have gaps or an order of their own replaced."""
    dense = list(tensors)
    for i in odd if dense else ():
        dense[i] = dense[i].contiguous()
    return dense


def rate(lr: float | Tensor) -> float | Tensor:
    """As the kernels take it: a tensor if it is on the device already."""
    if not isinstance(lr, Tensor):
        return lr
    if not lr.is_cuda:
        return float(lr.item())
    return lr if lr.dtype in WIDE else lr.float()


def scalars(grads: list[Tensor], options: Any, device: torch.device) -> tuple[Any, ...]:
    """max_grad_norm, and what the kernels read on the device."""
    norm = options.total_norm
    if options.max_grad_norm is None:
        norm = None
    elif norm is None:
        norm = grad_norm(grads)
    found = (norm, options.grad_scale, options.found_inf)
    on_device = (None if s is None else s.to(device, torch.float32) for s in found)
    return options.max_grad_norm, *on_device
