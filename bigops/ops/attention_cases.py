"""attention's samples, its eager baseline and its cost: what checks and benchmarks need to know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..reference.attention import attention as reference
from . import attention_arguments as given
from .declare import Call, Cost, Sample


def eager(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
    """torch's own attention for the arguments that it has, masks for those that become one, plain
    torch for the others."""
    rows, columns = query.shape[2], key.shape[2]
    left, right = given.bounds(kwargs.get("window_size", (-1, -1)), kwargs.get("causal", False))
    scale = query.shape[3] ** -0.5 if kwargs.get("scale") is None else kwargs["scale"]
    bias, slopes = kwargs.get("bias"), kwargs.get("alibi_slopes")
    softcap, sinks = kwargs.get("softcap", 0.0), kwargs.get("sinks")
    if bias is not None:
        bias = bias.expand(*query.shape[:3], columns)
    descales = [kwargs.get(f"{name}_descale") for name in "qkv"]
    beyond = softcap or any(t is not None for t in (sinks, *descales))
    # cuDNN's attention, torch's first choice on an H200, gives None where nothing is asked for.
    if beyond or kwargs.get("return_lse") or query.numel() == 0:
        scores: list[Any] = [bias, sinks, slopes, None, *descales]
        scores += [left, right, False, scale, softcap]
        found = reference(query, key, value, *scores)
        return found if kwargs.get("return_lse") else found[0]
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.to(query.dtype)
    causal = (left, right) == (-1, 0) and rows == columns and bias is None and slopes is None
    if not causal and (left, right) != (-1, -1):
        ahead = torch.arange(columns, device=query.device) - (columns - rows)
        ahead = ahead - torch.arange(rows, device=query.device)[:, None]
        seen = torch.ones_like(ahead, dtype=torch.bool) if left < 0 else ahead >= -left
        seen = seen if right < 0 else seen & (ahead <= right)
        bias = _hidden(bias, seen)
    if slopes is not None:
        ahead = torch.arange(columns, device=query.device) - (columns - rows)
        distance = (ahead - torch.arange(rows, device=query.device)[:, None]).abs()
        added = -slopes.reshape(-1, query.shape[1], 1, 1) * distance
        if bias is not None:
            added = _hidden(added, bias) if bias.dtype == torch.bool else added + bias
        bias = added.to(query.dtype)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=bias,
        dropout_p=kwargs.get("dropout_p", 0.0),
        is_causal=causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _hidden(bias: Tensor | None, seen: Tensor) -> Tensor:
    """A mask that hides what is not seen too."""
    if bias is None:
        return seen
    return bias & seen if bias.dtype == torch.bool else bias.masked_fill(~seen, float("-inf"))


def same_draws(function: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
    """What stands for eager, which drops other weights than `function`: where weights are dropped
    the reference in the same dtype, with a backward from the output (see _FromOutput)."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("dropout_p"):
            return eager(*args, **kwargs)
        query, both = args[0], kwargs | {"return_lse": True}
        wide, named = tree_map_only(Tensor, _to_double, (args, both))
        with torch.no_grad(), torch.random.fork_rng([query.device] if query.is_cuda else []):
            exact, _ = function(*wide, **named)
        out, lse = _FromOutput.apply(*function(*args, **both), exact)
        return (out, lse) if kwargs.get("return_lse") else out

    return call


