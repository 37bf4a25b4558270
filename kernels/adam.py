"""Adam, AdamW and AMSGrad over a list of tensors in one launch.

    g = f * grad (+ l2 * p);  m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2
    p = p - (decay * p + step_size * m / (sqrt(v) / sqrt(1 - beta2^t) + eps))

(Kingma and Ba 2015, arXiv:1412.6980; Loshchilov and Hutter 2019, arXiv:1711.05101). The update
reads four streams and writes three and is as fast as memory; a launch takes any number of tensors
(step_table.py), of states in any form (step_walk.py).

Clipping (grad_norm.py) is a factor that the update reads from the device, so nothing waits. Step
counts and a learning rate that are on the device are read by a small launch before it, which counts
and writes what follows from both into the table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import hardware
from .grad_norm import read_there
from .launch import launch
from .step_table import (
    COLUMNS,
    COPY,
    CORRECTION,
    COUNT,
    DECAY,
    GRAD,
    NUM_WARPS,
    NUMBER,
    PARAM,
    SCALES,
    STATE,
    STEP_SIZE,
    Part,
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
    number_of,
    offsets,
    pointer,
    row_of,
    scales_of,
    store_param,
    store_state,
)

# Private, though torch.optim lives by it.
_foreach_add = getattr(torch, "_foreach_add_", None)
# How far below 1 - decay its larger part is.
PART = tl.constexpr(2.0**-22)
# Rows that a program of pace_kernel goes over.
PACES = 128


@triton.jit
def _rule(
    p, g, m, v, top, l2, decay, weight1, beta2_high, beta2_low, weight2, step_size, correction, eps,
    COUPLED: tl.constexpr, DECAYS: tl.constexpr, MOSTLY_OLD: tl.constexpr, AMSGRAD: tl.constexpr,
):  # fmt: skip
    """The update rule, in float32."""
    if COUPLED:
        g += l2 * p
    # Interpolated from the end that weighs more, which keeps its digits.
    m = m + weight1 * (g - m) if MOSTLY_OLD else g + weight1 * (m - g)
    v = beta2_high * v + (beta2_low * v + weight2 * (g * g))
    top = tl.maximum(top, v) if AMSGRAD else v
    denominator = tl.sqrt_rn(top) * correction + eps
    change = step_size * tl.div_rn(m, denominator)
    if DECAYS:
        # 1 - decay in two parts of one sign: in one it would be off by the same in all steps, and
        # p - decay * p makes an infinite p NaN, which torch's does not.
        keep = (1.0 - decay) - PART
        p = tl.fma(p, keep, tl.fma(p, (1.0 - keep) - decay, -change))
    else:
        p = p - change
    return p, m, v, top


@triton.jit
def _update(
    p_ptr, g_ptr, m_ptr, v_ptr, top_ptr, copy_ptr, m_scales, v_scales,
    block, rest, mask, seed, number, start, factor, l2, decay, weight1, beta2_high, beta2_low,
    weight2, step_size, correction, eps,
    COUPLED: tl.constexpr, DECAYS: tl.constexpr, MOSTLY_OLD: tl.constexpr, AMSGRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of elements; mask: None where they are all there."""
    offs = offsets(block, m_scales, BLOCK)
    p = load(p_ptr + offs, mask)
    g = load(g_ptr + offs, mask) * factor
    m = load_state(m_ptr, m_scales, offs, mask, block, rest, True)
    v = load_state(v_ptr, v_scales, offs, mask, block, rest, False)
    top = load(top_ptr + offs, mask) if AMSGRAD else v
    p, m, v, top = _rule(
        p, g, m, v, top, l2, decay, weight1, beta2_high, beta2_low, weight2, step_size,
        correction, eps, COUPLED, DECAYS, MOSTLY_OLD, AMSGRAD,
    )  # fmt: skip
    store_param(p_ptr, copy_ptr, p, offs, mask, seed, number, start + block, BLOCK)
    store_state(m_ptr, m_scales, m, offs, mask, block, rest, True)
    store_state(v_ptr, v_scales, v, offs, mask, block, rest, False)
    if AMSGRAD:
        tl.store(top_ptr + offs, top.to(top_ptr.dtype.element_ty), mask=mask)


