"""attention's samples, its eager baseline and its cost: what checks and benchmarks need to know."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference.attention import attention as reference
from .declare import Call, Cost, Sample


def eager(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
    """torch's own attention for the arguments that it has."""
    causal, bias, scale = kwargs.get("causal", False), kwargs.get("bias"), kwargs.get("scale")
    rows, columns = query.shape[2], key.shape[2]
    if bias is not None:
        bias = bias.expand(*query.shape[:3], columns)
    if kwargs.get("return_lse"):
        scale = query.shape[3] ** -0.5 if scale is None else scale
        return reference(query, key, value, bias, columns - rows if causal else None, scale)
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.to(query.dtype)
    if causal and (rows != columns or bias is not None):
        seen = torch.ones(rows, columns, dtype=torch.bool, device=query.device)
        seen = seen.tril(columns - rows)
        if bias is None:
            bias = seen
        elif bias.dtype == torch.bool:
            bias = bias & seen
        else:
            bias = bias.masked_fill(~seen, float("-inf"))
        causal = False
    if query.numel() == 0:  # then cuDNN's attention, torch's first choice on an H200, gives None
        return reference(query, key, value, bias, None, 1.0)[0]
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=bias,
        is_causal=causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def cost(passes: str, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Cost:
    batch, heads, rows, head_size = query.shape
    columns, value_size = value.shape[2:]
    pairs = batch * heads * rows * columns * (0.5 if kwargs.get("causal") else 1.0)
    forward = 2.0 * pairs * (head_size + value_size)
    size = query.element_size()
    out = batch * heads * rows * value_size
    moved = size * (query.numel() + key.numel() + value.numel() + out)
    if passes == "forward":
        return Cost(forward, moved)
    return Cost(3.5 * forward, 3.0 * moved)


def _sample(
    name: str,
    shape: tuple[int, int, int, int],
    *,
    kv_heads: int | None = None,
    kv_length: int | None = None,
    value_size: int | None = None,
    mask: str | None = None,
    heads_inside: bool = False,
    grad: bool = True,
    bench: bool = False,
    gradcheck: bool = False,
    **kwargs: Any,
) -> Sample:
    batch, heads, rows, head_size = shape
    columns = rows if kv_length is None else kv_length

    def make(device: str, dtype: torch.dtype) -> Call:
        def draw(heads: int, length: int, size: int) -> Tensor:
            if heads_inside:
                drawn = torch.randn(batch, length, heads, size, device=device, dtype=dtype)
                drawn = drawn.transpose(1, 2)
            else:
                drawn = torch.randn(batch, heads, length, size, device=device, dtype=dtype)
            return drawn.requires_grad_(grad)

        args = (
            draw(heads, rows, head_size),
            draw(kv_heads or heads, columns, head_size),
            draw(kv_heads or heads, columns, value_size or head_size),
        )
        extra = dict(kwargs)
        if mask == "bool":
            extra["bias"] = torch.rand(batch, 1, rows, columns, device=device) < 0.7
        elif mask == "float":
            extra["bias"] = torch.randn(1, heads, 1, columns, device=device, dtype=dtype)
        elif mask == "hidden rows":
            extra["bias"] = torch.randn(rows, columns, device=device, dtype=dtype)
            extra["bias"][::3] = float("-inf")
        return args, extra

    return Sample(name, make, bench=bench, gradcheck=gradcheck)


SAMPLES = (
    _sample("one element", (1, 1, 1, 1)),
    _sample("odd sizes", (1, 3, 17, 7), kv_length=13),
    _sample("gradcheck", (1, 2, 5, 3), kv_length=4, gradcheck=True),
    _sample("gradcheck, causal", (1, 2, 4, 3), kv_length=5, causal=True, gradcheck=True),
    _sample("gradcheck, gqa and lse", (1, 2, 3, 2), kv_heads=1, return_lse=True, gradcheck=True),
    _sample("gradcheck, mask", (1, 2, 3, 2), mask="float", gradcheck=True),
    _sample("causal", (2, 2, 64, 32), causal=True),
    _sample("causal, more keys", (1, 2, 33, 16), kv_length=65, causal=True),
    _sample("causal, more queries", (1, 2, 65, 16), kv_length=33, causal=True),
    _sample("tile borders", (1, 1, 129, 64), kv_length=127, causal=True),
    _sample("gqa 4:1", (1, 4, 40, 24), kv_heads=1, causal=True),
    _sample("gqa 4:2", (2, 4, 20, 16), kv_heads=2, kv_length=50),
    _sample("value size differs", (1, 2, 32, 48), value_size=32),
    _sample("head size 192/128", (1, 1, 16, 192), value_size=128, kv_length=40),
    _sample("head size 256", (1, 1, 20, 256), causal=True),
    _sample("heads inside", (2, 3, 31, 16), heads_inside=True, causal=True),
    _sample("scale", (1, 2, 24, 8), scale=0.3),
    _sample("lse", (1, 2, 33, 16), kv_length=21, causal=True, return_lse=True),
    _sample("no keys", (1, 2, 5, 8), kv_length=0),
    _sample("no queries", (1, 2, 0, 8), kv_length=5),
    _sample("no batch", (0, 2, 4, 8)),
    _sample("bool mask", (2, 2, 30, 16), kv_length=40, mask="bool"),
    _sample("float mask", (2, 2, 30, 16), kv_length=40, mask="float", causal=True),
    _sample("rows hidden by -inf", (2, 2, 30, 16), kv_length=40, mask="hidden rows"),
    _sample("4096 elements", (1, 4, 96, 64), causal=True),
    _sample("1x8x2048x64", (1, 8, 2048, 64), grad=False, bench=True),
    _sample("1x8x2048x128", (1, 8, 2048, 128), grad=False, bench=True),
    _sample("2x8x1024x64 causal", (2, 8, 1024, 64), causal=True, bench=True),
    _sample("2x8:2x1024x64 causal", (2, 8, 1024, 64), kv_heads=2, causal=True, bench=True),
)


def _varied(
    device: str, *, batch: int = 1, heads: int = 8, length: int | None = None, head_size: int = 64
) -> Sample:
    length = length or {"cpu": 1024, "cuda": 4096}[device]
    shape = (batch, heads, length, head_size)
    return _sample(f"{'x'.join(map(str, shape))} causal", shape, causal=True, bench=True)


def _of_length(length: int, device: str) -> Sample:
    """As many tokens in all whatever their length, as in the tables of "FlashAttention-2"."""
    if device == "cpu":
        return _varied(device, batch=max(1, 2048 // length), length=length)
    batch = max(1, 16384 // length)
    return _varied(device, batch=batch, heads=16, length=length, head_size=128)


SWEEPS = {
    "S": _of_length,
    "D": lambda size, device: _varied(device, head_size=size),
    "H": lambda size, device: _varied(device, heads=size),
    "B": lambda size, device: _varied(device, batch=size),
}
