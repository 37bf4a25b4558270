"""adam and grad_norm on CUDA tensors by the CUDA C++ kernels (csrc/cuda/adam.h)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import cuda
from . import dispatch
from .adam_arguments import Options, check
from .step_arguments import WIDE, check_grads, check_low_precision

# What the kernel fills low_precision_params of, beside float32 parameters.
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


def adam(*args: Any) -> None:
    """One step in place."""
    *lists, options = args
    try:
        _step(lists, options)
    except Exception:
        # The kernel refuses in a few words what is wrong before it writes; the slow check names it.
        check(*args)
        raise


def _step(lists: list[list[Tensor]], options: Options) -> None:
    kernels, device = cuda.kernels(), lists[0][0].device
    steps_here = [step.is_cuda for step in lists[5]]
    # What is counted on the CPU has to be known there.
    if options.found_inf is not None and not all(steps_here) and options.found_inf.item() != 0.0:
        return
    numbers = _numbers(lists[1], options, device)
    workspace = None
    if any(steps_here) or isinstance(numbers[0], Tensor):
        size = kernels.adam_workspace(len(lists[0]))
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
    *lists, steps = lists
    copies = _copies(lists[0], options)
    odd = kernels.adam(*lists, steps, *numbers, copies, workspace)
    if odd:  # and nothing is done yet: such tensors are copied to the kernel and back
        given = (*lists, copies or [])
        *dense, low = filled = [_dense(tensors, odd) for tensors in given]
        kernels.adam(*dense, steps, *numbers, None if copies is None else low, workspace)
        for role, tensors in enumerate(given):
            for i in odd if tensors and role != 1 else ():
                if filled[role][i] is not tensors[i]:
                    tensors[i].copy_(filled[role][i])
    if copies is None:
        _copy_later(lists[0], options)


def _copies(params: list[Tensor], options: Options) -> list[Tensor] | None:
    """low_precision_params, if the kernel fills them."""
    copies = options.low_precision_params
    if copies is None:
        return None
    check_low_precision(params, copies)
    of_params, of_copies = ({t.dtype for t in tensors} for tensors in (params, copies))
    return copies if of_params == {torch.float32} and of_copies <= set(COPIES) else None


def _copy_later(params: list[Tensor], options: Options) -> None:
    skipped = options.found_inf
    for copy, param in zip(options.low_precision_params or (), params, strict=False):
        rounded = param.to(copy.dtype)
        if skipped is not None:
            rounded = torch.where(skipped.to(param.device).reshape(()) != 0, copy, rounded)
        copy.copy_(rounded)


def grad_norm(grads: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients taken as one vector: float32, without dimensions."""
    try:
        kernels, device = cuda.kernels(), grads[0].device
        size = kernels.grad_norm_workspace(len(grads), sum(map(Tensor.numel, grads)))
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        out = torch.empty((), dtype=torch.float32, device=device)
        odd = kernels.grad_norm(grads, out, workspace)
        if odd:
            kernels.grad_norm(_dense(grads, odd), out, workspace)
    except Exception:
        check_grads(grads)
        raise
    return out


def _dense(tensors: Sequence[Tensor], odd: Sequence[int]) -> list[Tensor]:
    """The same, those that have gaps or an order of their own replaced."""
    dense = list(tensors)
    for i in odd if dense else ():
        dense[i] = dense[i].contiguous()
    return dense


def _numbers(grads: list[Tensor], options: Options, device: torch.device) -> tuple[Any, ...]:
    """The options as the kernel takes them: numbers, and on the device what is there already."""
    lr: Any = options.lr
    if isinstance(lr, Tensor):
        lr = (lr if lr.dtype in WIDE else lr.float()) if lr.is_cuda else lr.item()
    norm = options.total_norm
    if options.max_grad_norm is None:
        norm = None
    elif norm is None:
        norm = grad_norm(grads)
    scalars = (norm, options.grad_scale, options.found_inf)
    return (
        lr,
        options.beta1,
        options.beta2,
        options.eps,
        options.weight_decay,
        options.decoupled_weight_decay,
        options.amsgrad,
        options.maximize,
        options.max_grad_norm,
        *(None if s is None else s.to(device, torch.float32) for s in scalars),
    )
