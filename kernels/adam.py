"""Adam, AdamW and AMSGrad over a list of tensors in one launch, and the norm that clips it.

    g = f * grad (+ l2 * p);  m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2
    p = keep * p - step_size * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

(Kingma and Ba 2015, arXiv:1412.6980; Loshchilov and Hutter 2019, arXiv:1711.05101). The update
reads four streams and writes three and is as fast as memory. Torch's fused step takes a launch for
every few dozen tensors, since their addresses travel as kernel arguments; here they lie in a table
on the device, a row per tensor, written anew each step because gradients move. A program owns one
chunk of one tensor; which, says a second table that depends on the sizes only and is kept.

The norm goes before it: a program writes its chunk's sum of squares, then one program adds these up
in a fixed order. Clipping is a factor that the update reads from the device, so nothing waits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import hardware

# 1024 elements and 4 warps: two 16-byte accesses a thread and stream in fp32, one in bf16.
BLOCK = 1024
NUM_WARPS = 4
# Four blocks a chunk: a program's table look-ups are small beside 112 KiB of traffic.
CHUNK = tl.constexpr(4096)

# A row of the table: five addresses, the size, and two float64 in their bits.
COLUMNS = tl.constexpr(8)
SIZE = tl.constexpr(5)
STEP_SIZE = tl.constexpr(6)
CORRECTION = tl.constexpr(7)
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _pointer(row, start, ROLE: tl.constexpr, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """The address in a row's column, start elements on. Accesses are as wide as the alignment that
    the compiler knows of; it takes the hint on the addition only, not on the address itself."""
    return tl.multiple_of(tl.load(row + ROLE).to(tl.pointer_type(DTYPE)) + start, ALIGN)


@triton.jit
def _number(row, COLUMN: tl.constexpr):
    return tl.load(row + COLUMN).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def _factor(sign, norm_ptr, scale_ptr, max_grad_norm):
    """What gradients are multiplied by: torch.nn.utils.clip_grad_norm_'s coefficient, unscaled."""
    inv_scale = 1.0
    if scale_ptr is not None:
        inv_scale = 1.0 / tl.load(scale_ptr).to(tl.float32)
    factor = sign * inv_scale
    if norm_ptr is not None:
        coefficient = max_grad_norm / (tl.load(norm_ptr).to(tl.float32) * inv_scale + 1e-6)
        # Written so that a NaN comes through, as in torch.
        factor *= tl.where(coefficient > 1.0, 1.0, coefficient)
    return factor


