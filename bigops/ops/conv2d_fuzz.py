"""Random calls of both convolution ops, legal and illegal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .activation import ACTIVATIONS
from .conv2d_arguments import Size, output_shape
from .conv2d_choice import misses, overruns
from .declare import Call, Chooser, Sample
from .fuzz import (
    Arguments,
    Fault,
    Layout,
    changed,
    dense,
    instead,
    layout,
    longer,
    on_meta,
    other_dtype,
    sizes,
    spoilt,
)

CHANNELS = (1, 2, 3, 4, 7, 8, 16, 17, 32)  # of a group
FILTERS = (1, 2, 3, 5, 8, 15, 16, 17, 33, 40)
KERNELS = (1, 2, 3, 4, 5, 7, 11)
MOST_TAPS = 2**12  # products for a pixel of a group's filters
TENSORS = ("input", "weight", "bias")
CHANNELS_LAST = Layout((0, 2, 3, 1), (1,) * 4)


def arbitrary_act(choose: Chooser) -> Sample:
    """A small call of conv2d_act."""
    places = [choose.choice((1, 2, 3, 4, 6, 8, 9, 14)) for _ in "hw"]
    activation = choose.choice(("relu", *ACTIVATIONS, None))
    options = {} if activation == "relu" else {"activation": activation}
    return _convolution(choose, places, options, choose.choice((False, True)))


def arbitrary_pool(choose: Chooser) -> Sample:
    """A small call of conv2d_relu_max_pool2d."""
    kernel = [choose.choice((2, 1, 3, 4)) for _ in "hw"]
    stride = [choose.choice((2, 1, 3, 4)) for _ in "hw"]
    padding = [choose.integer(0, k // 2) for k in kernel]
    windows = [choose.choice((1, 2, 3, 4, 7)) for _ in "hw"]
    # As many places as windows that start `stride` apart need, and some that none covers.
    places = [
        max(1, (n - 1) * s + k - 2 * p) + choose.integer(0, s - 1)
        for n, s, k, p in zip(windows, stride, kernel, padding, strict=True)
    ]
    pool: dict[str, Any] = {}
    if kernel != [2, 2]:
        pool["pool_kernel_size"] = _size(choose, kernel)
    if stride != kernel:
        pool["pool_stride"] = _size(choose, stride)
    if padding != [0, 0]:
        pool["pool_padding"] = _size(choose, padding)
    return _convolution(choose, places, pool)


def _convolution(
    choose: Chooser, places: Sequence[int], options: dict[str, Any], residual: bool = False
) -> Sample:
    """Any convolution that has an output of `places`, or a little more."""
    batch, groups = choose.choice((1, 2, 3, 0)), choose.choice((1, 2, 3, 12))
    channels = choose.choice(CHANNELS if groups < 12 else CHANNELS[:1])
    filters = choose.choice(FILTERS if groups < 12 else FILTERS[:2])
    fitting = [k for k in KERNELS if channels * filters * k * k <= MOST_TAPS]
    kernel = [choose.choice(fitting) for _ in "hw"]
    dilation = [choose.choice((1, 2, 3) if k > 1 else (1,)) for k in kernel]  # as for `misses`
    named = choose.choice((None, "valid", "same"))
    stride = [choose.choice((1, 2, 3, 4) if named != "same" else (1,)) for _ in "hw"]
    pads = [choose.choice((0, k // 2, k) if named is None else (0,)) for k in kernel]
    if overruns(kernel, stride, pads):  # torch's own kernels crash of it, and of `misses`
        pads[1] = kernel[1] // 2
    more = [choose.integer(0, s - 1) for s in stride]
    image = []
    for axis, (n, k, s, d) in enumerate(zip(places, kernel, stride, dilation, strict=True)):
        size = (n - 1) * s + d * (k - 1) + 1 + more[axis]
        image.append(max(n, d) if named == "same" else max(1, size - 2 * pads[axis]))
        if misses(image[axis], k, s, pads[axis], d):
            image[axis], pads[axis] = size, 0
    padding = named or _size(choose, pads)
    shapes = [(batch, groups * channels, *image), (groups * filters, channels, *kernel)]
    if batch == 1 and choose.choice((False, True)):
        shapes[0] = shapes[0][1:]
    if choose.choice((True, False)):
        shapes.append((groups * filters,))
    grads = [choose.choice((False, True)) for _ in shapes]
    layouts = [
        _layout(choose, name, len(shape), grad)
        for name, shape, grad in zip(TENSORS, shapes, grads, strict=False)
    ]
    given = {
        "stride": _size(choose, stride),
        "padding": padding,
        "dilation": _size(choose, dilation),
        "groups": groups,
    }
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    conv = {n: v for n, v in given.items() if v != defaults[n]}
    kwargs = conv | options
    if residual:
        one, other = (torch.empty(()).expand(shape) for shape in shapes[:2])
        # mypy takes every value of `conv` for each parameter.
        added = output_shape(one, other, **conv)  # type: ignore[arg-type]
        added_grad = choose.choice((False, True))
        added_lies = _layout(choose, "residual", len(added), added_grad)

    def make(device: str, dtype: torch.dtype) -> Call:
        draw = _steps if any(grads) or (residual and added_grad) else _normal
        taps = shapes[1][1] * shapes[1][2] * shapes[1][3]
        spread = (1.0, taps**-0.5, 1.0)
        args = []
        for shape, lies, grad, scale in zip(shapes, layouts, grads, spread, strict=False):
            values = draw(shape, scale).to(device=device, dtype=dtype)
            args.append(lies.laid(values).requires_grad_(grad))
        if not residual:
            return tuple(args), dict(kwargs)
        values = draw(added, 1.0).to(device=device, dtype=dtype)
        return tuple(args), kwargs | {
            "residual": added_lies.laid(values).requires_grad_(added_grad)
        }

    words = [
        f"{name} {sizes(shape)}{lies}"
        for name, shape, lies in zip(TENSORS, shapes, layouts, strict=False)
    ]
    words += [f"{name}={value}" for name, value in kwargs.items()]
    wanted = [name for name, grad in zip(TENSORS, grads, strict=False) if grad]
    if residual:
        words.append(f"residual {sizes(added)}{added_lies}")
        wanted += ["residual"] if added_grad else []
    words += [f"gradients of {' and '.join(wanted)}"] if wanted else []
    return Sample(", ".join(words), make)


def _normal(shape: Sequence[int], scale: float) -> Tensor:
    return torch.randn(shape) * scale


def _steps(shape: Sequence[int], scale: float) -> Tensor:
    """Small integers, whose sums no dtype rounds.

    The gradients of ReLU and of a maximum jump: values a rounding error apart from 0 or from each
    other would be judged by luck. Of these it is exactly known which are 0 and which are equal.
    """
    return (
        torch.randint(-2, 3, tuple(shape)) if scale == 1.0 else torch.randint(-1, 2, tuple(shape))
    )


def _size(choose: Chooser, size: Sequence[int]) -> Size:
    """One of the forms in which torch takes a height and a width."""
    alike: tuple[Size, ...] = (size[0], list(size[:1])) if size[0] == size[1] else ()
    return choose.choice((*alike, tuple(size), list(size)))


def _layout(choose: Chooser, name: str, dims: int, grad: bool) -> Layout:
    if dims == 4 and choose.choice((False, True)):
        return CHANNELS_LAST
    lies = layout(choose, dims, expanded=0 if name == "weight" else dims)
    if name == "weight" and grad:  # in any other order torch's own may raise
        return replace(lies, order=dense(dims).order)
    return lies


def illegal_act(choose: Chooser) -> tuple[Sample, str]:
    """A legal call of conv2d_act with one thing made wrong."""
    return spoilt(arbitrary_act(choose), TENSORS, choose.choice(FAULTS + ACT_FAULTS))


def illegal_pool(choose: Chooser) -> tuple[Sample, str]:
    """A legal call of conv2d_relu_max_pool2d with one thing made wrong."""
    return spoilt(arbitrary_pool(choose), TENSORS, choose.choice(FAULTS + POOL_FAULTS))


def _integers(given: Arguments) -> Arguments:
    return {n: given[n].detach().long() for n in TENSORS if given.get(n) is not None}


def _output(given: Arguments, more: int) -> Tensor:
    """A tensor of the output's shape, with `more` channels."""
    sizes = {n: given[n] for n in ("stride", "padding", "dilation", "groups") if n in given}
    shape = list(output_shape(given["input"], given["weight"], **sizes))
    shape[-3] += more
    return given["weight"].new_zeros(shape)


