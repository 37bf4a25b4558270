"""TFLOP/s of attention's CUDA C++ kernels beside cuDNN's and FlashAttention-2 (torch's):

    python -m bigops.bench.attention_rates OUT.json

The kernels alone: no autograd, no dispatcher. Contestants take turns, the median of each counts; a
GPU under such a load may clock down by a tenth, so compare within a line. Operations are counted
as in FlashAttention's tables: 4 B H S^2 D forward, half of that under a causal mask, 2.5 times as
many backward.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..backends import cuda

Contestants = dict[str, Callable[[], Any]]

# (head size, length, batch, heads)
SIZES = (
    (128, 8192, 2, 16),
    (128, 2048, 8, 16),
    (128, 16384, 1, 16),
    (64, 8192, 2, 32),
    (96, 8192, 2, 16),
    (256, 8192, 2, 8),
)
TORCH = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash2": SDPBackend.FLASH_ATTENTION}
ROUNDS, CALLS = 8, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", metavar="OUT.json")
    args = parser.parse_args()
    if reason := cuda.why_not():
        parser.exit(2, f"attention_rates: {reason}\n")
    found = []
    for size in SIZES:
        for causal in (False, True):
            for name, contestants, operations in passes(*size, causal):
                head_size, length, batch, heads = size
                case = f"{name} {batch}x{heads}x{length}x{head_size}" + " causal" * causal
                rates = {k: operations / ms / 1e9 for k, ms in in_turns(contestants).items()}
                found.append({"case": case, "tflops": {k: round(r, 1) for k, r in rates.items()}})
                print(case, *(f"{k} {r:.0f}" for k, r in rates.items()), sep="  ", flush=True)
                with open(args.out, "w") as file:
                    json.dump(
                        {"device": torch.cuda.get_device_name(), "rates": found}, file, indent=1
                    )


def passes(
    head_size: int, length: int, batch: int, heads: int, causal: bool
) -> list[tuple[str, Contestants, float]]:
    """(pass, contestants, operations) on fresh inputs."""

    def draw() -> torch.Tensor:
        shape = (batch, heads, length, head_size)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

    query, key, value = leaves = (draw(), draw(), draw())
    inputs = tuple(leaf.detach() for leaf in leaves)
    grad_out, out = torch.randn_like(inputs[0]), torch.empty_like(inputs[0])
    lse = torch.empty(batch, heads, length, device="cuda")
    grads = tuple(torch.empty_like(t) for t in inputs)
    kernels = cuda.kernels()
    bounds = (1.0 / math.sqrt(head_size), 0, -1, 0 if causal else -1, 0.0)
    families = ("sm90", "sm80") if cuda.capability(query.device) == (9, 0) else ("sm80",)
    forward: Contestants = {}
    backward: Contestants = {}
    for family in families:
        run = getattr(kernels, f"attention_forward_{family}")
        scratch = torch.empty(kernels.FORWARD_WORKSPACE, dtype=torch.uint8, device="cuda")
        forward[family] = _call(run, *inputs, out, lse, *bounds, None, scratch)
        name = f"attention_backward_{family}"
        size = getattr(kernels, f"{name}_workspace")(*inputs[:2], None)
        scratch = torch.empty(size, dtype=torch.uint8, device="cuda")
        saved = (grad_out, *inputs, out, lse, None, *grads)
        for word, fixed in (("", False), (", deterministic", True)):
            backward[family + word] = _call(
                getattr(kernels, name), *saved, *bounds, fixed, None, scratch
            )
    forward[families[0]]()  # the backward kernels read its out and lse
    for name, backend in TORCH.items():
        forward[name] = _torch(backend, *inputs, causal)
        result = _torch(backend, *leaves, causal)()
        backward[name] = _call(
            torch.autograd.grad, result, (query, key, value), grad_out, retain_graph=True
        )
    operations = 4.0 * batch * heads * length**2 * head_size * (0.5 if causal else 1.0)
    return [("forward", forward, operations), ("backward", backward, 2.5 * operations)]


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Any]:
    return lambda: function(*args, **kwargs)


def _torch(backend: SDPBackend, *args: Any) -> Callable[[], Any]:
    *tensors, causal = args

    def call() -> Any:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*tensors, is_causal=causal)

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
