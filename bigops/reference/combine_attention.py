"""Attention over disjoint keys, put together by the log-sum-exp of each part."""

from __future__ import annotations

import torch
from torch import Tensor


def combine_attention(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """outs (N, ..., D) and lses (N, ...) -> out (..., D), lse (...).

    A part of lse -inf weighs nothing, whatever its out; where all are, out is 0 and lse -inf.
    """
    top = lses.detach().amax(dim=0)
    shift = top.masked_fill(top == float("-inf"), 0.0)
    shares = torch.exp(lses - shift)
    total = shares.sum(dim=0)
    nothing = total == 0.0
    total = total.masked_fill(nothing, 1.0)
    weights = (shares / total).unsqueeze(-1)
    parts = outs.to(weights.dtype).masked_fill(weights == 0.0, 0.0)
    out = (weights * parts).sum(dim=0).to(outs.dtype)
    return out, (shift + torch.log(total)).masked_fill(nothing, float("-inf"))
