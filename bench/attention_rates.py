"""TFLOP/s of attention's kernels beside cuDNN's, FlashAttention-2 (torch's) and newer ones, where
they are installed:

    python -m bigops.bench.attention_rates OUT.json [--head-sizes 64 128 256] [--lengths 512 ...]

The kernels alone: no autograd, no dispatcher. Contestants take turns, the median of each counts; a
GPU under such a load may clock down by a tenth, so compare within a line. Operations are counted
as in FlashAttention's tables: 4 B H S^2 D forward, half of that under a causal mask, 2.5 times as
many backward; and so are the sizes, 16384 tokens of 2048 channels.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..backends import cuda, triton
from .peers.adapter import first_line
from .peers.flash_attention import ADAPTERS

Contestants = dict[str, Callable[[], Any]]

HEAD_SIZES, LENGTHS = (64, 128, 256), (512, 1024, 2048, 4096, 8192, 16384)
TOKENS, CHANNELS = 16384, 2048
TORCH = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash2": SDPBackend.FLASH_ATTENTION}
OTHERS = {*TORCH, *(adapter.name for adapter in ADAPTERS)}
ROUNDS, CALLS = 6, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("out", metavar="OUT.json")
    parser.add_argument("--head-sizes", type=int, nargs="+", default=HEAD_SIZES)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "attention_rates: torch finds no GPU here\n")
    sizes = [(d, n, c) for d in args.head_sizes for n in args.lengths for c in (False, True)]
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    missing = {"cuda": cuda.why_not(), "triton": triton.why_not("cuda")}
    missing |= {a.name: a.why_not("cuda", torch.bfloat16) for a in ADAPTERS}
    found: list[dict[str, Any]] = []
    for head_size, length, causal in sizes:
        heads = CHANNELS // head_size
        batch = max(1, TOKENS // length)
        for name, contestants, operations in passes(head_size, length, batch, heads, causal):
            case = f"{name} {batch}x{heads}x{length}x{head_size}" + " causal" * causal
            times = in_turns(able(contestants, missing))
            rates = {k: round(operations / ms / 1e9, 1) for k, ms in times.items()}
            found.append({"case": case, "tflops": rates})
            print(case, *(f"{k} {r:.0f}" for k, r in rates.items()), sep="  ", flush=True)
            with open(args.out, "w") as file:
                json.dump(facts | {"missing": missing, "rates": found}, file, indent=1)


def able(contestants: Contestants, missing: dict[str, Any]) -> Contestants:
    """Those that do it; why one of another make does not is told once."""
    kept = {}
    for name, call in contestants.items():
        try:
            call()
            torch.cuda.synchronize()
        except Exception as error:  # a size that it is not made for raises what it likes
            if name not in OTHERS:
                raise
            if missing.get(name) is None:
                missing[name] = first_line(error)
                print(f"attention_rates: {name}: {missing[name]}", file=sys.stderr)
        else:
            kept[name] = call
    return kept


def passes(
    head_size: int, length: int, batch: int, heads: int, causal: bool
) -> list[tuple[str, Contestants, float]]:
    """(pass, contestants, operations) on fresh inputs."""

    def draw() -> Tensor:
        shape = (batch, heads, length, head_size)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

    leaves = draw(), draw(), draw()
    inputs = tuple(leaf.detach() for leaf in leaves)
    grad_out = torch.randn_like(inputs[0])
    forward: Contestants = {}
    backward: Contestants = {}
    for ours in (_cuda, _triton):
        for found, more in zip(
            (forward, backward), ours(grad_out, *inputs, causal=causal), strict=True
        ):
            found.update(more)
    others = {name: _torch(backend) for name, backend in TORCH.items()}
    others |= {a.name: a.load() for a in ADAPTERS if a.why_not("cuda", torch.bfloat16) is None}
    for name, function in others.items():
        forward[name] = _call(function, *inputs, causal=causal)
        backward[name] = _gradients(function, leaves, grad_out, causal)
    operations = 4.0 * batch * heads * length**2 * head_size * (0.5 if causal else 1.0)
    return [("forward", forward, operations), ("backward", backward, 2.5 * operations)]


def _cuda(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, causal: bool
) -> tuple[Contestants, Contestants]:
    """Ours in CUDA C++: what the GPU is served by, deterministic too."""
    if cuda.why_not() is not None:
        return {}, {}
    kernels = cuda.kernels()
    family = "sm90" if cuda.capability(query.device) == (9, 0) else "sm80"
    out, lse = torch.empty_like(query), torch.empty(query.shape[:3], device="cuda")
    grads = tuple(torch.empty_like(t) for t in (query, key, value))
    bounds = (1.0 / math.sqrt(query.shape[-1]), 0, -1, 0 if causal else -1, 0.0)
    scratch = torch.empty(kernels.FORWARD_WORKSPACE, dtype=torch.uint8, device="cuda")
    run = getattr(kernels, f"attention_forward_{family}")
    forward = _call(run, query, key, value, out, lse, *bounds, None, scratch)
    forward()  # the backward kernels read its out and lse
    name = f"attention_backward_{family}"
    size = getattr(kernels, f"{name}_workspace")(query, key, None)
    space = torch.empty(size, dtype=torch.uint8, device="cuda")
    saved = (grad_out, query, key, value, out, lse, None, *grads)
    backward = {
        family + word: _call(getattr(kernels, name), *saved, *bounds, fixed, None, space)
        for word, fixed in (("", False), (", deterministic", True))
    }
    return {family: forward}, backward


def _triton(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, causal: bool
) -> tuple[Contestants, Contestants]:
    """Ours in Triton, the same bits in every run."""
    if triton.why_not("cuda") is not None:
        return {}, {}
    from ..kernels import attention

    scale = 1.0 / math.sqrt(query.shape[-1])
    bounds = (-1, 0 if causal else -1, False, scale, 0.0, 0.0)
    forward = _call(attention.forward, query, key, value, *[None] * 7, *bounds)
    saved = (grad_out, None, query, key, value, *[None] * 4, *forward())
    needs = (True, True, True, False, False)
    return {"triton": forward}, {"triton": _call(attention.backward, *saved, *bounds, needs)}


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Any]:
    return lambda: function(*args, **kwargs)


def _torch(backend: SDPBackend) -> Callable[..., Tensor]:
    def attention(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value, is_causal=causal)

    return attention


def _gradients(
    function: Callable[..., Tensor], leaves: tuple[Tensor, ...], grad_out: Tensor, causal: bool
) -> Callable[[], Any]:
    """The backward pass of a call that is made once, when it is first wanted."""
    out: list[Tensor] = []

    def call() -> Any:
        if not out:
            out.append(function(*leaves, causal=causal))
        return torch.autograd.grad(out[0], leaves, grad_out, retain_graph=True)

    return call


def in_turns(contestants: Contestants) -> dict[str, float]:
    """Median milliseconds of a call, by events on the device."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, call in contestants.items():
            call()
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(CALLS + 1)]
            marks[0].record()
            for mark in marks[1:]:
                call()
                mark.record()
            torch.cuda.synchronize()
            times[name] += [a.elapsed_time(b) for a, b in pairwise(marks)]
    return {name: statistics.median(found) for name, found in times.items()}


if __name__ == "__main__":
    main()