def _bias(what: str, *shape_more: int) -> Fault:
    def change(given: Arguments) -> Arguments:
        weight = given["weight"]
        return {"bias": weight.new_zeros((weight.shape[0] + shape_more[0], *shape_more[1:]))}

    return Fault("bias", what, change)


def _beyond(given: Arguments) -> Arguments:
    """A kernel taller than any input here with its padding."""
    weight = given["weight"]
    return {"weight": weight.new_zeros((*weight.shape[:2], 1000, weight.shape[3])), "padding": 0}


def _sizes(name: str, least: int) -> list[Fault]:
    wrong = (least - 1, -1, (1, least - 1), (1, 2, 3), (), 1.0, (1, 2.0), "1", None)
    return instead(name, *wrong)


FAULTS = (
    *(fault for name in TENSORS[:2] for fault in instead(name, None, 1.0, [[1.0]])),
    *instead("bias", 1.0, [1.0]),
    *(changed(name, "sparse", lambda t: t.detach().to_sparse()) for name in TENSORS[:2]),
    changed("input", "of 2 dimensions", lambda t: t[..., 0].flatten(0, -2)),
    changed("input", "of 5 dimensions", lambda t: t.expand(1, *(1,) * (4 - t.dim()), *t.shape)),
    changed("input", "with a channel more", longer(-3)),
    Fault("input", "of integers, as weight and bias", _integers),
    changed("weight", "of 3 dimensions", lambda t: t[..., 0]),
    changed("weight", "of another dtype", other_dtype),
    changed("weight", "on another device", on_meta),
    Fault("weight", "that does not fit", _beyond),
    _bias("with a filter more", 1),
    _bias("of 2 dimensions", 0, 1),
    Fault(
        "bias", "of another dtype", lambda given: {"bias": other_dtype(given["weight"][:, 0, 0, 0])}
    ),
    Fault(
        "bias", "on another device", lambda given: {"bias": on_meta(given["weight"][:, 0, 0, 0])}
    ),
    *_sizes("stride", 1),
    *_sizes("dilation", 1),
    *_sizes("padding", 0),
    *instead("padding", "some", ""),
    Fault("padding", "'same' with stride 2", lambda _: {"padding": "same", "stride": 2}),
    *instead("groups", 0, -1, 1.0, "1", None, (1,), 1009),
)
ACT_FAULTS = (
    *instead("activation", "swish", "", "ReLU", 1, ("relu",), torch.relu),
    *instead("residual", 1.0, [1.0]),
    Fault("residual", "of no dimensions", lambda given: {"residual": given["weight"].sum()}),
    Fault("residual", "of a channel more", lambda given: {"residual": _output(given, 1)}),
    Fault(
        "residual", "of another dtype", lambda given: {"residual": other_dtype(_output(given, 0))}
    ),
)
POOL_FAULTS = (
    *_sizes("pool_kernel_size", 1),
    *instead("pool_stride", 0, -1, (1, 0), (1, 2, 3), 1.0, (1, 2.0), "1"),
    *_sizes("pool_padding", 0),
    Fault("pool_padding", "above half", lambda _: {"pool_kernel_size": 2, "pool_padding": 2}),
    *instead("pool_kernel_size", 1000),
)
