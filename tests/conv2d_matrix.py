"""The matrix of convolutions: its factors, and calls that cover every pair of values."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from typing import Any, NamedTuple

import covering as cover
import torch

from bigops.ops import Sample
from bigops.ops.conv2d_cases import conv_sample
from bigops.ops.conv2d_choice import misses
from bigops.ops.declare import Call


class Case(NamedTuple):
    """One call; channels are a group's, and so are filters, but of groups "depthwise"."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: str
    dilation: int
    groups: int | str
    channels_last: bool
    dtype: torch.dtype
    channels: int
    filters: int
    places: tuple[int, int]
    batch: int
    bias: bool
    activation: str
    residual: bool
    pool: tuple[int, int, int] | None  # kernel, stride, padding: of conv2d_relu_max_pool2d


FACTORS: dict[str, tuple[Any, ...]] = {
    "kernel": ((1, 1), (2, 2), (3, 3), (5, 5), (7, 7), (11, 11), (3, 1), (1, 4), (6, 9)),
    "stride": ((1, 1), (2, 2), (1, 2), (3, 3), (4, 4)),
    "padding": ("none", "half", "full", "same", "valid"),
    "dilation": (1, 2),
    "groups": (1, 2, "depthwise", "depthwise, two filters each"),
    "channels_last": (False, True),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "channels": (1, 3, 16, 17, 40),
    "filters": (1, 7, 16, 33, 64),
    "places": ((1, 1), (3, 5), (8, 8), (13, 16), (14, 14)),
    "batch": (1, 2, 5, 0),
    "bias": (False, True),
    "activation": ("relu", "none", "sigmoid", "tanh", "gelu", "silu"),
    "residual": (False, True),
    "pool": (None, (2, 2, 0), (3, 2, 1), (3, 1, 0)),
}
NAMED = (
    "kernel",
    "stride",
    "padding",
    "dilation",
    "groups",
    "channels_last",
    "dtype",
)  # by the issue


def possible(pair: cover.Pair) -> bool:
    """Whether a case can have both values."""
    (a, x), (b, y) = sorted(pair)
    found = {a: x, b: y}
    if found.get("pool") is not None:
        return found.get("activation", "relu") == "relu" and not found.get("residual", False)
    return found.get("padding") != "same" or found.get("stride", (1, 1)) == (1, 1)


def legal(case: Case) -> bool:
    return all(map(possible, cover.pairs(case)))


def covering(at_least: int) -> list[Case]:
    """Cases that cover every pair of values with little work, `at_least` in all."""
    wanted = {pair for pair in cover.every_pair(FACTORS) if possible(pair)}
    return cover.covering(wanted, _drawn, lambda case: 1e7 + work(case), at_least, legal)


def whole(seed: int = 0) -> list[Case]:
    """Every combination of the named factors, the others drawn."""
    draw = random.Random(seed)
    named = itertools.product(*(FACTORS[name] for name in NAMED))
    drawn = (_drawn(draw, True)._replace(**dict(zip(NAMED, v, strict=True))) for v in named)
    return [case for case in drawn if legal(case)]


def _drawn(draw: random.Random, _: bool) -> Case:
    while True:
        case = Case(**{name: draw.choice(values) for name, values in FACTORS.items()})
        if case.pool is not None:
            case = case._replace(activation="relu", residual=False)
        if legal(case):
            return case


def work(case: Case) -> float:
    """Products of the forward pass."""
    image, weight, _ = shapes(case)
    return math.prod(case.places) * image[0] * math.prod(weight)


def shapes(case: Case) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Of image and weight, and the number of groups."""
    groups = case.groups if isinstance(case.groups, int) else 12
    deep = groups != 12
    channels = case.channels if deep else 1
    filters = case.filters if deep else 1 + (case.groups != "depthwise")
    places = case.places
    if case.pool is not None:  # at least one window
        places = tuple(max(n, case.pool[0]) for n in places)
    image = []
    for n, k, s, p in zip(places, case.kernel, case.stride, paddings(case), strict=True):
        reach = case.dilation * (k - 1)
        size = n if case.padding == "same" else (n - 1) * s + reach + 1 - 2 * p
        size = max(size, case.dilation, 1)
        while misses(size, k, s, p, case.dilation):
            size += 1  # torch's own kernels crash where no window meets the image
        image.append(size)
    return (
        (case.batch, channels * groups, *image),
        (filters * groups, channels, *case.kernel),
        groups,
    )


def paddings(case: Case) -> list[int]:
    """In numbers, but of "same"."""
    most = {"half": lambda k: k // 2, "full": lambda k: k - 1}
    return [most.get(case.padding, lambda _: 0)(k) for k in case.kernel]


def named(case: Case) -> str:
    """In words."""
    image, weight, _ = shapes(case)
    words = [str(case.dtype)[6:], "x".join(map(str, image)), "by", "x".join(map(str, weight))]
    words += [f"stride {case.stride[0]},{case.stride[1]}", f"padding {case.padding}"]
    words += [f"dilation {case.dilation}", case.activation]
    words += [f"pool {','.join(map(str, case.pool))}"] if case.pool is not None else []
    flags = {"bias": case.bias, "residual": case.residual, "channels_last": case.channels_last}
    return " ".join(words + [name for name, on in flags.items() if on])


def sample(case: Case) -> Sample:
    """The call, of conv2d_relu_max_pool2d where the case has a pool, else of conv2d_act."""
    image, weight, groups = shapes(case)
    padding = case.padding if case.padding in ("same", "valid") else paddings(case)
    kwargs: dict[str, Any] = {
        "stride": case.stride,
        "padding": padding,
        "dilation": case.dilation,
        "groups": groups,
    }
    if case.pool is None:
        kwargs |= {"activation": case.activation, "residual": case.residual}
    else:
        kwargs |= dict(
            zip(("pool_kernel_size", "pool_stride", "pool_padding"), case.pool, strict=True)
        )
    drawn = conv_sample(
        named(case), image, weight, bias=case.bias, channels_last=case.channels_last, **kwargs
    )
    if case.pool is None:
        return drawn

    def make(device: str, dtype: torch.dtype) -> Call:
        """Of small integers, whose sums no dtype rounds: it is certain which of a window wins."""
        args, kwargs = drawn.make(device, dtype)
        for t in args:
            t.data.copy_(torch.randint(-2, 3, t.shape))
        return args, kwargs

    return replace(drawn, make=make)
