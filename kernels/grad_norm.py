"""The norm of gradients, by which the optimizers' kernels clip.

A program writes its chunk's sum of squares, then one program adds these up in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import hardware
from .launch import launch
from .step_table import BLOCK, GRAD, NUM_WARPS, dense_copies, plan_of, to_device
from .step_walk import pointer, row_of


@triton.jit
def squares_kernel(
    table, chunk_tensor, chunk_index, sums,
    GRAD_DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, rest = row_of(table, chunk_tensor, chunk_index, None)
    g_ptr = pointer(row, start, GRAD, GRAD_DTYPE, ALIGNED)
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for block in range(0, rest, BLOCK):
        offs = block + tl.arange(0, BLOCK)
        if block + BLOCK <= rest:
            g = tl.load(g_ptr + offs).to(tl.float32)
        else:
            g = tl.load(g_ptr + offs, mask=offs < rest, other=0.0).to(tl.float32)
        acc += g * g
    tl.store(sums + tl.program_id(0), tl.sum(acc, axis=0).to(tl.float64))


@triton.jit
def norm_kernel(sums, out, count, BLOCK: tl.constexpr):
    acc = tl.zeros([BLOCK], dtype=tl.float64)
    for block in range(0, count, BLOCK):
        offs = block + tl.arange(0, BLOCK)
        acc += tl.load(sums + offs, mask=offs < count, other=0.0)
    tl.store(out, tl.sqrt(tl.sum(acc, axis=0)).to(tl.float32))


def grad_norm(grads: Sequence[Tensor], alike: Any = None) -> Tensor:
    """The 2-norm of all gradients taken as one vector: float32, without dimensions.

    alike: equal for calls whose tensors agree in shapes, strides, dtypes and devices; or None.
    """
    plan = plan_of({GRAD.value: grads}, alike)
    roles, _ = dense_copies(plan, {GRAD.value: grads})
    device = grads[0].device if grads else torch.device("cpu")
    counts = [len(part.tensor) for part in plan.parts]
    if not sum(counts):
        return torch.zeros((), dtype=torch.float32, device=device)
    out = torch.empty((), dtype=torch.float32, device=device)
    sums = torch.empty(sum(counts), dtype=torch.float64, device=device)
    for part, own in zip(plan.parts, sums.split(counts), strict=True):
        table, aligned = part.filled(roles)
        part.launch(squares_kernel, to_device(table, device), aligned, own)
    with hardware.guard(device):
        launch(
            norm_kernel, (1,),
            sums, out, len(sums), BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def read_there(
    options: Any,
    found_inf: Tensor | None,
    grads: Sequence[Tensor],
    device: torch.device,
    alike: Any,
) -> tuple[Any, ...]:
    """What clips, scales and skips, in the order of the kernels' arguments."""
    norm = options.total_norm
    if options.max_grad_norm is None:
        norm = None
    elif norm is None:
        norm = grad_norm(grads, alike)
    on_device = (None if t is None else t.to(device) for t in (norm, options.grad_scale, found_inf))
    return (
        *on_device,
        -1.0 if options.maximize else 1.0,
        0.0 if norm is None else float(options.max_grad_norm),
    )
