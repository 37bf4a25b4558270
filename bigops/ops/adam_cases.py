"""Samples, eager baselines and costs of adam and grad_norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam

from .declare import Call, Cost, Sample
from .step_arguments import DTYPES


def eager(*args: Any, **kwargs: Any) -> None:
    """torch.optim's own function, after GradScaler's unscaling and torch.nn.utils' clipping."""
    params, grads, *averages, steps = args
    copies = kwargs.pop("low_precision_params", None)
    grads, kwargs = scaled(grads, kwargs)
    if grads is None:
        return
    first, second, largest = wide = [
        [t.to(p.dtype) for t, p in zip(tensors, params, strict=False)] for tensors in averages
    ]
    rest = {"amsgrad": False, "beta1": 0.9, "beta2": 0.999, "lr": 1e-3, "eps": 1e-8}
    rest |= {"weight_decay": 0.0, "maximize": False}
    torch_adam(params, grads, first, second, largest, steps, **(rest | kwargs))
    for tensors, values in zip(averages, wide, strict=True):
        for tensor, value in zip(tensors, values, strict=False):
            tensor.copy_(value)
    for copy, param in zip(copies or (), params, strict=False):
        copy.copy_(param)


def scaled(grads: list[Tensor], kwargs: Any) -> tuple[list[Tensor] | None, dict[str, Any]]:
    """The gradients after GradScaler and clipping, None if the step is skipped; other options."""
    names = ("max_grad_norm", "total_norm", "grad_scale", "found_inf")
    max_grad_norm, total_norm, grad_scale, found_inf = map(kwargs.get, names)
    rest = {name: value for name, value in kwargs.items() if name not in names}
    if found_inf is not None and found_inf.item():
        return None, rest
    if grad_scale is not None:
        grads = [(grad / grad_scale).to(grad.dtype) for grad in grads]
        total_norm = None if total_norm is None else total_norm / grad_scale
    if max_grad_norm is not None:
        norm = torch.nn.utils.get_total_norm(grads) if total_norm is None else total_norm
        factor = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        grads = [(grad * factor).to(grad.dtype) for grad in grads]
    return grads, rest


def eager_norm(grads: list[Tensor]) -> Tensor:
    """torch.nn.utils' own norm."""
    return torch.nn.utils.get_total_norm(grads)


def cost(passes: str, params: Sequence[Tensor], *args: Any, **kwargs: Any) -> Cost:
    """adam's; one pass whatever `passes` says."""
    reads = 4 + bool(kwargs.get("amsgrad")) + (kwargs.get("max_grad_norm") is not None)
    writes = 3 + bool(kwargs.get("amsgrad"))
    count = sum(p.numel() for p in params)
    size = sum(p.numel() * p.element_size() for p in params)
    copied = sum(p.numel() * p.element_size() for p in kwargs.get("low_precision_params") or ())
    return Cost(16.0 * count, float((reads + writes) * size + copied))


def norm_cost(passes: str, grads: Sequence[Tensor]) -> Cost:
    """grad_norm's."""
    count = sum(g.numel() for g in grads)
    return Cost(2.0 * count, float(sum(g.numel() * g.element_size() for g in grads)))


def drawn(shapes: Sequence[tuple[int, ...]], device: str, dtype: torch.dtype) -> list[Tensor]:
    """A random tensor of each shape."""
    return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]


def _sample(
    name: str,
    shapes: Sequence[tuple[int, ...]],
    *,
    bench: bool = False,
    strided: bool = False,
    low: torch.dtype | None = None,
    states: torch.dtype | None = None,
    there: bool = False,
    **kwargs: Any,
) -> Sample:
    """low: what low_precision_params are of, if there are any. states: what averages are of. there:
    steps are counted on the device, where lr and found_inf are too."""

    def make(device: str, dtype: torch.dtype) -> Call:
        def draw() -> list[Tensor]:
            if not strided:
                return drawn(shapes, device, dtype)
            return [t.transpose(0, -1) for t in drawn([s[::-1] for s in shapes], device, dtype)]

        params, exp_avgs = draw(), draw()
        grads = drawn(shapes, device, dtype)
        squares = [(t * t).to(dtype) for t in draw()]
        maxima = [1.5 * t for t in squares] if kwargs.get("amsgrad") else []
        steps = [torch.tensor(5.0, device=device if there else "cpu") for _ in shapes]
        read = {"lr": torch.tensor(0.01), "found_inf": torch.zeros(())} if there else {}
        copies = {} if low is None else {"low_precision_params": [p.to(low) for p in params]}
        averages = [exp_avgs, squares, maxima]
        if states is not None:
            averages = [[t.to(states) for t in tensors] for tensors in averages]
        on_device = {name: number.to(device) for name, number in read.items()}
        return (params, grads, *averages, steps), kwargs | copies | on_device

    return Sample(name, make, bench=bench, dtypes=DTYPES[:3] if states else ())


