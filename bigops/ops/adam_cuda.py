"""adam on CUDA tensors by the CUDA C++ kernels (csrc/cuda/adam.h)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import cuda
from .adam_arguments import Options, check
from .step import Named
from .step_cuda import grad_norm, rate, scalars, update, why_not

__all__ = ["adam", "grad_norm", "why_not"]


def adam(*args: Any) -> None:
    """One step in place."""
    *lists, options = args
    with Named(check, *args):
        _step(lists, options)


def _step(lists: list[list[Tensor]], options: Options) -> None:
    kernels, device = cuda.kernels(), lists[0][0].device
    *lists, steps = lists
    steps_here = [step.is_cuda for step in steps]
    # What is counted on the CPU has to be known there.
    if options.found_inf is not None and not all(steps_here) and options.found_inf.item() != 0.0:
        return
    lr, workspace = rate(options.lr), None
    if any(steps_here) or isinstance(lr, Tensor):
        size = kernels.adam_workspace(len(steps))
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
    update(
        kernels.adam,
        lists,
        options,
        steps,
        lr,
        options.beta1,
        options.beta2,
        options.eps,
        options.weight_decay,
        options.decoupled_weight_decay,
        options.amsgrad,
        options.maximize,
        *scalars(lists[1], options, device),
        workspace,
    )
