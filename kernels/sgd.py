"""Stochastic gradient descent with momentum over a list of tensors in one launch.

    g = f * grad (+ l2 * p);  b = momentum * b + (1 - dampening) * g  (the first time b = g)
    p = p - lr * b            (Nesterov: p - lr * (g + momentum * b))

torch.optim.SGD's form of Polyak's and Nesterov's momentum (Sutskever et al. 2013). With momentum
the update reads three streams and writes two and is as fast as memory; a launch takes any number of
tensors (step_table.py) with buffers in any form (step_walk.py), and what clips, scales or skips and
a tensor's learning rate are read from the device, as adam.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .grad_norm import read_there
from .step_table import (
    COPY,
    GRAD,
    NUMBER,
    PARAM,
    SCALES,
    STATE,
    copy_back,
    dense_copies,
    plan_of,
    rate,
    to_device,
)
from .step_walk import (
    factor_of,
    load,
    load_state,
    offsets,
    pointer,
    row_of,
    scales_of,
    store_param,
    store_state,
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
def _update(
    p_ptr, g_ptr, b_ptr, copy_ptr, scales, block, rest, mask, seed, number, start,
    factor, lr, momentum, weight, l2,
    COUPLED: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of elements; mask: None where they are all there."""
    offs = offsets(block, scales, BLOCK)
    p = load(p_ptr + offs, mask)
    g = load(g_ptr + offs, mask) * factor
    b = load_state(b_ptr, scales, offs, mask, block, rest, True) if MOMENTUM and not FIRST else g
    p, b = _rule(p, g, b, lr, momentum, weight, l2, COUPLED, MOMENTUM, NESTEROV, FIRST)
    store_param(p_ptr, copy_ptr, p, offs, mask, seed, number, start + block, BLOCK)
    if MOMENTUM:
        store_state(b_ptr, scales, b, offs, mask, block, rest, True)


@triton.jit
def sgd_kernel(
    table, chunk_tensor, chunk_index, norm_ptr, scale_ptr, found_inf_ptr, sign, max_grad_norm,
    seed_ptr, lr_ptr, lr, momentum, weight, l2,
    PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, STATE_DTYPE: tl.constexpr,
    COPY_DTYPE: tl.constexpr, ALIGNED: tl.constexpr, COUPLED: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, rest = row_of(table, chunk_tensor, chunk_index, found_inf_ptr)
    p_ptr = pointer(row, start, PARAM, PARAM_DTYPE, ALIGNED)
    g_ptr = pointer(row, start, GRAD, GRAD_DTYPE, ALIGNED)
    b_ptr = pointer(row, start, STATE, STATE_DTYPE, ALIGNED) if MOMENTUM else None
    copy_ptr = pointer(row, start, COPY, COPY_DTYPE, ALIGNED) if COPY_DTYPE is not None else None
    scales = scales_of(row, start, SCALES, STATE_DTYPE)
    seed = tl.load(seed_ptr) if seed_ptr is not None else None
    number = tl.load(row + NUMBER).to(tl.int32)
    rate = tl.load(lr_ptr).to(tl.float32) if lr_ptr is not None else lr
    factor = factor_of(sign, norm_ptr, scale_ptr, max_grad_norm)
    for block in range(0, rest, BLOCK):
        # A mask keeps accesses narrow, so only a tensor's last block has one.
        if block + BLOCK <= rest:
            _update(
                p_ptr, g_ptr, b_ptr, copy_ptr, scales, block, rest, None, seed, number, start,
                factor, rate, momentum, weight, l2, COUPLED, MOMENTUM, NESTEROV, FIRST, BLOCK,
            )  # fmt: skip
        else:
            mask = offsets(block, scales, BLOCK) < rest
            _update(
                p_ptr, g_ptr, b_ptr, copy_ptr, scales, block, rest, mask, seed, number, start,
                factor, rate, momentum, weight, l2, COUPLED, MOMENTUM, NESTEROV, FIRST, BLOCK,
            )  # fmt: skip


def sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    options: Any,
    alike: Any = None,
) -> None:
    """One step in place, a launch for each combination of dtypes; `options` as in bigops.ops.sgd.

    alike: equal for calls whose tensors agree in shapes, strides, dtypes and devices; or None.
    """
    device = params[0].device
    momentum = float(options.momentum)
    lr, lr_ptr = rate(options.lr, device)
    scalars = read_there(options, options.found_inf, grads, device, alike)
    roles = {PARAM.value: params, GRAD.value: grads}
    if momentum != 0:
        roles[STATE.value] = momentum_buffers
        if options.momentum_buffer_scales is not None:
            roles[SCALES.value] = options.momentum_buffer_scales
    if options.low_precision_params is not None:
        roles[COPY.value] = options.low_precision_params
    plan = plan_of(roles, alike)
    roles, copies = dense_copies(plan, roles)
    for part in plan.parts:
        table, aligned = part.filled(roles)
        part.launch(
            sgd_kernel,
            to_device(table, device),
            aligned,
            *scalars,
            part.seed(options.rounding_seed),
            lr_ptr,
            lr,
            momentum,
            1.0 - options.dampening,
            float(options.weight_decay),
            COUPLED=options.weight_decay != 0,
            MOMENTUM=momentum != 0,
            NESTEROV=options.nesterov,
            FIRST=options.is_first_step,
        )
    copy_back(copies)