ADAMW: dict[str, Any] = {"decoupled_weight_decay": True, "weight_decay": 0.01}
BF16: dict[str, Any] = {"states": torch.bfloat16, "low": torch.bfloat16}
SHAPES = [(3, 5), (0,), (), (4097,), (64, 65)]
LAYER = [(1331, 444), (1331,), (444, 444), (444,), (1776, 444), (1776,), (444, 1776), (444,)]

SAMPLES = (
    _sample("plain", SHAPES),
    _sample("nothing", []),
    _sample("one element", [(1,)]),
    _sample("adamw", SHAPES, **ADAMW),
    _sample("l2", SHAPES, weight_decay=0.1, lr=0.01),
    _sample("amsgrad", SHAPES, amsgrad=True, **ADAMW),
    _sample("maximize", SHAPES, maximize=True, weight_decay=0.1),
    _sample("betas 0", [(65, 64)], beta1=0.0, beta2=0.0, eps=1e-3),
    _sample("betas 0.3, 0.5", [(65, 64)], beta1=0.3, beta2=0.5),
    _sample("clipped", SHAPES, max_grad_norm=1.0, **ADAMW),
    _sample("clipped above the norm", SHAPES, max_grad_norm=1e6),
    _sample("strides differ", [(3, 5), (64, 9, 65)], strided=True, max_grad_norm=1.0, **ADAMW),
    _sample("long and short", [(70001,), (5,), (0,), (32768,), (3, 3), (40000,)], **ADAMW),
    _sample("bfloat16 copies", SHAPES, low=torch.bfloat16, max_grad_norm=1.0, **ADAMW),
    _sample("float16 copies, amsgrad", SHAPES, low=torch.float16, amsgrad=True),
    _sample("bfloat16 averages", SHAPES, states=torch.bfloat16, amsgrad=True, **ADAMW),
    _sample("bfloat16 averages, strides differ", [(3, 5), (64, 9, 65)], strided=True, **BF16),
    _sample("200 tensors", [(7 * i % 50,) for i in range(200)], **ADAMW),
    _sample("counted on the device", SHAPES, there=True, **ADAMW),
    _sample("48 tensors, 14.2M", LAYER * 6, bench=True, **ADAMW),
    _sample("48 tensors, 14.2M, clipped", LAYER * 6, bench=True, max_grad_norm=1.0, **ADAMW),
    _sample("1000 tensors of 1000", [(1000,)] * 1000, bench=True, **ADAMW),
)


def _norm_sample(name: str, shapes: Sequence[tuple[int, ...]], bench: bool = False) -> Sample:
    def make(device: str, dtype: torch.dtype) -> Call:
        return (drawn(shapes, device, dtype),), {}

    return Sample(name, make, bench=bench)


NORM_SAMPLES = (
    _norm_sample("shapes", SHAPES),
    _norm_sample("one element", [(1,)]),
    _norm_sample("100 tensors", [(13 * i % 700,) for i in range(100)]),
    _norm_sample("48 tensors, 14.2M", LAYER * 6, bench=True),
)

SWEEPS = {
    "numel": lambda size, device: _sample(f"{size} elements", [(size,)], bench=True, **ADAMW),
    "tensors": lambda size, device: _sample(
        f"{size} tensors of 10000", [(10000,)] * size, bench=True, **ADAMW
    ),
}
NORM_SWEEPS = {
    "numel": lambda size, device: _norm_sample(f"{size} elements", [(size,)], bench=True),
    "tensors": lambda size, device: _norm_sample(
        f"{size} tensors of 10000", [(10000,)] * size, bench=True
    ),
}