@triton.jit
def adam_kernel(
    table, chunk_tensor, chunk_index, norm_ptr, scale_ptr, found_inf_ptr, sign, max_grad_norm,
    seed_ptr, l2, weight1, beta2_high, beta2_low, weight2, eps,
    PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, STATE_DTYPE: tl.constexpr,
    COPY_DTYPE: tl.constexpr, ALIGNED: tl.constexpr, COUPLED: tl.constexpr,
    DECAYS: tl.constexpr, MOSTLY_OLD: tl.constexpr, AMSGRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, rest = row_of(table, chunk_tensor, chunk_index, found_inf_ptr)
    p_ptr = pointer(row, start, PARAM, PARAM_DTYPE, ALIGNED)
    g_ptr = pointer(row, start, GRAD, GRAD_DTYPE, ALIGNED)
    m_ptr = pointer(row, start, STATE, STATE_DTYPE, ALIGNED)
    v_ptr = pointer(row, start, STATE + 1, STATE_DTYPE, ALIGNED)
    top_ptr = pointer(row, start, STATE + 2, STATE_DTYPE, ALIGNED) if AMSGRAD else None
    copy_ptr = pointer(row, start, COPY, COPY_DTYPE, ALIGNED) if COPY_DTYPE is not None else None
    m_scales = scales_of(row, start, SCALES, STATE_DTYPE)
    v_scales = scales_of(row, start, SCALES + 1, STATE_DTYPE)
    seed = tl.load(seed_ptr) if seed_ptr is not None else None
    number = tl.load(row + NUMBER).to(tl.int32)
    step_size, correction = number_of(row, STEP_SIZE), number_of(row, CORRECTION)
    decay = number_of(row, DECAY)
    factor = factor_of(sign, norm_ptr, scale_ptr, max_grad_norm)
    for block in range(0, rest, BLOCK):
        # A mask keeps accesses narrow, so only a tensor's last block has one.
        if block + BLOCK <= rest:
            _update(
                p_ptr, g_ptr, m_ptr, v_ptr, top_ptr, copy_ptr, m_scales, v_scales, block, rest,
                None, seed, number, start, factor, l2, decay, weight1, beta2_high, beta2_low,
                weight2, step_size, correction, eps, COUPLED, DECAYS, MOSTLY_OLD, AMSGRAD, BLOCK,
            )  # fmt: skip
        else:
            mask = offsets(block, m_scales, BLOCK) < rest
            _update(
                p_ptr, g_ptr, m_ptr, v_ptr, top_ptr, copy_ptr, m_scales, v_scales, block, rest,
                mask, seed, number, start, factor, l2, decay, weight1, beta2_high, beta2_low,
                weight2, step_size, correction, eps, COUPLED, DECAYS, MOSTLY_OLD, AMSGRAD, BLOCK,
            )  # fmt: skip


@triton.jit
def pace_kernel(table, count, lr_ptr, found_inf_ptr, BLOCK: tl.constexpr):
    """A step more for each row that has the address of its count, and what follows from it and the
    learning rate into the row. Options in double are the row after the last."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, options = table + offs * COLUMNS, table + count * COLUMNS
    if found_inf_ptr is not None:
        count = tl.where(tl.load(found_inf_ptr) == 0, count, 0)
    mask = offs < count
    # Until now: the step, if it is counted elsewhere, and whether it is counted in double here.
    step = tl.load(row + STEP_SIZE, mask=mask, other=0).to(tl.float64, bitcast=True)
    here = tl.load(row + COUNT, mask=mask, other=0)
    wide = tl.load(row + CORRECTION, mask=mask, other=0).to(tl.float64, bitcast=True) != 0.0
    in_double = (here != 0) & wide
    in_float = (here != 0) & ~wide
    double_at = here.to(tl.pointer_type(tl.float64))
    float_at = here.to(tl.pointer_type(tl.float32))
    doubles = tl.load(double_at, mask=in_double, other=0.0) + 1.0
    floats = tl.load(float_at, mask=in_float, other=0.0) + 1.0
    tl.store(double_at, doubles, mask=in_double)
    tl.store(float_at, floats, mask=in_float)
    step = tl.where(in_double, doubles, tl.where(in_float, floats.to(tl.float64), step))
    if lr_ptr is not None:
        lr = tl.load(lr_ptr).to(tl.float64)
    else:
        lr = tl.load(options).to(tl.float64, bitcast=True)
    # Logarithms, so that a power is one exponential.
    log_beta1 = tl.load(options + 1).to(tl.float64, bitcast=True)
    log_beta2 = tl.load(options + 2).to(tl.float64, bitcast=True)
    weight_decay = tl.load(options + 3).to(tl.float64, bitcast=True)
    step_size = lr / (1.0 - tl.exp2(step * log_beta1))
    correction = 1.0 / tl.sqrt(1.0 - tl.exp2(step * log_beta2))
    decay = tl.zeros_like(step) + lr * weight_decay
    tl.store(row + STEP_SIZE, step_size.to(tl.int64, bitcast=True), mask=mask)
    tl.store(row + CORRECTION, correction.to(tl.int64, bitcast=True), mask=mask)
    tl.store(row + DECAY, decay.to(tl.int64, bitcast=True), mask=mask)


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
    """One step in place, a launch for each combination of dtypes; `options` as in bigops.ops.adam.

    alike: equal for calls whose tensors agree in shapes, strides, dtypes and devices; or None.
    """
    device = params[0].device
    decay = float(options.weight_decay)
    rule = Rule(
        float(options.beta1),
        float(options.beta2),
        decay if options.decoupled_weight_decay else 0.0,
        *rate(options.lr, device),
    )
    # Where the CPU stands for the device, a tensor lr asks for what it would ask there.
    paced = rule.lr_ptr is not None or any(step.is_cuda for step in state_steps)
    here = [paced and step.device == device for step in state_steps]
    found_inf = options.found_inf
    if found_inf is not None and not all(here):
        # What is counted on the CPU has to be known there.
        if found_inf.item() != 0.0:
            return
        found_inf = None
    numbers = _numbers(rule, state_steps, here, paced)
    scalars = read_there(options, found_inf, grads, device, alike)
    roles = {
        PARAM.value: params,
        GRAD.value: grads,
        STATE.value: exp_avgs,
        STATE.value + 1: exp_avg_sqs,
    }
    if options.amsgrad:
        roles[STATE.value + 2] = max_exp_avg_sqs
    if options.low_precision_params is not None:
        roles[COPY.value] = options.low_precision_params
    if options.exp_avg_scales is not None:
        roles[SCALES.value] = options.exp_avg_scales
        roles[SCALES.value + 1] = options.exp_avg_sq_scales
    plan = plan_of(roles, alike)
    roles, copies = dense_copies(plan, roles)
    # 0.999 rounded to float32 is off by 1e-5 of 1 - 0.999, which an average over a thousand steps
    # collects; so it is carried in two parts, both positive (0 * inf would be NaN).
    high = float(np.nextafter(np.float32(rule.beta2), np.float32(0)))
    for part in plan.parts:
        host, aligned = part.filled(roles, numbers)
        if paced:
            table = _paced(host, rule, state_steps, here, part, found_inf)
        else:
            table = to_device(host, device)
        part.launch(
            adam_kernel,
            table,
            aligned,
            *scalars,
            part.seed(options.rounding_seed),
            decay,
            1 - rule.beta1 if rule.beta1 >= 0.5 else rule.beta1,
            high,
            rule.beta2 - high,
            1 - rule.beta2,
            float(options.eps),
            COUPLED=not options.decoupled_weight_decay and decay != 0,
            DECAYS=rule.decay != 0,
            MOSTLY_OLD=rule.beta1 >= 0.5,
            AMSGRAD=options.amsgrad,
        )
    copy_back(copies)


class Rule(NamedTuple):
    """What step sizes follow from; lr_ptr: the learning rate, where it is on the device."""

    beta1: float
    beta2: float
    decay: float
    lr: float
    lr_ptr: Tensor | None


def _numbers(rule: Rule, steps: Sequence[Tensor], here: Sequence[bool], paced: bool) -> np.ndarray:
    """Each tensor's step size, correction and decay, or what pace_kernel makes them of: its step,
    where that is counted on the CPU, and whether it is one in double."""
    counts = np.zeros(len(steps))
    counts[~np.array(here, dtype=bool)] = _count(
        [s for s, h in zip(steps, here, strict=True) if not h]
    )
    numbers = np.empty((len(steps), 3))
    if paced:
        numbers[:, 0] = counts
        numbers[:, 1] = [step.dtype == torch.float64 for step in steps]
        numbers[:, 2] = 0.0
    else:
        numbers[:, 0] = rule.lr / (1 - rule.beta1**counts)
        numbers[:, 1] = 1 / np.sqrt(1 - rule.beta2**counts)
        numbers[:, 2] = rule.lr * rule.decay
    return numbers


def _paced(
    host: np.ndarray,
    rule: Rule,
    steps: Sequence[Tensor],
    here: Sequence[bool],
    part: Part,
    found_inf: Tensor | None,
) -> Tensor:
    """The table on the device, its numbers worked out there."""
    host[:, COUNT.value] = [steps[i].data_ptr() if here[i] else 0 for i in part.which]
    logs = [math.log2(beta) if beta > 0.0 else -math.inf for beta in (rule.beta1, rule.beta2)]
    options = np.zeros((1, host.shape[1]))
    options[0, :4] = rule.lr, *logs, rule.decay
    table = to_device(np.concatenate([host, options.view(np.int64)]), part.device)
    with hardware.guard(part.device):
        launch(
            pace_kernel,
            (triton.cdiv(len(host), PACES),),
            table,
            len(host),
            rule.lr_ptr,
            None if found_inf is None else found_inf.to(part.device),
            BLOCK=PACES,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return table


def _count(steps: list[Tensor]) -> np.ndarray:
    """Steps that are counted on the CPU, each one on."""
    if _foreach_add is None:
        for step in steps:
            step += 1
    elif steps:
        # By a tensor: of a number torch makes a tensor for each of them.
        _foreach_add(steps, torch.ones(()), alpha=1.0)
    return np.array(list(map(Tensor.item, steps)))
