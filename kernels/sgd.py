"""Stochastic gradient descent with momentum over a list of tensors in one launch.

    g = f * grad (+ l2 * p);  b = momentum * b + (1 - dampening) * g  (the first time b = g)
    p = p - lr * b            (Nesterov: p - lr * (g + momentum * b))

torch.optim.SGD's form of Polyak's and Nesterov's momentum (Sutskever et al. 2013). With momentum
the update reads three streams and writes two and is as fast as memory; a launch takes any number of
tensors (step_table.py), and clipping is a factor that it reads from the device, as adam.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .adam import grad_norm
from .step_table import (
    CHUNK,
    COLUMNS,
    SIZE,
    copy_back,
    dense_copies,
    factor_of,
    plan_of,
    pointer,
)


@triton.jit
def _rule(
    p, g, b, lr, momentum, weight, l2,
    COUPLED: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """The update rule, in float32."""
    if COUPLED:
        g += l2 * p
    if MOMENTUM:
        b = g if FIRST else momentum * b + weight * g
        g = g + momentum * b if NESTEROV else b
    return p - lr * g, b


@triton.jit
def sgd_kernel(
    table, chunk_tensor, chunk_index, norm_ptr, scale_ptr,
    sign, max_grad_norm, lr, momentum, weight, l2,
    DTYPE: tl.constexpr, ALIGN: tl.constexpr, COUPLED: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    row = table + tl.load(chunk_tensor + chunk) * COLUMNS
    start = tl.load(chunk_index + chunk).to(tl.int64) * CHUNK
    p_ptr = pointer(row, start, 0, DTYPE, ALIGN)
    g_ptr = pointer(row, start, 1, DTYPE, ALIGN)
    b_ptr = pointer(row, start, 2, DTYPE, ALIGN)
    factor = factor_of(sign, norm_ptr, scale_ptr, max_grad_norm)
    rest = tl.minimum(tl.load(row + SIZE) - start, CHUNK).to(tl.int32)
    for block in range(0, rest, BLOCK):
        offs = block + tl.arange(0, BLOCK)
        # A mask keeps accesses narrow, so only a tensor's last block has one.
        if block + BLOCK <= rest:
            p = tl.load(p_ptr + offs).to(tl.float32)
            g = tl.load(g_ptr + offs).to(tl.float32) * factor
            b = tl.load(b_ptr + offs).to(tl.float32) if MOMENTUM and not FIRST else g
            p, b = _rule(p, g, b, lr, momentum, weight, l2, COUPLED, MOMENTUM, NESTEROV, FIRST)
            tl.store(p_ptr + offs, p.to(DTYPE))
            if MOMENTUM:
                tl.store(b_ptr + offs, b.to(DTYPE))
        else:
            mask = offs < rest
            p = tl.load(p_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            g = tl.load(g_ptr + offs, mask=mask, other=0.0).to(tl.float32) * factor
            if MOMENTUM and not FIRST:
                b = tl.load(b_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            else:
                b = g
            p, b = _rule(p, g, b, lr, momentum, weight, l2, COUPLED, MOMENTUM, NESTEROV, FIRST)
            tl.store(p_ptr + offs, p.to(DTYPE), mask=mask)
            if MOMENTUM:
                tl.store(b_ptr + offs, b.to(DTYPE), mask=mask)


def sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    options: Any,
    alike: Any = None,
) -> None:
    """One step in place, a launch per dtype; `options` as in bigops.ops.sgd.

    alike: equal for calls whose tensors agree in shapes, strides, dtypes and devices; or None.
    """
    norm = options.total_norm
    if options.max_grad_norm is None:
        norm = None
    elif norm is None:
        norm = grad_norm(grads, alike)
    momentum = float(options.momentum)
    roles = [params, grads, momentum_buffers] if momentum != 0 else [params, grads]
    plan = plan_of(roles, None if alike is None else ("sgd", len(roles), alike))
    roles, copies = dense_copies(plan, roles)
    for part in plan.parts:
        part.launch(
            sgd_kernel,
            roles,
            None,
            norm,
            options.grad_scale,
            -1.0 if options.maximize else 1.0,
            0.0 if norm is None else float(options.max_grad_norm),
            float(options.lr),
            momentum,
            1.0 - options.dampening,
            float(options.weight_decay),
            COUPLED=options.weight_decay != 0,
            MOMENTUM=momentum != 0,
            NESTEROV=options.nesterov,
            FIRST=options.is_first_step,
        )
    copy_back(copies, grads)
