"""Call overhead: how much longer our call takes than eager's when there is nothing to compute.

Each op's smallest sample, without gradients and forward + backward (an op that updates its
arguments: through its optimizer, one parameter of one element). The figure is the median over
rounds of ours minus eager's in the same round.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bigops.bench import timing
from bigops.bench.cases import EAGER, FORWARD, FORWARD_BACKWARD, OURS, STEP, OpCase, call_of
from bigops.bench.optimizers import STEPS
from bigops.check import serves
from bigops.ops import Op, Sample

LIMITS_US = {FORWARD: 20.0, FORWARD_BACKWARD: 60.0, STEP: 60.0}


def overhead(op: Op, device: str, forced: str | None, seconds: float) -> list[dict[str, Any]]:
    """Microseconds of ours, of eager and their difference, per pass; empty if none is served."""
    sample = smallest(op, device, forced)
    if sample is None:
        return []
    found = []
    case = STEPS.get(op.name, OpCase)(op, sample, op.dtypes[0], device, forced)
    contests = {case.passes: {name: case.runner(name) for name in (OURS, EAGER)}}
    if case.passes == FORWARD_BACKWARD:
        sets = [_without_gradients(sample.make(device, case.dtype)) for _ in range(2)]
        functions = {OURS: case.ours, EAGER: op.eager}
        contests[FORWARD] = {name: call_of(f, sets) for name, f in functions.items()}
    clock = timing.clock_for(device)
    for passes, contestants in sorted(contests.items()):
        result = timing.contest(contestants, clock, seconds, sample_seconds=5e-4)
        excess = result.excess(OURS, EAGER)
        found.append(
            {
                "op": op.name,
                "case": sample.name,
                "pass": passes,
                "device": device,
                "backend": case.backend(),
                "ours_us": 1e6 * result.median(OURS),
                "eager_us": 1e6 * result.median(EAGER),
                "overhead_us": 1e6 * excess.median,
                "spread_us": 1e6 * excess.width,
                "limit_us": LIMITS_US[passes],
            }
        )
    return found


def smallest(op: Op, device: str, forced: str | None) -> Sample | None:
    """The op's sample with the fewest elements, that has some and that a fast backend serves."""
    backends = [forced] if forced else [b.name for b in op.backends if b.automatic(device)]
    sizes = []
    for index, sample in enumerate(op.samples):
        count = _elements(sample.make(device, op.dtypes[0])) if not sample.bench else 0
        if count and any(serves(op, sample, b, op.dtypes[0], device) is None for b in backends):
            sizes.append((count, index))
    return op.samples[min(sizes)[1]] if sizes else None


def _elements(call: Any) -> int:
    """Of all tensors; 0 when one is empty, since such a call returns early."""
    counts = [leaf.numel() for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor)]
    return sum(counts) if all(counts) else 0


def _without_gradients(call: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.Tensor.detach, call)
