"""Whether a contestant computes what eager does: asked once, before it is timed.

A peer need not be as exact as we demand of ourselves, so its limit is wider than `check`'s: its
error against eager in float64 may be twice eager's own or leave half of the dtype's digits,
whichever is more. A wrong mask, scale or layout is off by far more than that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bigops.check import compare
from bigops.ops.declare import Call

Results = Mapping[str, Tensor]


@dataclass(frozen=True)
class Expected:
    """A call, what eager makes of it, and the same in float64 (or again, if that is too large)."""

    call: Call
    eager: Results
    exact: Results


def expected(eager: Callable[..., Any], call: Call, exact: bool = True) -> Expected:
    """Run eager on `call`, and with `exact` in float64 too."""
    found = results(eager, call)
    if not exact:
        return Expected(call, found, found)
    return Expected(call, found, results(eager, pytree.tree_map_only(Tensor, _widened, call)))


def disagreement(
    function: Callable[..., Any], prepare: Callable[[Call], Call] | None, wanted: Expected
) -> str | None:
    """None if `function` agrees on the prepared call, else which tensor is off, and by how much."""
    call = prepare(wanted.call) if prepare else wanted.call
    return worst(results(function, call), wanted.eager, wanted.exact)


def worst(found: Results, eager: Results, exact: Results) -> str | None:
    """None if every tensor is within its limit, else the first that is not."""
    if found.keys() != eager.keys():
        return f"it gives {', '.join(found) or 'nothing'}, eager {', '.join(eager)}"
    for name, got in found.items():
        if got.shape != eager[name].shape:
            return f"its {name} has shape {tuple(got.shape)}, eager's {tuple(eager[name].shape)}"
        judged = compare(name, got, eager[name], exact[name])
        limit = max(judged.error_limit, math.sqrt(torch.finfo(eager[name].dtype).eps))
        if not judged.error <= limit:
            return f"its {name} is off by {judged.error:.1e} ({judged.metric}; limit {limit:.1e})"
    return None


def results(function: Callable[..., Any], call: Call) -> dict[str, Tensor]:
    """Outputs and gradients by name; the incoming gradients are the same for every function."""
    args, kwargs = call
    outputs = _tensors(function(*args, **kwargs))
    found = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    leaves = [t for t in _tensors(call) if t.requires_grad]
    roots = [t for t in outputs if t.requires_grad]
    if leaves and roots:
        grads = torch.autograd.grad(roots, leaves, [_gradient(t) for t in roots], allow_unused=True)
        found |= {f"gradient {i}": g for i, g in enumerate(grads) if g is not None}
    return found


def _gradient(out: Tensor) -> Tensor:
    """Random, with the same values in every dtype."""
    generator = torch.Generator().manual_seed(out.numel())
    return torch.randn(out.shape, generator=generator).bfloat16().to(out.device, out.dtype)


def _widened(t: Tensor) -> Tensor:
    if not t.dtype.is_floating_point:
        return t
    return t.detach().double().requires_grad_(t.requires_grad)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