class _FromOutput(torch.autograd.Function):
    """(out, lse) as they are. The gradient of the scores needs of each row the sum over d of
    grad_out_d out_d; it comes from `out`, which was rounded, and not from the weights, as in every
    backward pass that saves none of them (Dao et al. 2022, "FlashAttention", B.4)."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, lse: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(out, exact)
        return out.clone(), lse.clone()

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor, None]:
        out, exact = ctx.saved_tensors
        dtype = grad_lse.dtype
        change = (grad_out.to(dtype) * out.to(dtype)).sum(-1) - (grad_out * exact).sum(-1)
        change = change if change.dim() == 3 else change.T  # packed: (T, H) and (H, T)
        return grad_out, (grad_lse - change).to(dtype), None


def _to_double(t: Tensor) -> Tensor:
    return t.double() if t.dtype.is_floating_point else t


def cost(passes: str, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Cost:
    batch, heads, rows, head_size = query.shape
    columns, value_size = value.shape[2:]
    window = given.bounds(kwargs.get("window_size", (-1, -1)), kwargs.get("causal", False))
    seen = batch * heads * pairs(rows, columns, *window)
    forward = 2.0 * seen * (head_size + value_size)
    size = query.element_size()
    out = batch * heads * rows * value_size
    moved = size * (query.numel() + key.numel() + value.numel() + out)
    if passes == "forward":
        return Cost(forward, moved)
    return Cost(3.5 * forward, 3.0 * moved)


def pairs(rows: int, columns: int, left: int, right: int) -> float:
    """How many pairs of a query and a key see each other; half of all under a causal mask."""
    if left < 0 and rows == columns and right in (-1, 0):
        return rows * columns * (0.5 if right == 0 else 1.0)
    i = torch.arange(rows, dtype=torch.float64) + (columns - rows)
    first = torch.zeros_like(i) if left < 0 else (i - left).clamp(0, columns)
    end = torch.full_like(i, columns) if right < 0 else (i + right + 1).clamp(0, columns)
    return float((end - first).clamp(min=0).sum())


def _sample(
    name: str,
    shape: tuple[int, int, int, int],
    *,
    kv_heads: int | None = None,
    kv_length: int | None = None,
    value_size: int | None = None,
    mask: str | None = None,
    heads_inside: bool = False,
    slopes: str | None = None,
    sinks: bool = False,
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
        elif mask == "square":
            extra["bias"] = torch.randn(rows, columns, device=device, dtype=dtype)
        elif mask == "hidden rows":
            extra["bias"] = torch.randn(rows, columns, device=device, dtype=dtype)
            extra["bias"][::3] = float("-inf")
        elif mask is not None and mask.startswith("grad"):
            full = (batch, heads, rows, columns)
            kept = (mask[4 + d] != "1" for d in range(4))
            drawn = torch.randn([n if k else 1 for n, k in zip(full, kept, strict=True)])
            extra["bias"] = drawn.to(device=device, dtype=dtype).requires_grad_(grad)
        if slopes is not None:
            each = (batch, heads) if slopes == "batch" else (heads,)
            extra["alibi_slopes"] = torch.rand(each, device=device) * 0.2
        if sinks:
            extra["sinks"] = torch.randn(heads, device=device, dtype=dtype).requires_grad_(grad)
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
    _sample("gradcheck, window", (1, 2, 6, 3), kv_length=7, window_size=(2, 1), gradcheck=True),
    _sample("gradcheck, softcap", (1, 2, 4, 3), kv_length=5, softcap=0.7, gradcheck=True),
    _sample("gradcheck, alibi", (2, 2, 4, 3), slopes="batch", causal=True, gradcheck=True),
    _sample("gradcheck, bias", (2, 2, 4, 3), kv_length=3, mask="gradb1ij", gradcheck=True),
    _sample("gradcheck, bias of a row", (2, 2, 3, 2), mask="grad1h1j", gradcheck=True),
    _sample("gradcheck, sinks", (1, 2, 4, 3), sinks=True, causal=True, gradcheck=True),
    _sample("gradcheck, everything", (2, 4, 5, 2), kv_heads=2, kv_length=7, causal=True,
            window_size=(3, -1), softcap=1.5, slopes="head", mask="grad11ij", sinks=True,
            return_lse=True, gradcheck=True),
    _sample("window", (1, 2, 200, 32), window_size=(20, 9)),
    _sample("window, causal", (2, 2, 150, 16), kv_heads=1, window_size=(33, -1), causal=True),
    _sample("window, more keys", (1, 2, 70, 24), kv_length=200, window_size=(17, 64)),
    _sample("window, more queries", (1, 2, 200, 24), kv_length=70, window_size=(64, 17)),
    _sample("window of one key", (1, 2, 40, 16), window_size=(0, 0)),
    _sample("right window", (1, 2, 100, 16), kv_length=90, window_size=(-1, 5)),
    _sample("softcap", (1, 2, 70, 32), kv_length=90, softcap=2.0, causal=True),
    _sample("alibi", (2, 3, 66, 16), slopes="head", kv_length=80),
    _sample("alibi per batch, causal", (2, 3, 66, 16), slopes="batch", causal=True),
    _sample("bias per head", (2, 4, 40, 16), kv_heads=2, mask="grad1hij", causal=True),
    _sample("bias in full", (2, 2, 33, 16), kv_length=70, mask="gradbhij"),
    # Without a sink, a bias of whole rows changes nothing: its gradient is 0.
    _sample("bias per query", (2, 2, 70, 16), mask="gradb1i1", kv_length=20, sinks=True),
    _sample("bias per key", (2, 2, 70, 16), mask="grad111j", kv_length=130, softcap=1.0),
    _sample("bias of one number a head", (2, 8, 20, 16), mask="grad1h11", kv_length=30, sinks=True),
    _sample("sinks", (2, 4, 65, 24), kv_heads=2, sinks=True, kv_length=40),
    _sample("sinks, causal, lse", (1, 2, 65, 24), sinks=True, causal=True, return_lse=True,
            kv_length=33),
    _sample("dropout", (2, 2, 65, 32), kv_length=140, dropout_p=0.2),
    _sample("dropout, causal, gqa", (2, 4, 70, 16), kv_heads=2, causal=True, dropout_p=0.5),
    _sample("dropout of everything", (1, 2, 20, 16), dropout_p=1.0),
    _sample("all at once", (2, 4, 80, 16), kv_heads=2, kv_length=100, value_size=24, causal=True,
            window_size=(40, -1), softcap=3.0, slopes="batch", mask="grad1hij", sinks=True,
            dropout_p=0.1, return_lse=True),
    _sample("1x8x2048x64", (1, 8, 2048, 64), grad=False, bench=True),
    _sample("1x8x2048x128", (1, 8, 2048, 128), grad=False, bench=True),
    _sample("1x8x2048x64 causal, inference", (1, 8, 2048, 64), causal=True, grad=False, bench=True),
    _sample("1x8x2048x128 causal, inference", (1, 8, 2048, 128), causal=True, grad=False,
            bench=True),
    _sample("1x8x2048x64 causal", (1, 8, 2048, 64), causal=True, bench=True),
    _sample("1x8x2048x128 causal", (1, 8, 2048, 128), causal=True, bench=True),
    _sample("2x8:2x1024x64 causal", (2, 8, 1024, 64), kv_heads=2, causal=True, bench=True),
    _sample("2x8x1024x64 causal, dropout", (2, 8, 1024, 64), causal=True, dropout_p=0.1,
            bench=True),
    _sample("2x8x1024x64 mask", (2, 8, 1024, 64), mask="square", bench=True),
    _sample("1x8x8192x64 window 256", (1, 8, 8192, 64), causal=True, window_size=(256, -1),
            bench=True),
)  # fmt: skip


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
