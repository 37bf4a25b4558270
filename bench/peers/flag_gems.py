"""FlagGems: Triton kernels behind torch's own signatures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bigops.bench.peers.adapter import Adapter


def _attention() -> Callable[..., Any]:
    from flag_gems.ops import scaled_dot_product_attention

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        gqa = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(
            query, key, value, is_causal=causal, scale=scale, enable_gqa=gqa
        )

    return attention


def _conv2d_act() -> Callable[..., Any]:
    from flag_gems.ops import conv2d

    def conv2d_relu(*args: Any, **kwargs: Any) -> Tensor:
        return conv2d(*args, **kwargs).relu()

    return conv2d_relu


ADAPTERS = (
    Adapter("FlagGems", ("attention",), _attention, "flag-gems"),
    Adapter("FlagGems", ("conv2d_act",), _conv2d_act, "flag-gems"),
)
