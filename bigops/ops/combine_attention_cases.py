"""combine_attention's samples, its eager baseline, its cost and its random calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .declare import Call, Chooser, Cost, Sample
from .fuzz import (
    Arguments,
    Fault,
    changed,
    instead,
    layout,
    longer,
    on_meta,
    other_dtype,
    sizes,
    spoilt,
)


def eager(outs: Tensor | Sequence[Tensor], lses: Tensor | Sequence[Tensor]) -> Any:
    """What is written down where partial results are combined by hand."""
    outs = outs if isinstance(outs, Tensor) else torch.stack(tuple(outs))
    lses = lses if isinstance(lses, Tensor) else torch.stack(tuple(lses))
    lse = torch.logsumexp(lses, dim=0)
    weights = torch.softmax(lses, dim=0).nan_to_num(0.0).unsqueeze(-1)
    return (weights * outs).sum(dim=0).to(outs.dtype), lse


def cost(passes: str, outs: Tensor | Sequence[Tensor], lses: Tensor | Sequence[Tensor]) -> Cost:
    """Each part is read once, twice with gradients, and written once as a gradient."""
    parts = len(outs)
    elements = _count(outs)
    size = (elements * _width(outs) + _count(lses) * _width(lses)) / parts
    flops = 2.0 * elements
    if passes == "forward":
        return Cost(flops, float((parts + 1) * size))
    return Cost(3.0 * flops, float((3 * parts + 2) * size))


def _count(tensors: Tensor | Sequence[Tensor]) -> int:
    return tensors.numel() if isinstance(tensors, Tensor) else sum(t.numel() for t in tensors)


def _width(tensors: Tensor | Sequence[Tensor]) -> int:
    return (tensors if isinstance(tensors, Tensor) else tensors[0]).element_size()


def _sample(
    name: str,
    parts: int,
    shape: tuple[int, int, int, int],
    *,
    hidden: float = 0.0,
    listed: bool = False,
    grad: bool = True,
    bench: bool = False,
    gradcheck: bool = False,
) -> Sample:
    """hidden: the share of parts that saw nothing."""

    def make(device: str, dtype: torch.dtype) -> Call:
        outs = torch.randn(parts, *shape, device=device, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        lses = 3.0 * torch.randn(parts, *shape[:3], device=device, dtype=wide)
        lses = lses.masked_fill(torch.rand_like(lses) < hidden, float("-inf"))
        if not listed:
            return (outs.requires_grad_(grad), lses.requires_grad_(grad)), {}
        lists = ([t.clone().requires_grad_(grad) for t in whole] for whole in (outs, lses))
        return tuple(lists), {}

    return Sample(name, make, bench=bench, gradcheck=gradcheck)


SAMPLES = (
    _sample("gradcheck", 3, (1, 2, 3, 4), gradcheck=True),
    _sample("gradcheck, one part", 1, (1, 1, 2, 3), gradcheck=True),
    _sample("one element", 1, (1, 1, 1, 1)),
    _sample("two parts", 2, (2, 3, 17, 64)),
    _sample("parts that saw nothing", 4, (2, 2, 20, 33), hidden=0.5),
    _sample("all saw nothing", 2, (1, 2, 5, 8), hidden=1.1),
    _sample("a list", 3, (2, 2, 9, 16), listed=True),
    _sample("many parts", 70, (1, 2, 3, 40)),
    _sample("head size 256", 3, (1, 2, 5, 256)),
    _sample("no rows", 3, (1, 2, 0, 8)),
    _sample("no head size", 2, (1, 2, 3, 0)),
    _sample("8x32x8x1x128", 8, (32, 8, 1, 128), grad=False, bench=True),
    _sample("4x1x8x4096x64", 4, (1, 8, 4096, 64), bench=True),
)

SWEEPS = {
    "N": lambda size, device: _sample(
        f"{size}x1x8x1024x64", size, (1, 8, 1024, 64), grad=False, bench=True
    ),
}

TENSORS = ("outs", "lses")


def arbitrary(choose: Chooser) -> Sample:
    """A small call; shapes, strides and gradients of any kind."""
    parts = choose.choice((1, 2, 3, 5, 17))
    shape = (
        parts,
        choose.choice((1, 2, 3, 0)),
        choose.choice((1, 2, 3)),
        choose.choice((1, 2, 5, 0, 17)),
        choose.choice((1, 2, 7, 8, 16, 33, 64, 128, 256, 300)),
    )
    layouts = layout(choose, 5, expanded=2), layout(choose, 4, expanded=2)
    grads = choose.choice((False, True)), choose.choice((False, True))
    # The gradient of a single part's lse is the whole's, and 0 where that is not asked for.
    hidden = choose.choice((0.0, 0.3, 0.9))
    spread = choose.choice((1.0, 10.0, 100.0))

    def make(device: str, dtype: torch.dtype) -> Call:
        outs = torch.randn(shape, device=device, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        lses = spread * torch.randn(shape[:4], device=device, dtype=wide)
        lses = lses.masked_fill(torch.rand_like(lses) < hidden, float("-inf"))
        laid = (lies.laid(t) for lies, t in zip(layouts, (outs, lses), strict=True))
        return tuple(t.requires_grad_(g) for t, g in zip(laid, grads, strict=True)), {}

    words = [f"outs {sizes(shape)}{layouts[0]}", f"lses{layouts[1]} times {spread}"]
    words += [f"{hidden} hidden"] if hidden else []
    wanted = [name for name, grad in zip(TENSORS, grads, strict=True) if grad]
    words += [f"gradients of {' and '.join(wanted)}"] if wanted else []
    return Sample(", ".join(words), make)


def illegal(choose: Chooser) -> tuple[Sample, str]:
    """A legal call with one thing made wrong."""
    return spoilt(arbitrary(choose), TENSORS, choose.choice(FAULTS))


def _integers(given: Arguments) -> Arguments:
    return {"outs": given["outs"].detach().long()}


def _unlike(given: Arguments) -> Arguments:
    part = given["outs"].detach()[0]
    return {"outs": [part, part.new_zeros(1, 1, 1, 1).expand(4, 4, 4, 4)]}


FAULTS = (
    *(fault for name in TENSORS for fault in instead(name, None, 1.0, [], [1.0])),
    *(changed(name, "sparse", lambda t: t.detach().to_sparse()) for name in TENSORS),
    *(changed(name, "of fewer dimensions", lambda t: t.sum(0)) for name in TENSORS),
    Fault("outs", "of integers", _integers),
    Fault("outs", "of no parts", lambda given: {n: given[n][:0] for n in TENSORS}),
    Fault("outs", "a list of unlike parts", _unlike),
    changed("lses", "of another dtype", other_dtype),
    changed("lses", "of half precision", Tensor.half),
    changed("lses", "on another device", on_meta),
    changed("lses", "with a part more", longer(0)),
    changed("lses", "with a row more", longer(3)),
)
