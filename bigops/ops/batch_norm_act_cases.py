"""batch_norm_act's samples, its eager baseline, its cost and its random calls."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .declare import Call, Chooser, Cost, Sample
from .fuzz import (
    Arguments,
    Fault,
    Layout,
    changed,
    instead,
    layout,
    longer,
    on_meta,
    other_dtype,
    sizes,
    spoilt,
)


def eager(
    input: Tensor, *args: Any, activation: str = "relu", residual: Tensor | None = None, **kw: Any
) -> Tensor:
    """What is written down without it."""
    out = F.batch_norm(input, *args, **kw)
    out = out if residual is None else out + residual
    return F.relu(out) if activation == "relu" else out


def cost(
    passes: str,
    input: Tensor,
    *args: Any,
    training: bool = False,
    residual: Tensor | None = None,
    **kw: Any,
) -> Cost:
    """A channel's numbers have to be known before any is written, but a cache may hold them:
    each tensor counts once."""
    streams = 2.0 if residual is None else 3.0
    moved = streams * input.numel() * input.element_size()
    if passes == "forward":
        return Cost(8.0 * input.numel(), moved)
    # Gradient, output and input are read, the inputs' gradients are written.
    return Cost(20.0 * input.numel(), 2.0 * moved + 2.0 * input.numel() * input.element_size())


def _sample(
    name: str,
    shape: tuple[int, ...],
    *,
    training: bool = True,
    running: bool = True,
    affine: bool = True,
    residual: bool = False,
    alike: bool = False,
    layout: torch.memory_format = torch.contiguous_format,
    grad: bool = True,
    bench: bool = False,
    gradcheck: bool = False,
    mean: float = 0.5,
    **kwargs: Any,
) -> Sample:
    """alike: parameters of the input's dtype, also where that is a 16-bit one."""

    def make(device: str, dtype: torch.dtype) -> Call:
        wide = dtype if alike else torch.promote_types(dtype, torch.float32)

        def image(center: float) -> Tensor:
            drawn = torch.randn(shape, device=device, dtype=dtype) + center
            if layout != torch.contiguous_format:
                drawn = torch.empty_like(drawn, memory_format=layout).copy_(drawn)
            return drawn.requires_grad_(grad)

        def row(*, positive: bool = False) -> Tensor:
            drawn = torch.randn(shape[1], device=device, dtype=wide)
            return drawn.abs() + 0.5 if positive else drawn

        stats = (row(), row(positive=True)) if running else (None, None)
        given: dict[str, Any] = {"training": training, **kwargs}
        if affine:
            given |= {"weight": row().requires_grad_(grad), "bias": row().requires_grad_(grad)}
        if residual:
            given["residual"] = image(0.0)
        return (image(mean), *stats), given

    return Sample(name, make, bench=bench, gradcheck=gradcheck)


CHANNELS_LAST = torch.channels_last
RESNET = (
    ("16x64x56x56", (16, 64, 56, 56)),
    ("16x64x16x16", (16, 64, 16, 16)),
    ("16x512x2x2", (16, 512, 2, 2)),
)

