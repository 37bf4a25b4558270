"""Bandwidth of Adam's CUDA C++ kernels beside torch's fused step and a copy:

    python -m bigops.bench.adam_rates OUT.json

Each step is a captured graph that is replayed, so that the host's time is not in it; contestants
take turns and the median of each counts. Bytes are those that a step has to move (28 a float32
parameter, 14 of 16 bits), a copy's those that it reads and writes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..backends import cuda
from ..ops.dispatch import use_backend
from ..optim import AdamW
from .attention_rates import in_turns

Shapes = Sequence[tuple[int, ...]]

LAYER = [(1331, 444), (1331,), (444, 444), (444,), (1776, 444), (1776,), (444, 1776), (444,)]
SIZES: dict[str, Shapes] = {
    "48 tensors, 14.2M": LAYER * 6,
    "1000 tensors, 14M": [(14_000,)] * 1000,
    "144 tensors, 0.6G": [(4096, 4096)] * 36 + [(4096,)] * 108,
}
DTYPES = (torch.float32, torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", metavar="OUT.json")
    args = parser.parse_args()
    if reason := cuda.why_not():
        parser.exit(2, f"adam_rates: {reason}\n")
    found = []
    for name, shapes in SIZES.items():
        for dtype in DTYPES:
            numel = sum(torch.Size(shape).numel() for shape in shapes)
            moved = 7 * numel * dtype.itemsize
            rates = {
                k: bytes_ / ms / 1e6 for k, (ms, bytes_) in times(shapes, dtype, moved).items()
            }
            case = f"{name}, {str(dtype)[6:]}"
            found.append({"case": case, "gbytes": {k: round(r) for k, r in rates.items()}})
            print(case, *(f"{k} {r:.0f}" for k, r in rates.items()), sep="  ", flush=True)
            with open(args.out, "w") as file:
                json.dump({"device": torch.cuda.get_device_name(), "rates": found}, file, indent=1)


def times(shapes: Shapes, dtype: torch.dtype, moved: float) -> dict[str, tuple[float, float]]:
    """Milliseconds and bytes by contestant; "clipped" reads the gradients once more."""
    options: dict[str, Any] = {"lr": torch.tensor(1e-3, device="cuda"), "capturable": True}
    contestants: dict[str, tuple[Callable[[], Any], float]] = {
        "ours": (step(partial(AdamW, **options), shapes, dtype), moved),
        "clipped": (
            step(partial(AdamW, max_grad_norm=1.0, **options), shapes, dtype),
            moved / 7 * 8,
        ),
        "fused": (step(partial(torch.optim.AdamW, fused=True, **options), shapes, dtype), moved),
    }
    source = torch.empty(int(moved / 2), dtype=torch.uint8, device="cuda").random_()
    contestants["copy"] = (partial(torch.empty_like(source).copy_, source), moved)
    found = in_turns({name: call for name, (call, _) in contestants.items()})
    return {name: (found[name], bytes_) for name, (_, bytes_) in contestants.items()}


def step(optimizer: Callable[..., Any], shapes: Shapes, dtype: torch.dtype) -> Callable[[], None]:
    """The replay of a graph of one step."""
    params = [torch.nn.Parameter(_drawn(shape, dtype)) for shape in shapes]
    for param in params:
        param.grad = _drawn(param.shape, dtype)
    chosen = optimizer(params)
    graph = torch.cuda.CUDAGraph()
    with use_backend("native"):
        chosen.step()  # makes the states
        with torch.cuda.graph(graph):
            chosen.step()
    return graph.replay


def _drawn(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.randn(tuple(shape), device="cuda", dtype=dtype)


if __name__ == "__main__":
    main()
