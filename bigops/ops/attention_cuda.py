"""attention on CUDA tensors by the CUDA C++ kernels (csrc/cuda/attention.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import cuda
from . import dispatch

HEAD_SIZES = (64, 96, 128, 256)
LONGEST = 1 << 29  # lengths and offsets are added up in 32 bits
DTYPES = (torch.bfloat16, torch.float16)
# cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k; then tensors are (1, H, T, D)
Packed = tuple[Tensor, Tensor, int, int]


def why_not(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extras: tuple[Tensor | None, ...],
    scale: float,
) -> str | None:
    """None when the kernels serve these tensors, else the reason; extras: bias, sinks,
    alibi_slopes, dropout's seed."""
    if any(extra is not None for extra in extras):
        return "bias, sinks, alibi_slopes and dropout are the Triton kernels'"
    if query.dtype not in DTYPES:
        return f"dtype {query.dtype}"
    if query.shape[3] not in HEAD_SIZES or value.shape[3] != query.shape[3]:
        sizes = ", ".join(map(str, HEAD_SIZES))
        return f"head sizes other than {sizes}, the same for query, key and value"
    if not scale > 0.0:
        return "a scale that is not positive"
    if max(query.shape[2], key.shape[2]) >= LONGEST:
        return f"lengths from {LONGEST} on"
    if reason := cuda.why_not():
        return reason
    if cuda.capability(query.device) < (8, 0):
        return "architectures before sm_80"
    if dispatch.forced() != "native":
        return cuda.unproven(op, query.device)
    return None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    left: int,
    right: int,
    top_left: bool,
    scale: float,
    softcap: float,
    packed: Packed | None = None,
) -> None:
    """Fill out and lse; of packed sequences, only rows that are in one."""
    if out.numel() == 0:
        return
    query, key, value = _readable(query), _readable(key), _readable(value)
    kernels = cuda.kernels()
    workspace = query.new_empty(kernels.FORWARD_WORKSPACE, dtype=torch.uint8)
    run = kernels.attention_forward_sm90 if _hopper(query) else kernels.attention_forward_sm80
    bounds = _offset(query, key, top_left), left, right
    run(query, key, value, out, lse, scale, *bounds, softcap, packed, workspace)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    left: int,
    right: int,
    top_left: bool,
    scale: float,
    softcap: float,
    needs: list[bool],
    deterministic: bool,
    packed: Packed | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of query, key and value that are needed: all three come out of one pass. There
    are no bias and no sinks."""
    grads = [torch.empty_like(t) for t in (query, key, value)]
    if packed is not None:
        for grad in grads:
            grad.zero_()  # rows of no sequence
    if query.numel() == 0 or key.numel() == 0:
        return _needed([grad.zero_() for grad in grads], needs)
    kernels = cuda.kernels()
    name = "attention_backward_sm90" if _hopper(query) else "attention_backward_sm80"
    readable = [_readable(t) for t in (grad_out, query, key, value, out)]
    written = [_readable(t) for t in grads]
    size = getattr(kernels, f"{name}_workspace")(readable[1], readable[2], packed)
    workspace = query.new_empty(size, dtype=torch.uint8)
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    bounds = _offset(query, key, top_left), left, right
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    getattr(kernels, name)(
        *readable,
        lse,
        grad_lse,
        *written,
        scale,
        *bounds,
        softcap,
        deterministic,
        packed,
        workspace,
    )
    for grad, into in zip(grads, written, strict=True):
        if grad is not into:
            grad.copy_(into)
    return _needed(grads, needs)


def _needed(grads: list[Tensor], needs: list[bool]) -> tuple[Tensor | None, ...]:
    return (*(g if need else None for g, need in zip(grads, needs[:3], strict=True)), None, None)


def _hopper(query: Tensor) -> bool:
    return cuda.capability(query.device)[0] == 9


def _offset(query: Tensor, key: Tensor, top_left: bool) -> int:
    """Of the bounds: key j is seen iff i + offset - left <= j <= i + offset + right."""
    return 0 if top_left else key.shape[2] - query.shape[2]


def _readable(t: Tensor) -> Tensor:
    """The tensor, or a copy where its rows are not 16-byte pieces that the copy engine can walk."""
    strides = [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size != 1]
    rows = strides[:-1] if t.shape[-1] != 1 else strides
    dense = t.stride(-1) == 1 and all(stride > 0 and stride % 8 == 0 for stride in rows)
    aligned = t.storage_offset() % 8 == 0 and t.data_ptr() % 16 == 0
    return t if dense and aligned else t.clone(memory_format=torch.contiguous_format)
