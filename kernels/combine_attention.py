"""Attention over disjoint keys, combined exactly; also the last step of decoding's splits.

    lse = log(sum_n exp(lse_n)),  w_n = exp(lse_n - lse),  out = sum_n w_n out_n

A program owns a few rows and walks over the parts twice: for the maximum of their lse, then for the
sums, so that no weight is ever rescaled. Sinks are one more part, of the value 0. The backward pass
takes the weights from lse_n anew: with a_n = dO . out_n,

    d out_n = w_n dO,  d lse_n = w_n (a_n - sum_m w_m a_m + dlse).

Rabe and Staats 2021, "Self-attention does not need O(n^2) memory"; Dao et al. 2023,
"Flash-Decoding for long-context inference".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from . import hardware
from .launch import launch, made, replayed

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
SIZES = ["parts", "heads", "seq", "total"]
MAX_HEAD_SIZE = 1024  # a row is in registers as a whole
ELEMENTS = 2048  # of a program: 16 for each thread of 4 warps


@triton.jit
def _row(ptr, batch, head, row, stride):
    return (
        ptr + batch.to(tl.int64) * stride[0] + head.to(tl.int64) * stride[1]
        + row.to(tl.int64) * stride[2]
    )  # fmt: skip


@triton.jit
def _top(lse_rows, stride, parts, mask, BLOCK: tl.constexpr):
    """The parts' largest lse in each row."""
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for part in range(parts):
        at = lse_rows + tl.cast(part, tl.int64) * stride
        top = tl.maximum(top, tl.load(at, mask=mask, other=float("-inf")))
    return top


@triton.jit
def _share(lse_rows, stride, part, shift, mask):
    """What a part weighs, before all weights are divided by their sum."""
    lse = tl.load(lse_rows + tl.cast(part, tl.int64) * stride, mask=mask, other=float("-inf"))
    return tl.exp2((lse - shift) * LOG2_E)


