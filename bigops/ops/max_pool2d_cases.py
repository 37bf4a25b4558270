"""max_pool2d's samples, its eager baseline, its cost and its random calls."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .conv2d_arguments import Size, pair
from .declare import Call, Chooser, Cost, Sample
from .fuzz import Fault, Layout, changed, instead, layout, sizes, spoilt


def eager(input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """torch's own."""
    return F.max_pool2d(input, *args, **kwargs)


def cost(passes: str, input: Tensor, kernel_size: Size, *options: Any, **named: Any) -> Cost:
    """The image is read, the maxima are written with a byte each; all of it once more backward."""
    meta = torch.empty(input.shape, device="meta")
    # mypy takes every value of `named` for each parameter.
    found = F.max_pool2d(meta, kernel_size, *options, **named)  # type: ignore[arg-type]
    out = found[0] if isinstance(found, tuple) else found
    places = torch.Size(pair("kernel_size", kernel_size, 1)).numel()
    moved = float(input.element_size() * (input.numel() + out.numel()) + out.numel())
    more = 8.0 * out.numel() if isinstance(found, tuple) else 0.0
    if passes == "forward":
        return Cost(float(places * out.numel()), moved + more)
    return Cost(2.0 * places * out.numel(), 2.0 * moved + more)


def _sample(
    name: str,
    shape: tuple[int, ...],
    kernel_size: Size = 2,
    *,
    channels_last: bool = False,
    grad: bool = True,
    bench: bool = False,
    gradcheck: bool = False,
    **kwargs: Any,
) -> Sample:
    def make(device: str, dtype: torch.dtype) -> Call:
        image = _apart(shape, device).to(dtype)
        if channels_last:
            image = torch.empty_like(image, memory_format=torch.channels_last).copy_(image)
        return (image.requires_grad_(grad), kernel_size), dict(kwargs)

    return Sample(name, make, bench=bench, gradcheck=gradcheck)


