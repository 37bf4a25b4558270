"""Adam, AdamW and AMSGrad over a list of tensors in one launch, and the norm that clips it.

    g = f * grad (+ l2 * p);  m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2
    p = p - (decay * p + step_size * m / (sqrt(v) / sqrt(1 - beta2^t) + eps))

(Kingma and Ba 2015, arXiv:1412.6980; Loshchilov and Hutter 2019, arXiv:1711.05101). The update
reads four streams and writes three and is as fast as memory; a launch takes any number of tensors
(step_table.py).

The norm goes before it: a program writes its chunk's sum of squares, then one program adds these up
in a fixed order. Clipping is a factor that the update reads from the device, so nothing waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import hardware
from .launch import launch
from .step_table import (
    BLOCK,
    CHUNK,
    COLUMNS,
    CORRECTION,
    NUM_WARPS,
    SIZE,
    STEP_SIZE,
    copy_back,
    dense_copies,
    factor_of,
    number_of,
    plan_of,
    pointer,
)

# Private, though torch.optim lives by it.
_foreach_add = getattr(torch, "_foreach_add_", None)


@triton.jit
def _rule(
    p, g, m, v, top, l2, decay, weight1, beta2_high, beta2_low, weight2, step_size, correction, eps,
    COUPLED: tl.constexpr, MOSTLY_OLD: tl.constexpr, AMSGRAD: tl.constexpr,
):  # fmt: skip
    """The update rule, in float32."""
    if COUPLED:
        g += l2 * p
    # Interpolated from the end that weighs more, which keeps its digits.
    m = m + weight1 * (g - m) if MOSTLY_OLD else g + weight1 * (m - g)
    v = beta2_high * v + (beta2_low * v + weight2 * (g * g))
    top = tl.maximum(top, v) if AMSGRAD else v
    denominator = tl.sqrt_rn(top) * correction + eps
    # Not (1 - decay) * p, where all steps would share the rounding of 1 - decay.
    return p - (decay * p + step_size * tl.div_rn(m, denominator)), m, v, top


@triton.jit
def adam_kernel(
    table, chunk_tensor, chunk_index, norm_ptr, scale_ptr,
    sign, max_grad_norm, l2, decay, weight1, beta2_high, beta2_low, weight2, eps,
    DTYPE: tl.constexpr, ALIGN: tl.constexpr, COUPLED: tl.constexpr, MOSTLY_OLD: tl.constexpr,
    AMSGRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    row = table + tl.load(chunk_tensor + chunk) * COLUMNS
    start = tl.load(chunk_index + chunk).to(tl.int64) * CHUNK
    size = tl.load(row + SIZE)
    p_ptr = pointer(row, start, 0, DTYPE, ALIGN)
    g_ptr = pointer(row, start, 1, DTYPE, ALIGN)
    m_ptr = pointer(row, start, 2, DTYPE, ALIGN)
    v_ptr = pointer(row, start, 3, DTYPE, ALIGN)
    top_ptr = pointer(row, start, 4, DTYPE, ALIGN)
    step_size, correction = number_of(row, STEP_SIZE), number_of(row, CORRECTION)
    factor = factor_of(sign, norm_ptr, scale_ptr, max_grad_norm)
    rest = tl.minimum(size - start, CHUNK).to(tl.int32)
    for block in range(0, rest, BLOCK):
        offs = block + tl.arange(0, BLOCK)
        # A mask keeps accesses narrow, so only a tensor's last block has one.
        if block + BLOCK <= rest:
            p = tl.load(p_ptr + offs).to(tl.float32)
            g = tl.load(g_ptr + offs).to(tl.float32) * factor
            m = tl.load(m_ptr + offs).to(tl.float32)
            v = tl.load(v_ptr + offs).to(tl.float32)
            top = tl.load(top_ptr + offs).to(tl.float32) if AMSGRAD else v
            p, m, v, top = _rule(
                p, g, m, v, top, l2, decay, weight1, beta2_high, beta2_low, weight2, step_size,
                correction, eps, COUPLED, MOSTLY_OLD, AMSGRAD,
            )  # fmt: skip
            tl.store(p_ptr + offs, p.to(DTYPE))
            tl.store(m_ptr + offs, m.to(DTYPE))
            tl.store(v_ptr + offs, v.to(DTYPE))
            if AMSGRAD:
                tl.store(top_ptr + offs, top.to(DTYPE))
        else:
            mask = offs < rest
            p = tl.load(p_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            g = tl.load(g_ptr + offs, mask=mask, other=0.0).to(tl.float32) * factor
            m = tl.load(m_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(v_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            top = tl.load(top_ptr + offs, mask=mask, other=0.0).to(tl.float32) if AMSGRAD else v
            p, m, v, top = _rule(
                p, g, m, v, top, l2, decay, weight1, beta2_high, beta2_low, weight2, step_size,
                correction, eps, COUPLED, MOSTLY_OLD, AMSGRAD,
            )  # fmt: skip
            tl.store(p_ptr + offs, p.to(DTYPE), mask=mask)
            tl.store(m_ptr + offs, m.to(DTYPE), mask=mask)
            tl.store(v_ptr + offs, v.to(DTYPE), mask=mask)
            if AMSGRAD:
                tl.store(top_ptr + offs, top.to(DTYPE), mask=mask)


@triton.jit
def squares_kernel(
    table, chunk_tensor, chunk_index, sums,
    DTYPE: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    row = table + tl.load(chunk_tensor + chunk) * COLUMNS
    start = tl.load(chunk_index + chunk).to(tl.int64) * CHUNK
    g_ptr = pointer(row, start, 1, DTYPE, ALIGN)
    rest = tl.minimum(tl.load(row + SIZE) - start, CHUNK).to(tl.int32)
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for block in range(0, rest, BLOCK):
        offs = block + tl.arange(0, BLOCK)
        if block + BLOCK <= rest:
            g = tl.load(g_ptr + offs).to(tl.float32)
        else:
            g = tl.load(g_ptr + offs, mask=offs < rest, other=0.0).to(tl.float32)
        acc += g * g
    tl.store(sums + chunk, tl.sum(acc, axis=0).to(tl.float64))


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
    plan = plan_of([grads], None if alike is None else ("norm", alike))
    grads = list(grads)
    for i in plan.copied:
        grads[i] = grads[i].contiguous()
    device = grads[0].device if grads else torch.device("cpu")
    counts = [len(part.tensor) for part in plan.parts]
    if not sum(counts):
        return torch.zeros((), dtype=torch.float32, device=device)
    out = torch.empty((), dtype=torch.float32, device=device)
    sums = torch.empty(sum(counts), dtype=torch.float64, device=device)
    for part, own in zip(plan.parts, sums.split(counts), strict=True):
        part.launch(squares_kernel, [[], grads], None, own)
    with hardware.guard(device):
        launch(
            norm_kernel, (1,),
            sums, out, len(sums), BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def adam(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    options: Any,
    alike: Any = None,
) -> None:
    """One step in place, a launch per dtype; `options` as in bigops.ops.adam.

    alike: equal for calls whose tensors agree in shapes, strides, dtypes and devices; or None.
    """
    norm = options.total_norm
    if options.max_grad_norm is None:
        norm = None
    elif norm is None:
        norm = grad_norm(grads, alike)
    lr, beta1, beta2, decay = float(options.lr), options.beta1, options.beta2, options.weight_decay
    numbers = _count(state_steps, lr, beta1, beta2)
    roles = [params, grads, exp_avgs, exp_avg_sqs]
    roles += [max_exp_avg_sqs] if options.amsgrad else []
    plan = plan_of(roles, None if alike is None else ("adam", len(roles), alike))
    roles, copies = dense_copies(plan, roles)
    # 0.999 rounded to float32 is off by 1e-5 of 1 - 0.999, which an average over a thousand steps
    # collects; so it is carried in two parts, both positive (0 * inf would be NaN).
    high = float(np.nextafter(np.float32(beta2), np.float32(0)))
    for part in plan.parts:
        part.launch(
            adam_kernel,
            roles,
            numbers,
            norm,
            options.grad_scale,
            -1.0 if options.maximize else 1.0,
            0.0 if norm is None else float(options.max_grad_norm),
            float(decay),
            lr * decay if options.decoupled_weight_decay else 0.0,
            1 - beta1 if beta1 >= 0.5 else beta1,
            high,
            beta2 - high,
            1 - beta2,
            float(options.eps),
            COUPLED=not options.decoupled_weight_decay and decay != 0,
            MOSTLY_OLD=beta1 >= 0.5,
            AMSGRAD=options.amsgrad,
        )
    copy_back(copies, grads)


def _count(steps: Sequence[Tensor], lr: float, beta1: float, beta2: float) -> np.ndarray:
    """Each tensor's step size and correction, after its step has been counted."""
    if _foreach_add is None:
        for step in steps:
            step += 1
    elif steps:
        # By a tensor: of a number torch makes a tensor for each of them.
        _foreach_add(list(steps), torch.ones(()), alpha=1.0)
    counts = np.array(list(map(Tensor.item, steps)))
    numbers = np.empty((len(steps), 2))
    numbers[:, 0] = lr / (1 - beta1**counts)
    numbers[:, 1] = 1 / np.sqrt(1 - beta2**counts)
    return numbers
