"""Attention on a CPU beside the best that PyTorch has for each call, one line per goal:

    python -m bigops.bench.attention_goals [WORD]      # only the lines with WORD in their name

What a line says is in goals.py. PyTorch gets what a user would write: scaled_dot_product_attention
with is_causal, a mask or dropout, eager and by torch.compile. A window may be had there as a
boolean mask or, of more keys than were asked for, as a plain causal mask.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import bigops
from bigops.bench.goals import Contestants, Goal, head, line


def main() -> None:
    """Print the table."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    head()
    for dtype in (torch.float32, torch.bfloat16):
        for name, ours, theirs in goals(dtype):
            if word in name:
                line(name, dtype, ours(), theirs())


def goals(dtype: torch.dtype) -> Iterator[Goal]:
    """(name, ours, PyTorch's); built when they are asked for."""
    for size in (64, 128):
        shape = (1, 8, 2048, size)
        for causal in (False, True):
            said = "causal" if causal else "full"
            yield _goal(f"1x8x2048x{size} {said}, forward", dtype, shape, causal=causal, grad=False)
        yield _goal(f"1x8x2048x{size} causal, forward + backward", dtype, shape, causal=True)
    shape = (2, 8, 1024, 64)
    yield _goal("2x8x1024x64 causal, dropout 0.1", dtype, shape, causal=True, dropout_p=0.1)
    yield _goal("2x8x1024x64 additive mask", dtype, shape, mask=True)
    yield _goal("2x8:2x1024x64 causal", dtype, shape, kv_heads=2, causal=True)
    yield _goal("1x8x8192x64 causal, window 256", dtype, (1, 8, 8192, 64), causal=True, window=256)
    yield _decoding("32 sequences, 8 heads, caches of 4096", dtype)


def _goal(
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    *,
    causal: bool = False,
    grad: bool = True,
    kv_heads: int | None = None,
    dropout_p: float = 0.0,
    mask: bool = False,
    window: int | None = None,
) -> Goal:
    batch, heads, length, size = shape
    kv = (batch, kv_heads or heads, length, size)
    tensors = [torch.randn(s, dtype=dtype).requires_grad_(grad) for s in (shape, kv, kv)]
    grad_out = torch.randn(shape, dtype=dtype)
    added = torch.randn(length, length, dtype=dtype) if mask else None

    def run(call: Callable[..., Tensor], **kwargs: Any) -> Callable[[], Any]:
        def run_once() -> Any:
            out = call(*tensors, **kwargs)
            return torch.autograd.grad(out, tensors, grad_out) if grad else out

        return run_once

    def ours() -> Callable[[], Any]:
        kwargs: dict[str, Any] = {"causal": causal, "dropout_p": dropout_p, "bias": added}
        if window is not None:
            kwargs["window_size"] = (window, -1)
        return run(bigops.attention, **kwargs)

    def theirs() -> Contestants:
        compiled = torch.compile(sdpa, dynamic=False)
        kwargs = {"is_causal": causal, "dropout_p": dropout_p, "attn_mask": added}
        kwargs["enable_gqa"] = kv_heads is not None
        ways = {"eager": (sdpa, kwargs), "compile": (compiled, kwargs)}
        if window is not None:
            ahead = torch.arange(length) - torch.arange(length)[:, None]
            seen = {"attn_mask": (ahead <= 0) & (ahead >= -window)}
            causal_only = {"is_causal": True}
            ways = {"mask": (sdpa, seen), "compiled mask": (compiled, seen)}
            ways["causal without window"] = (sdpa, causal_only)
        return {name: run(call, **kwargs) for name, (call, kwargs) in ways.items()}

    return name, ours, theirs


def _decoding(name: str, dtype: torch.dtype) -> Goal:
    query = torch.randn(32, 8, 1, 64, dtype=dtype)
    keys, values = torch.randn(2, 32, 8, 4096, 64, dtype=dtype).unbind()
    lengths = torch.randint(3072, 4096, (32,), dtype=torch.int32)
    seen = (torch.arange(4096) < lengths[:, None])[:, None, None]
    compiled = torch.compile(sdpa, dynamic=False)
    theirs = {
        "mask": lambda: sdpa(query, keys, values, attn_mask=seen),
        "compiled mask": lambda: compiled(query, keys, values, attn_mask=seen),
    }
    return (
        name,
        lambda: lambda: bigops.decode_attention(query, keys, values, lengths),
        lambda: theirs,
    )


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