SAMPLES = (
    _sample("gradcheck", (3, 2, 4, 3), running=False, gradcheck=True),
    _sample(
        "gradcheck, residual, channels_last", (2, 3, 3, 4), residual=True, layout=CHANNELS_LAST,
        gradcheck=True,
    ),
    _sample("gradcheck, given statistics", (2, 3, 5), training=False, gradcheck=True),
    _sample("gradcheck, no activation", (2, 2, 9, 8), activation="none", gradcheck=True),
    _sample("two numbers", (2, 1), affine=False, running=False, eps=0.1),
    _sample("features", (40, 33)),
    _sample("1-d", (6, 5, 31)),
    _sample("3-d", (2, 5, 3, 6, 7), residual=True),
    _sample("3-d, channels_last", (2, 5, 3, 4, 5), layout=torch.channels_last_3d),
    _sample("planes", (3, 7, 13, 11), residual=True),
    _sample("small planes", (9, 20, 2, 2), residual=True),
    _sample("channels_last", (3, 20, 9, 7), residual=True, layout=CHANNELS_LAST),
    _sample("channels_last, one channel", (3, 1, 9, 7), layout=CHANNELS_LAST),
    _sample("no weight", (3, 4, 12, 9), affine=False),
    _sample("no activation", (3, 4, 12, 9), activation="none", residual=True),
    _sample("parameters of the input's dtype", (3, 4, 12, 9), alike=True),
    _sample("far from 0", (4, 6, 16, 9), mean=100.0),
    _sample("far from 0, channels_last", (4, 6, 16, 9), mean=100.0, layout=CHANNELS_LAST),
    _sample("momentum, eps", (3, 4, 10, 9), momentum=0.7, eps=0.2),
    _sample("given statistics", (3, 20, 9, 9), training=False, residual=True),
    _sample("given statistics, channels_last", (3, 20, 5, 4), training=False, layout=CHANNELS_LAST),
    _sample("no batch", (0, 4, 3, 3)),
    _sample("4096 elements", (4, 32, 8, 9), residual=True),
    *(
        _sample(f"{name}{words}", shape, residual=True, layout=lies, bench=True)
        for name, shape in RESNET
        for words, lies in (("", torch.contiguous_format), (", channels_last", CHANNELS_LAST))
    ),
    _sample("16x64x56x56, no residual", (16, 64, 56, 56), bench=True),
    _sample("16x64x56x56, inference", (16, 64, 56, 56), training=False, residual=True, grad=False,
            bench=True),
)  # fmt: skip


def _varied(*, batch: int = 16, channels: int = 64, side: int = 56) -> Sample:
    shape = (batch, channels, side, side)
    return _sample(sizes(shape), shape, residual=True, bench=True)


SWEEPS = {
    "N": lambda size, device: _varied(batch=size),
    "C": lambda size, device: _varied(channels=size),
    "HW": lambda size, device: _varied(side=size),
}

NAMES = ("input", "running_mean", "running_var")
PARAMETERS = ("running_mean", "running_var", "weight", "bias")