@triton.jit
def _part(rows, stride, part, cols, weight, mask):
    """A part's out in float32; 0, whatever is there, where it weighs nothing."""
    tile = (rows + tl.cast(part, tl.int64) * stride)[:, None] + cols[None, :]
    seen = mask & (weight > 0.0)[:, None]
    return tl.load(tile, mask=seen, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def combine_kernel(
    outs_ptr, lses_ptr, sinks_ptr, out_ptr, lse_ptr,
    stride_outs, stride_lses, stride_out, stride_lse, parts, heads, seq, total,
    SIZE: tl.constexpr, DIM: tl.constexpr, HAS_SINKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Strides are those of (batch, head, row, column, part)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch, head, i = row // (heads * seq), row // seq % heads, row % seq
    mask, cols = row < total, tl.arange(0, DIM)
    wide = mask[:, None] & (cols < SIZE)[None, :]
    lses = _row(lses_ptr, batch, head, i, stride_lses)
    outs = _row(outs_ptr, batch, head, i, stride_outs)
    top = _top(lses, stride_lses[4], parts, mask, BLOCK)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head, mask=mask, other=float("-inf"))
        top = tl.maximum(top, sink)
    shift = tl.where(top == float("-inf"), 0.0, top)
    sums = tl.exp2((sink - shift) * LOG2_E) if HAS_SINKS else tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, DIM], tl.float32)
    for part in range(parts):
        weight = _share(lses, stride_lses[4], part, shift, mask)
        sums += weight
        value = _part(outs, stride_outs[4], part, cols * stride_outs[3], weight, wide)
        acc += weight[:, None] * value
    nothing = sums == 0.0
    sums = tl.where(nothing, 1.0, sums)
    lse = tl.where(nothing, float("-inf"), shift + tl.log2(sums) * LN_2)
    out = _row(out_ptr, batch, head, i, stride_out)[:, None] + (cols * stride_out[3])[None, :]
    tl.store(out, (acc / sums[:, None]).to(out_ptr.dtype.element_ty), mask=wide)
    tl.store(_row(lse_ptr, batch, head, i, stride_lse), lse, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    do_ptr, dlse_ptr, outs_ptr, lses_ptr, grad_outs_ptr, grad_lses_ptr,
    stride_do, stride_dlse, stride_outs, stride_lses, stride_grad_outs, stride_grad_lses,
    parts, heads, seq, total,
    SIZE: tl.constexpr, DIM: tl.constexpr, NEEDS_OUTS: tl.constexpr, NEEDS_LSES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch, head, i = row // (heads * seq), row // seq % heads, row % seq
    mask, cols = row < total, tl.arange(0, DIM)
    wide = mask[:, None] & (cols < SIZE)[None, :]
    lses = _row(lses_ptr, batch, head, i, stride_lses)
    outs = _row(outs_ptr, batch, head, i, stride_outs)
    top = _top(lses, stride_lses[4], parts, mask, BLOCK)
    shift = tl.where(top == float("-inf"), 0.0, top)
    do = _row(do_ptr, batch, head, i, stride_do)[:, None] + (cols * stride_do[3])[None, :]
    do = tl.load(do, mask=wide, other=0.0).to(tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        weight = _share(lses, stride_lses[4], part, shift, mask)
        sums += weight
        if NEEDS_LSES:
            value = _part(outs, stride_outs[4], part, cols * stride_outs[3], weight, wide)
            mean += weight * tl.sum(do * value, 1)
    sums = tl.where(sums == 0.0, 1.0, sums)
    if NEEDS_LSES:
        dlse_rows = _row(dlse_ptr, batch, head, i, stride_dlse)
        mean = mean / sums - tl.load(dlse_rows, mask=mask, other=0.0)
    for part in range(parts):
        weight = _share(lses, stride_lses[4], part, shift, mask)
        if NEEDS_OUTS:
            at = _row(grad_outs_ptr, batch, head, i, stride_grad_outs)
            at = at + tl.cast(part, tl.int64) * stride_grad_outs[4]
            grad = (weight / sums)[:, None] * do
            tile = at[:, None] + (cols * stride_grad_outs[3])[None, :]
            tl.store(tile, grad.to(grad_outs_ptr.dtype.element_ty), mask=wide)
        if NEEDS_LSES:
            value = _part(outs, stride_outs[4], part, cols * stride_outs[3], weight, wide)
            grad = weight / sums * (tl.sum(do * value, 1) - mean)
            at = _row(grad_lses_ptr, batch, head, i, stride_grad_lses)
            at = at + tl.cast(part, tl.int64) * stride_grad_lses[4]
            tl.store(at, grad, mask=mask)


def why_not(outs: torch.Tensor, lses: torch.Tensor) -> str | None:
    """None if the kernels serve the call, else the reason."""
    if outs.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {outs.dtype}"
    if outs.shape[4] > MAX_HEAD_SIZE:
        return f"head sizes above {MAX_HEAD_SIZE}"
    if outs.stride(4) * MAX_HEAD_SIZE >= 2**31:  # offsets within a row are 32-bit
        return "elements of a row this far apart"
    return None


def _strides(t: torch.Tensor) -> tuple[int, ...]:
    """Of (batch, head, row, column, part)."""
    part, *rest = t.stride()
    return (*rest, *(0,) * (4 - len(rest)), part)


def _alone(t: torch.Tensor) -> tuple[int, ...]:
    return (*t.stride(), *(0,) * (5 - t.dim()))


def combine(
    outs: torch.Tensor,
    lses: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Writes out and lse."""
    if lse.numel() == 0:
        return
    launch(
        combine_kernel, _grid(outs), outs, lses, sinks, out, lse,
        _strides(outs), _strides(lses), _alone(out), _alone(lse), *_sizes(outs),
        HAS_SINKS=sinks is not None, **_meta(outs),
    )  # fmt: skip


def _grid(outs: torch.Tensor) -> tuple[int]:
    return (triton.cdiv(_sizes(outs)[3], _meta(outs)["BLOCK"]),)


def _sizes(outs: torch.Tensor) -> tuple[int, int, int, int]:
    parts, batch, heads, seq, _ = outs.shape
    return parts, heads, seq, batch * heads * seq


def _meta(outs: torch.Tensor) -> dict[str, Any]:
    dim = max(16, triton.next_power_of_2(outs.shape[4]))
    return {
        "SIZE": outs.shape[4],
        "DIM": dim,
        "BLOCK": max(1, min(16, ELEMENTS // dim)),
        "num_warps": 4,
        "enable_fp_fusion": True,
    }


@replayed
def forward(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, contiguous."""
    out, lse = made(outs.new_empty(outs.shape[1:])), made(lses.new_empty(lses.shape[1:]))
    with hardware.guard(outs.device):
        combine(outs, lses, None, out, lse)
    return out, lse


@replayed
def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    outs: torch.Tensor,
    lses: torch.Tensor,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients that needs asks for, contiguous."""
    grad_outs = made(outs.new_empty(outs.shape)) if needs[0] else None
    grad_lses = made(lses.new_empty(lses.shape)) if needs[1] else None
    if lses.numel() == 0:
        return grad_outs, grad_lses
    with hardware.guard(outs.device):
        launch(
            backward_kernel, _grid(outs), grad_out, grad_lse, outs, lses, grad_outs, grad_lses,
            _alone(grad_out), _alone(grad_lse), _strides(outs), _strides(lses),
            (0,) * 5 if grad_outs is None else _strides(grad_outs),
            (0,) * 5 if grad_lses is None else _strides(grad_lses), *_sizes(outs),
            NEEDS_OUTS=grad_outs is not None, NEEDS_LSES=grad_lses is not None, **_meta(outs),
        )  # fmt: skip
    return grad_outs, grad_lses