@triton.jit
def _rule(
    p, g, m, v, top, l2, keep, weight1, beta2_high, beta2_low, weight2, step_size, correction, eps,
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
    return p * keep - step_size * tl.div_rn(m, denominator), m, v, top


@triton.jit
def adam_kernel(
    table, chunk_tensor, chunk_index, norm_ptr, scale_ptr,
    sign, max_grad_norm, l2, keep, weight1, beta2_high, beta2_low, weight2, eps,
    DTYPE: tl.constexpr, ALIGN: tl.constexpr, COUPLED: tl.constexpr, MOSTLY_OLD: tl.constexpr,
    AMSGRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    row = table + tl.load(chunk_tensor + chunk) * COLUMNS
    start = tl.load(chunk_index + chunk).to(tl.int64) * CHUNK
    size = tl.load(row + SIZE)
    p_ptr = _pointer(row, start, 0, DTYPE, ALIGN)
    g_ptr = _pointer(row, start, 1, DTYPE, ALIGN)
    m_ptr = _pointer(row, start, 2, DTYPE, ALIGN)
    v_ptr = _pointer(row, start, 3, DTYPE, ALIGN)
    top_ptr = _pointer(row, start, 4, DTYPE, ALIGN)
    step_size, correction = _number(row, STEP_SIZE), _number(row, CORRECTION)
    factor = _factor(sign, norm_ptr, scale_ptr, max_grad_norm)
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
                p, g, m, v, top, l2, keep, weight1, beta2_high, beta2_low, weight2, step_size,
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
                p, g, m, v, top, l2, keep, weight1, beta2_high, beta2_low, weight2, step_size,
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
    g_ptr = _pointer(row, start, 1, DTYPE, ALIGN)
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


@functools.lru_cache(maxsize=64)
def _chunks(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Which tensor each chunk lies in, and which chunk of it it is."""
    counts = np.array([-(-size // CHUNK.value) for size in sizes], dtype=np.int64)
    tensor = np.repeat(np.arange(len(sizes), dtype=np.int32), counts)
    index = np.arange(len(tensor), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    both = torch.from_numpy(np.stack([tensor, index.astype(np.int32)])).to(device)
    return both[0], both[1]


def _launch(
    kernel: Any, lists: Sequence[Sequence[Tensor]], numbers: np.ndarray, *args: Any, **meta: Any
) -> None:
    """One launch over tensors of one dtype: lists are the roles, numbers the last two columns."""
    first = next(tensors for tensors in lists if tensors)
    sizes = tuple(t.numel() for t in first)
    table = np.zeros((len(first), COLUMNS.value), dtype=np.int64)
    for role, tensors in enumerate(lists):
        if tensors:
            table[:, role] = [t.data_ptr() for t in tensors]
    addresses = np.bitwise_or.reduce(table[:, : SIZE.value], axis=None)
    table[:, SIZE.value] = sizes
    table[:, STEP_SIZE.value :] = numbers.view(np.int64)
    device = first[0].device
    tensor, index = _chunks(sizes, device)
    if not len(tensor):
        return
    with hardware.guard(first[0]):
        kernel[(len(tensor),)](
            torch.from_numpy(table).to(device, non_blocking=True),
            tensor,
            index,
            *args,
            DTYPE=DTYPES[first[0].dtype],
            ALIGN=16 if addresses % 16 == 0 else first[0].element_size(),
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
            **meta,
        )


def _dense(tensor: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _alike(tensors: Sequence[Tensor]) -> bool:
    if all(t.is_contiguous() for t in tensors):
        return True
    return _dense(tensors[0]) and all(t.stride() == tensors[0].stride() for t in tensors)


def _by_dtype(tensors: Sequence[Tensor]) -> dict[torch.dtype, list[int]]:
    found: dict[torch.dtype, list[int]] = {}
    for i, tensor in enumerate(tensors):
        found.setdefault(tensor.dtype, []).append(i)
    return found


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients taken as one vector: float32, without dimensions."""
    grads = [grad if _dense(grad) else grad.contiguous() for grad in grads]
    device = grads[0].device if grads else torch.device("cpu")
    out = torch.zeros((), dtype=torch.float32, device=device)
    parts = [[grads[i] for i in which] for which in _by_dtype(grads).values()]
    counts = [sum(-(-grad.numel() // CHUNK.value) for grad in part) for part in parts]
    if not sum(counts):
        return out
    sums = torch.empty(sum(counts), dtype=torch.float64, device=device)
    for part, own in zip(parts, sums.split(counts), strict=True):
        _launch(squares_kernel, [[], part], np.zeros((len(part), 2)), own)
    with hardware.guard(sums):
        norm_kernel[(1,)](
            sums, out, len(sums), BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=True
        )
    return out


def adam(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    options: Any,
) -> None:
    """One step in place, a launch per dtype; `options` as in bigops.ops.adam."""
    norm = options.total_norm
    if options.max_grad_norm is None:
        norm = None
    elif norm is None:
        norm = grad_norm(grads)
    lr, beta1, beta2, decay = float(options.lr), options.beta1, options.beta2, options.weight_decay
    numbers = np.empty((len(params), 2))
    for i, step in enumerate(state_steps):
        step += 1
        count = step.item()
        numbers[i] = lr / (1 - beta1**count), 1 / math.sqrt(1 - beta2**count)
    lists: list[list[Tensor]] = [[], [], [], [], []]
    copied: list[tuple[Tensor, Tensor]] = []
    for i, param in enumerate(params):
        roles = [param, grads[i], exp_avgs[i], exp_avg_sqs[i]]
        roles += [max_exp_avg_sqs[i]] if options.amsgrad else []
        if not _alike(roles):
            dense = [role.contiguous() for role in roles]
            copied += [pair for pair in zip(roles, dense, strict=True) if pair[0] is not pair[1]]
            roles = dense
        for own, role in zip(lists, roles, strict=False):
            own.append(role)
    # 0.999 rounded to float32 is off by 1e-5 of 1 - 0.999, which an average over a thousand steps
    # collects; so it is carried in two parts, both positive (0 * inf would be NaN).
    high = float(np.nextafter(np.float32(beta2), np.float32(0)))
    for which in _by_dtype(params).values():
        _launch(
            adam_kernel,
            [[own[i] for i in which] if own else [] for own in lists],
            numbers[which],
            norm,
            options.grad_scale,
            -1.0 if options.maximize else 1.0,
            0.0 if norm is None else float(options.max_grad_norm),
            decay,
            1 - lr * decay if options.decoupled_weight_decay else 1.0,
            1 - beta1 if beta1 >= 0.5 else beta1,
            high,
            beta2 - high,
            1 - beta2,
            options.eps,
            COUPLED=not options.decoupled_weight_decay and decay != 0,
            MOSTLY_OLD=beta1 >= 0.5,
            AMSGRAD=options.amsgrad,
        )
    for tensor, dense in copied:
        if all(tensor is not grad for grad in grads):
            tensor.copy_(dense)