def arbitrary(choose: Chooser) -> Sample:
    """A small call; shapes, strides and gradients of any kind."""
    dims = choose.choice((4, 2, 3, 5))
    pixels = [choose.choice((1, 2, 3, 5, 8, 9, 17)) for _ in range(min(dims - 2, 2))]
    pixels += [choose.choice((1, 2, 3))] * (dims - 2 - len(pixels))
    batch = choose.choice((2, 1, 3, 8, 20, 0))
    training = choose.choice((True, False))
    if training and batch * torch.Size(pixels).numel() == 1:
        batch = 2
    shape = (batch, choose.choice((1, 2, 3, 8, 17, 33)), *pixels)
    present = {
        name: choose.choice((True, False)) for name in ("weight", "bias", "residual", "running")
    }
    running = present.pop("running") or not training
    there = ["input", *(name for name, wanted in present.items() if wanted)]
    lies: dict[str, Layout] = {}
    for name in ("input", "residual"):
        # Of a channel whose numbers are all the same, float64 gives what its roundings are.
        constant = name == "input" and training
        lies[name] = layout(choose, dims, expanded=0 if constant else dims)
        if dims > 3 and choose.choice((False, True)):
            lies[name] = Layout((0, *range(2, dims), 1), (1,) * dims)
    for name in PARAMETERS:
        lies[name] = layout(choose, 1)
    grads = {name: choose.choice((False, True)) for name in there}
    alike = choose.choice((False, True))
    center, spread = choose.choice((0.0, 1.0, -30.0)), choose.choice((1.0, 0.1, 10.0))
    kwargs: dict[str, Any] = {"training": True} if training else {}
    for name, values in (("activation", ("relu", "none")), ("momentum", (0.1, 0.9, 0.0, 1.0)),
                         ("eps", (1e-5, 1e-3, 0.3))):  # fmt: skip
        value = choose.choice(values)
        kwargs |= {name: value} if value != values[0] else {}

    def make(device: str, dtype: torch.dtype) -> Call:
        wide = dtype if alike else torch.promote_types(dtype, torch.float32)

        def lay(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
            found = lies[name].laid(values.to(device=device, dtype=dtype))
            return found.requires_grad_(grads.get(name, False))

        image = lay("input", torch.randn(shape) * spread + center, dtype)
        given = dict(kwargs)
        if "residual" in there:
            given["residual"] = lay("residual", torch.randn(shape), dtype)
        for name in there:
            if name in PARAMETERS:
                given[name] = lay(name, torch.randn(shape[1]), wide)
        stats: tuple[Tensor | None, ...] = (None, None)
        if running:
            drawn = torch.randn(shape[1]) + center, torch.rand(shape[1]) * spread**2 + 0.1
            stats = tuple(lay(n, v, wide) for n, v in zip(NAMES[1:], drawn, strict=True))
        return (image, *stats), given

    words = [f"input {sizes(shape)}{lies['input']} around {center}, {spread} wide"]
    words += [f"{name}{lies[name]}" for name in there[1:]]
    words += [f"running{lies['running_mean']}{lies['running_var']}"] if running else []
    words += ["parameters alike"] if alike else []
    words += [f"{name}={value}" for name, value in kwargs.items()]
    wanted = [name for name, grad in grads.items() if grad]
    words += [f"gradients of {' and '.join(wanted)}"] if wanted else []
    return Sample(", ".join(words), make)


def illegal(choose: Chooser) -> tuple[Sample, str]:
    """A legal call with one thing made wrong."""
    return spoilt(arbitrary(choose), NAMES, choose.choice(FAULTS))


def _row(name: str, what: str, change: Any) -> Fault:
    """`name` is a row like a right one, changed."""

    def made(given: Arguments) -> Arguments:
        image = given["input"].detach()
        rows = {n: None for n in PARAMETERS if n != name}
        row = image.new_ones(image.shape[1])
        # Of an input that training takes.
        several = torch.cat((image, image))
        return rows | {"input": several, "residual": None, "training": True, name: change(row)}

    return Fault(name, what, made)


def _missing(name: str) -> Fault:
    def made(given: Arguments) -> Arguments:
        row = given["input"].new_ones(given["input"].shape[1])
        nothing: Arguments = {"weight": None, "bias": None, "training": False}
        return nothing | {n: None if n == name else row for n in NAMES[1:]}

    return Fault(name, "None", made)


def _residual(what: str, change: Any) -> Fault:
    return Fault(
        "residual", what, lambda given: {"residual": change(given["input"].detach().clone())}
    )


def _integers(given: Arguments) -> Arguments:
    return {"input": given["input"].detach().long(), "residual": None}


def _lone(given: Arguments) -> Arguments:
    channels = given["input"].shape[1]
    return {"input": given["input"].new_ones((1, channels, *(1,) * (given["input"].dim() - 2))),
            "residual": None, "training": True}  # fmt: skip


FAULTS = (
    *instead("input", None, 1.0, [[1.0]]),
    changed("input", "sparse", lambda t: t.detach().to_sparse()),
    changed("input", "of 1 dimension", lambda t: t.detach().flatten()),
    Fault("input", "of integers", _integers),
    Fault("input", "of one number per channel", _lone),
    *(fault for name in PARAMETERS for fault in instead(name, 1.0, [1.0])),
    *(_row(name, "of 2 dimensions", lambda t: t.unsqueeze(0)) for name in PARAMETERS),
    *(_row(name, "with a channel more", longer(0)) for name in PARAMETERS),
    *(_row(name, "on another device", on_meta) for name in PARAMETERS),
    *(_row(name, "of integers", Tensor.long) for name in PARAMETERS),
    *(_row(name, "of float64 beside others", lambda t: t.double() if t.dtype != torch.float64
           else t.float()) for name in PARAMETERS),
    *(_missing(name) for name in NAMES[1:]),
    *instead("residual", 1.0, [1.0]),
    _residual("of another dtype", other_dtype),
    _residual("with a channel more", longer(1)),
    _residual("on another device", on_meta),
    *instead("training", None, 1, "True"),
    *instead("momentum", None, "0.1"),
    *instead("eps", None, "0.1"),
    *instead("activation", None, "gelu", 1, ""),
)  # fmt: skip
