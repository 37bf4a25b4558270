"""Attention's gradients by CUDA C++ kernels, judged against float64 on whatever runs them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from attention_cuda import Case, expected, inputs, options, starts
from torch import Tensor

from bigops.check import Comparison, compare

# query, key, cu_seqlens_q, cu_seqlens_k, max_q, max_k -> bytes
Bytes = Callable[..., int]
# grad_out, query, key, value, out, lse, grad_lse, grad_query, grad_key, grad_value, scale, offset,
# left, right, softcap, cu_seqlens_q, cu_seqlens_k, max_q, max_k, deterministic, workspace
Run = Callable[..., object]


def gradients(
    case: Case,
    leaves: tuple[Tensor, ...],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The reference's out, lse and gradients in this dtype."""
    query, key, value = (t.detach().to(dtype).requires_grad_() for t in leaves)
    out, lse = expected(case, query, key, value, dtype)
    loss = (out * grad_out.to(dtype)).sum()
    if grad_lse is not None:
        seen = lse != -float("inf")
        loss = loss + (lse[seen] * grad_lse[seen].to(dtype)).sum()
    grads = torch.autograd.grad(loss, (query, key, value))
    return out.detach(), lse.detach(), grads


def backward(
    case: Case,
    run: Run,
    workspace_bytes: Bytes,
    *,
    lse_used: bool = False,
    deterministic: bool = False,
    apart: float = 0.0,
    device: str = "cpu",
) -> tuple[list[Comparison], list[Tensor]]:
    """Run a case and compare its gradients; fresh memory is NaN, so what is not written is seen.

    apart: queries and keys lie on opposite sides of 0, this far from it.
    """
    query, key, value = inputs(case, device)
    query, key = query - apart, key + apart
    leaves = query, key, value
    grad_out = torch.randn(query.transpose(1, 2).shape, device=device)
    grad_out = grad_out.to(case.dtype).transpose(1, 2)
    grad_lse = torch.randn(query.shape[:3], device=device) if lse_used else None
    out, lse, want = gradients(case, leaves, grad_out, grad_lse, torch.float64)
    _, _, eager = gradients(case, leaves, grad_out, grad_lse, case.dtype)

    saved = torch.empty_like(query).copy_(out), lse.float()
    got = [torch.full_like(t, float("nan")) for t in leaves]
    packed = starts(case, device)
    size = workspace_bytes(query, key, *packed)
    workspace = torch.full((size,), 255, dtype=torch.uint8, device=device)
    bounds = options(case, query, key)
    run(grad_out, *leaves, *saved, grad_lse, *got, *bounds, *packed, int(deterministic), workspace)
    names = ("grad_query", "grad_key", "grad_value")
    return [compare(*four) for four in zip(names, got, eager, want, strict=True)], got
