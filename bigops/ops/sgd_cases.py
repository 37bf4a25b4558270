"""Samples, eager baseline and cost of sgd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd as torch_sgd

from .adam_cases import LAYER, SHAPES, drawn, scaled
from .declare import Call, Cost, Sample
from .step_arguments import DTYPES


def eager(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], **kwargs: Any) -> None:
    """torch.optim's own function, after GradScaler's unscaling and torch.nn.utils' clipping."""
    copies = kwargs.pop("low_precision_params", None)
    first = kwargs.pop("is_first_step", False)
    found, kwargs = scaled(grads, kwargs)
    if found is None:
        return
    wide: list[Tensor | None] = [b.to(p.dtype) for b, p in zip(buffers, params, strict=False)]
    if first or not buffers:
        wide = [None] * len(params)
    rest = {"lr": 1e-3, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0}
    rest |= {"nesterov": False, "maximize": False}
    torch_sgd(params, found, wide, **(rest | kwargs))
    for buffer, value in zip(buffers, wide, strict=False):
        if value is not None:
            buffer.copy_(value)
    for copy, param in zip(copies or (), params, strict=False):
        copy.copy_(param)


def cost(passes: str, params: Sequence[Tensor], *args: Any, **kwargs: Any) -> Cost:
    """One pass whatever `passes` says."""
    momentum = bool(kwargs.get("momentum"))
    reads = 2 + (momentum and not kwargs.get("is_first_step"))
    reads += kwargs.get("max_grad_norm") is not None
    count = sum(p.numel() for p in params)
    size = sum(p.numel() * p.element_size() for p in params)
    copied = sum(p.numel() * p.element_size() for p in kwargs.get("low_precision_params") or ())
    return Cost((2.0 + 2.0 * momentum) * count, float((reads + 1 + momentum) * size + copied))


def _sample(
    name: str,
    shapes: Sequence[tuple[int, ...]],
    *,
    bench: bool = False,
    strided: bool = False,
    low: torch.dtype | None = None,
    states: torch.dtype | None = None,
    **kwargs: Any,
) -> Sample:
    """low: what low_precision_params are of, if there are any. states: what buffers are of."""

    def make(device: str, dtype: torch.dtype) -> Call:
        params, grads, buffers = (drawn(shapes, device, dtype) for _ in range(3))
        if strided:
            laid = drawn([s[::-1] for s in shapes], device, dtype)
            params = [t.transpose(0, -1) for t in laid]
        if not kwargs.get("momentum"):
            buffers = []
        buffers = [b.to(states or dtype) for b in buffers]
        copies = {} if low is None else {"low_precision_params": [p.to(low) for p in params]}
        return (params, grads, buffers), kwargs | copies

    return Sample(name, make, bench=bench, dtypes=DTYPES[:3] if states else ())


MOMENTUM: dict[str, Any] = {"momentum": 0.9, "lr": 0.01}
MANY = {"bench": True, "weight_decay": 1e-4, **MOMENTUM}
ALL: dict[str, Any] = {"dampening": 0.5, "weight_decay": 0.1, "maximize": True, **MOMENTUM}
BF16: dict[str, Any] = {"states": torch.bfloat16, "low": torch.bfloat16}

SAMPLES = (
    _sample("plain", SHAPES, lr=0.1),
    _sample("nothing", []),
    _sample("one element", [(1,)], **MOMENTUM),
    _sample("momentum", SHAPES, **MOMENTUM),
    _sample("nesterov", SHAPES, nesterov=True, weight_decay=0.1, **MOMENTUM),
    _sample("dampening, maximize", SHAPES, **ALL),
    _sample("first step", SHAPES, is_first_step=True, **ALL),
    _sample("clipped", SHAPES, max_grad_norm=1.0, **MOMENTUM),
    _sample("strides differ", [(3, 5), (64, 9, 65)], strided=True, max_grad_norm=1.0, **ALL),
    _sample("long and short", [(70001,), (5,), (0,), (32768,), (3, 3), (40000,)], **MOMENTUM),
    _sample("bfloat16 copies", SHAPES, low=torch.bfloat16, weight_decay=0.1),
    _sample("bfloat16 buffers and copies", SHAPES, nesterov=True, **BF16, **MOMENTUM),
    _sample("200 tensors", [(7 * i % 50,) for i in range(200)], **MOMENTUM),
    _sample("48 tensors, 14.2M", LAYER * 6, **MANY),
    _sample("48 tensors, 14.2M, clipped", LAYER * 6, max_grad_norm=1.0, **MANY),
    _sample("1000 tensors of 1000", [(1000,)] * 1000, **MANY),
)

SWEEPS = {
    "numel": lambda size, device: _sample(f"{size} elements", [(size,)], **MANY),
    "tensors": lambda size, device: _sample(f"{size} tensors of 10000", [(10000,)] * size, **MANY),
}
