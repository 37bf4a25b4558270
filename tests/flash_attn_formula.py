"""What flash_attn's functions compute, as one writes it down; and their inputs, drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

INFINITY = float("inf")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    kept: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, Sq, H, Dv), softmax_lse (B, H, Sq) and the weights (B, H, Sq, Sk), of q
    (B, Sq, H, D), k (B, Sk, Hk, D) and v; the weights are multiplied by `kept`."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    if softmax_scale is None:
        softmax_scale = q.shape[3] ** -0.5
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * softmax_scale
    if softcap > 0:
        scores = softcap * (scores / softcap).tanh()
    ahead = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None] - k.shape[1] + q.shape[1]
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[..., None, None].to(scores.dtype) * ahead.abs()
    left, right = window_size
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    if causal:
        hidden = hidden | (ahead > 0)
    if left >= 0:
        hidden = hidden | (ahead < -left)
    if right >= 0:
        hidden = hidden | (ahead > right)
    scores = scores.masked_fill(hidden, -INFINITY).to(torch.promote_types(q.dtype, torch.float32))
    blind = hidden.all(1, keepdim=True)  # rows that see nothing
    weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    lse = scores.masked_fill(blind, 0.0).logsumexp(-1).masked_fill(blind[:, 0], INFINITY)
    return torch.einsum("bhij,bjhd->bihd", (weights * kept).to(v.dtype), v), lse, weights


def pack(tensors: list[Tensor]) -> tuple[Tensor, Tensor, int]:
    """Sequences (S, ...) one after another, cu_seqlens, the longest one's length."""
    lengths = torch.tensor([0, *(len(t) for t in tensors)])
    return torch.cat(tensors), lengths.cumsum(0).int(), int(lengths.max())


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """out (T, H, Dv) and softmax_lse (H, T): each sequence by itself."""
    slopes = options.pop("alibi_slopes", None)
    outs, lses = [], []
    for b in range(len(starts_q) - 1):
        rows, keys = (slice(int(s[b]), int(s[b + 1])) for s in (starts_q, starts_k))
        own = slopes[b : b + 1] if slopes is not None and slopes.dim() == 2 else slopes
        out, lse, _ = attend(
            q[None, rows], k[None, keys], v[None, keys], alibi_slopes=own, **options
        )
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


def gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> list[Tensor]:
    """Of a sum of all that is finite in the outputs, by weights that are the same in any dtype."""
    generator = torch.Generator().manual_seed(1)
    grads = []
    for out in outputs:
        grad = torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype)
        grads.append(grad.masked_fill(out.detach().isinf(), 0.0))
    return list(torch.autograd.grad(outputs, leaves, grads))
