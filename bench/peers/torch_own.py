"""Torch's other ways: memory layouts, the backends behind its attention, flex_attention.

Its fused optimizers are flags and belong to optimizers.py and models.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bigops.bench.peers.adapter import HALF, Adapter, relaid
from bigops.ops import get
from bigops.ops.declare import Call


def channels_last(call: Call) -> Call:
    """The call with images and filters laid out as (N, H, W, C)."""
    return relaid(call, lambda t: t.clone(memory_format=torch.channels_last))


def _eager(op: str) -> Callable[[], Callable[..., Any]]:
    return lambda: get(op).eager


def _sdpa(backend: str) -> Callable[[], Callable[..., Any]]:
    """Eager with one backend of scaled_dot_product_attention allowed; it raises if it cannot."""

    def load() -> Callable[..., Any]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        eager, only = get("attention").eager, getattr(SDPBackend, backend)

        def attention(*args: Any, **kwargs: Any) -> Any:
            with sdpa_kernel(only):
                return eager(*args, **kwargs)

        return attention

    return load


def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _block_mask(call: Call) -> Call:
    """The call with flex_attention's arguments: its mask is made once, outside the clock."""
    (query, key, value), given = call
    options = {**given, "enable_gqa": query.shape[1] != key.shape[1]}
    if options.pop("causal", False):
        options["block_mask"] = _causal_mask(query.shape[2], key.shape[2], query.device)
    return (query, key, value), options


@lru_cache(maxsize=1)  # the input sets of one case share it
def _causal_mask(rows: int, columns: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return column <= row + columns - rows

    return create_block_mask(seen, None, None, rows, columns, device=device)


ADAPTERS = (
    *(
        Adapter("channels_last", (op,), _eager(op), devices=("cpu", "cuda"), prepare=channels_last)
        for op in ("batch_norm_act", "conv2d_act", "conv2d_relu_max_pool2d", "max_pool2d")
    ),
    Adapter("sdpa flash", ("attention",), _sdpa("FLASH_ATTENTION"), dtypes=HALF),
    Adapter("sdpa efficient", ("attention",), _sdpa("EFFICIENT_ATTENTION")),
    Adapter("sdpa cudnn", ("attention",), _sdpa("CUDNN_ATTENTION"), dtypes=HALF),
    # On a CPU it has no backward, and its forward takes three times as long as eager's.
    Adapter("flex", ("attention",), _flex, prepare=_block_mask, compiles=True),
)
