"""FlashAttention 2, 3 and 4, by their own packages, which lay tensors out as (B, S, H, D)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bigops.bench.peers.adapter import EVERY_SM, HALF, Adapter, relaid
from bigops.ops.declare import Call


def heads_inside(call: Call) -> Call:
    """The call with tensors of the same shape whose memory is laid out as (B, S, H, D)."""
    return relaid(call, _heads_inside)


def _heads_inside(t: Tensor) -> Tensor:
    return t.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def _version_2() -> Callable[..., Any]:
    from flash_attn import flash_attn_func

    return _adapted(flash_attn_func)


def _version_3() -> Callable[..., Any]:
    from flash_attn_interface import flash_attn_func

    return _adapted(flash_attn_func)


def _version_4() -> Callable[..., Any]:
    from flash_attn.cute import flash_attn_func

    return _adapted(flash_attn_func)


def _adapted(flash_attn_func: Callable[..., Any]) -> Callable[..., Any]:
    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        inside = (t.transpose(1, 2) for t in (query, key, value))
        found = flash_attn_func(*inside, softmax_scale=scale, causal=causal)
        # Version 4, and 3 in some releases, return the log-sum-exp beside it.
        out = found[0] if isinstance(found, tuple) else found
        return out.transpose(1, 2)

    return attention


def _adapter(version: int, load: Callable[[], Any], package: str, sm: range) -> Adapter:
    name = f"FlashAttention {version}"
    return Adapter(name, ("attention",), load, package, HALF, sm=sm, prepare=heads_inside)


ADAPTERS = (
    _adapter(2, _version_2, "flash-attn", range(80, EVERY_SM.stop)),
    _adapter(3, _version_3, "flash-attn-3", range(90, 91)),
    _adapter(4, _version_4, "flash-attn-4", range(80, EVERY_SM.stop)),
)