def _apart(shape: tuple[int, ...], device: str = "cpu") -> Tensor:
    """Numbers that are further apart, for small tensors, than gradcheck's steps."""
    count = torch.Size(shape).numel()
    return (torch.randperm(count, device=device).view(shape) - count // 2) / 64.0


STEM: dict[str, Any] = {"kernel_size": 3, "stride": 2, "padding": 1}

SAMPLES = (
    _sample("gradcheck", (2, 2, 4, 6), gradcheck=True),
    _sample("gradcheck, overlapping windows", (1, 3, 6, 5), **STEM, gradcheck=True),
    _sample(
        "gradcheck, channels_last", (1, 3, 5, 6), 3, stride=1, channels_last=True, gradcheck=True
    ),
    _sample("one window", (1, 1, 2, 2)),
    _sample("3 dimensions", (5, 9, 12)),
    _sample("odd sizes", (2, 3, 9, 7)),
    _sample("stem", (2, 5, 21, 23), **STEM),
    _sample("stem, channels_last", (2, 20, 12, 13), **STEM, channels_last=True),
    _sample("channels_last", (2, 33, 10, 8), channels_last=True),
    _sample("channels_last, one channel", (2, 1, 8, 8), channels_last=True),
    _sample("stride 1", (1, 4, 18, 20), 3, stride=1, padding=1),
    _sample("stride 3", (1, 4, 18, 60), 3),
    _sample("windows apart", (1, 4, 12, 13), 2, stride=3),
    _sample("dilation", (2, 3, 14, 40), 3, stride=2, padding=1, dilation=(2, 3)),
    _sample("uneven", (1, 2, 13, 17), (3, 2), stride=(2, 1), padding=(1, 0)),
    _sample("ceil_mode", (2, 3, 8, 11), 3, stride=2, ceil_mode=True),
    _sample("all of the image", (2, 17, 7, 7), 7),
    _sample("largest window", (1, 2, 20, 40), (15, 17), stride=4, padding=7),
    _sample("no batch", (0, 3, 8, 8)),
    _sample("4096 elements", (2, 32, 16, 16)),
    _sample("64x64x56x56, 2x2", (64, 64, 56, 56), bench=True),
    _sample("64x64x56x56, 2x2, channels_last", (64, 64, 56, 56), channels_last=True, bench=True),
    _sample("16x64x112x112, 3x3 stride 2", (16, 64, 112, 112), **STEM, bench=True),
)


def _varied(device: str, *, batch: int = 64, channels: int = 64, side: int = 56) -> Sample:
    shape = (batch, channels, side, side)
    return _sample(sizes(shape), shape, bench=True)


SWEEPS = {
    "N": lambda size, device: _varied(device, batch=size),
    "C": lambda size, device: _varied(device, channels=size),
    "HW": lambda size, device: _varied(device, side=size),
}

CHANNELS_LAST = Layout((0, 2, 3, 1), (1,) * 4)


def arbitrary(choose: Chooser) -> Sample:
    """A small call; windows, shapes and strides of any kind."""
    kernel = [choose.choice((2, 1, 3, 4, 5)) for _ in "hw"]
    stride = [choose.choice((2, 1, 3, 4)) for _ in "hw"]
    dilation = [choose.choice((1, 2, 3)) for _ in "hw"]
    padding = [choose.integer(0, k // 2) for k in kernel]
    image = []
    for k, s, d, p in zip(kernel, stride, dilation, padding, strict=True):
        windows = choose.choice((1, 2, 3, 7, 17, 33))
        least = max(1, (windows - 1) * s + d * (k - 1) + 1 - 2 * p) + choose.integer(0, s - 1)
        # Where a window may step over the image, torch writes a gradient beside it.
        image.append(max(least, d))
    shape = (choose.choice((1, 2, 3, 0)), choose.choice((1, 2, 3, 8, 17, 40)), *image)
    if choose.choice((False, True)):
        shape = shape[1:]
    lies = layout(choose, len(shape), expanded=len(shape))
    if len(shape) == 4 and choose.choice((False, True)):
        lies = CHANNELS_LAST
    grad, equal = choose.choice((False, True)), choose.choice((False, True))
    special = choose.choice((None, float("nan"), float("-inf"), float("inf")))
    given = {
        "stride": (_size(choose, stride), kernel),
        "padding": (_size(choose, padding), [0, 0]),
        "dilation": (_size(choose, dilation), [1, 1]),
        "ceil_mode": (choose.choice((False, True)), None),
    }
    plain = {"stride": stride, "padding": padding, "dilation": dilation}
    kwargs = {name: v for name, (v, usual) in given.items() if plain.get(name) != usual}
    size = _size(choose, kernel)

    def make(device: str, dtype: torch.dtype) -> Call:
        values = torch.randint(-2, 3, shape).float() if equal else torch.randn(shape)
        if special is not None:
            values = torch.where(torch.rand(shape) < 0.2, special, values)
        values = values.to(device=device, dtype=dtype)
        return (lies.laid(values).requires_grad_(grad), size), dict(kwargs)

    words = [f"input {sizes(shape)}{lies}", f"kernel_size={size}"]
    words += [f"{name}={value}" for name, value in kwargs.items()]
    words += ["with equals"] if equal else []
    words += [f"with {special}"] if special is not None else []
    words += ["gradient of input"] if grad else []
    return Sample(", ".join(words), make)


def _size(choose: Chooser, size: list[int]) -> Size:
    """One of the forms in which torch takes a height and a width."""
    alike: tuple[Size, ...] = (size[0], list(size[:1])) if size[0] == size[1] else ()
    return choose.choice((*alike, tuple(size), list(size)))


def illegal(choose: Chooser) -> tuple[Sample, str]:
    """A legal call with one thing made wrong."""
    return spoilt(arbitrary(choose), ("input", "kernel_size"), choose.choice(FAULTS))


def _sizes(name: str, least: int) -> list[Fault]:
    return instead(name, least - 1, -1, (1, least - 1), (1, 2, 3), 1.0, (1, 2.0), "1")


FAULTS = (
    *instead("input", None, 1.0, [[1.0]]),
    changed("input", "sparse", lambda t: t.detach().to_sparse()),
    changed("input", "of 2 dimensions", lambda t: t[..., 0].flatten(0, -2)),
    changed("input", "of 5 dimensions", lambda t: t.expand(1, *(1,) * (4 - t.dim()), *t.shape)),
    changed("input", "without channels", lambda t: t.detach()[..., :0, :, :]),
    changed("input", "without rows", lambda t: t.detach()[..., :0, :]),
    changed("input", "of truths", lambda t: t.detach() > 0),
    changed("input", "of complex numbers", lambda t: t.detach() + 1j),
    *_sizes("kernel_size", 1),
    *instead("kernel_size", None, (), 1000),
    *_sizes("stride", 1),
    *_sizes("padding", 0),
    *instead("padding", None, ()),
    Fault("padding", "above half", lambda _: {"kernel_size": 2, "padding": 2}),
    *_sizes("dilation", 1),
    *instead("dilation", None, ()),
    Fault(
        "kernel_size",
        "that dilation spreads",
        lambda _: {"kernel_size": 2, "padding": 0, "dilation": 1000},
    ),
    *instead("ceil_mode", None, 1, "True"),
)
