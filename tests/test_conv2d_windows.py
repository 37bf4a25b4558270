"""Convolutions by products of windows on the CPU: kernels and when they are taken."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from truth import assert_as_true

import bigops
from bigops.backends import native
from bigops.ops.activation import NUMBERS
from bigops.ops.conv2d_cases import ACTIVATIONS
from bigops.ops.conv2d_choice import choose

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))

PLANES, PIXELS = torch.contiguous_format, torch.channels_last
LAYOUTS = list(itertools.product((PLANES, PIXELS), repeat=2))

# Image, filters, kernel; stride, padding, dilation, groups.
SHAPES: dict[str, tuple[tuple[int, ...], int, tuple[int, int], dict[str, Any]]] = {
    "a pixel": ((1, 1, 1, 1), 1, (1, 1), {}),
    "no image": ((0, 3, 5, 5), 4, (3, 3), {"stride": 2}),
    "first layer": ((2, 3, 33, 20), 70, (7, 7), {"stride": 2, "padding": 3}),
    "strided": ((3, 40, 17, 15), 65, (3, 3), {"stride": 2, "padding": 1}),
    "uneven": ((2, 33, 20, 9), 17, (2, 5), {"stride": (3, 2), "padding": (0, 4)}),
    "pixels": ((2, 130, 7, 7), 150, (1, 1), {}),
    "strided pixels": ((2, 64, 9, 14), 33, (1, 1), {"stride": (2, 3)}),
    "dilated": ((2, 20, 14, 16), 18, (3, 3), {"stride": 2, "padding": 2, "dilation": (2, 3)}),
    "dilated by the stride": ((1, 16, 15, 15), 16, (3, 3), {"stride": 2, "dilation": 2}),
    "padding beyond the kernel": ((2, 5, 6, 7), 9, (2, 3), {"stride": 1, "padding": (3, 7)}),
    "groups": ((2, 66, 10, 10), 39, (3, 3), {"stride": 2, "padding": 1, "groups": 3}),
    "wide": ((1, 16, 3, 500), 20, (3, 3), {"stride": (1, 2), "padding": 1}),
    "many tiles": ((2, 160, 40, 50), 16, (3, 3), {"stride": 1, "padding": 1}),
}
FULL = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}


def sizes(options: dict[str, Any]) -> tuple[Any, ...]:
    """As the kernels take them."""
    given = {**FULL, **options}
    pairs = (given[n] for n in ("stride", "padding", "dilation"))
    return (*([p, p] if isinstance(p, int) else list(p) for p in pairs), given["groups"])


def as_it_lies(like: Tensor, layout: torch.memory_format) -> Tensor:
    """Of NaN, to be written."""
    return torch.full_like(like, float("nan")).contiguous(memory_format=layout)


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_in_float64(shape: str, activation: str) -> None:
    """All layouts of images and weight, with and without bias and residual."""
    image, filters, kernel, options = SHAPES[shape]
    groups, number = options.get("groups", 1), NUMBERS[activation]
    x = torch.randn(image, dtype=torch.float64, requires_grad=True)
    w = torch.randn(filters, image[1] // groups, *kernel, dtype=torch.float64, requires_grad=True)
    b = torch.randn(filters, dtype=torch.float64, requires_grad=True)
    for (layout, weight_layout), more in zip(LAYOUTS, (True, False, False, True), strict=True):
        pre = F.conv2d(x, w, b if more else None, **options)
        residual = torch.randn_like(pre).requires_grad_() if more else None
        pre = pre + residual if residual is not None else pre
        want = pre if activation == "none" else ACTIVATIONS[activation](pre)
        grad = torch.randn_like(want).contiguous(memory_format=layout)
        wanted = (x, w, b, residual) if residual is not None else (x, w)
        right = torch.autograd.grad(want, wanted, grad)

        with torch.no_grad():
            given = (x.contiguous(memory_format=layout), w.contiguous(memory_format=weight_layout))
            added = None if residual is None else residual.contiguous(memory_format=layout)
            out, kept = as_it_lies(want, layout), as_it_lies(want, layout)
            native.kernels.conv2d_windows_forward(
                *given, b if more else None, added, out, kept, *sizes(options), number
            )
            torch.testing.assert_close(out, want)
            torch.testing.assert_close(kept, pre)
            grads = [as_it_lies(t, layout if t.dim() == 4 else PLANES) for t in wanted]
            grads += [None] * (4 - len(grads))
            native.kernels.conv2d_windows_backward(
                grad,
                *given,
                None if activation == "none" else kept,
                *grads,
                *sizes(options),
                number,
            )
        for got, expected in zip(grads, right, strict=False):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("layout", [PLANES, PIXELS], ids=["planes", "pixels"])
@pytest.mark.parametrize(
    ("image", "filters", "kernel", "options"),
    [
        ((2, 128, 28, 28), 128, 3, {"stride": 2, "padding": 1}),
        ((8, 3, 56, 56), 32, 3, {"stride": 2, "padding": 1}),
        ((8, 45, 19, 19), 61, 3, {"stride": 2, "padding": 1}),
        ((4, 512, 7, 7), 2048, 1, {}),  # few pixels: a sum must not be one chain
        ((4, 32, 28, 28), 64, 5, {"stride": 2, "padding": 2}),
    ],
)
def test_truth_of_what_it_serves(
    image: tuple[int, ...],
    filters: int,
    kernel: int,
    options: dict[str, Any],
    layout: torch.memory_format,
) -> None:
    torch.manual_seed(0)
    x = torch.randn(image).contiguous(memory_format=layout)
    w = torch.randn(filters, image[1], kernel, kernel) * (image[1] * kernel**2) ** -0.5
    w = w.contiguous(memory_format=layout)
    b = torch.randn(filters)
    assert set(choose(x, w, *sizes(options))[1:]) == {"windows"}

    def run(function: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, w, b)]
        out = function(*leaves, **options)
        grad = torch.linspace(-3, 3, out.numel()).sin().view_as(out).to(dtype)
        grads = torch.autograd.grad(out, leaves, grad)
        return {"out": out.detach(), **dict(zip(("input", "weight", "bias"), grads, strict=True))}

    def ours(*args: Any, **kwargs: Any) -> Tensor:
        return bigops.conv2d_act(*args, **kwargs, activation="none")

    eager = run(F.conv2d, torch.float32)
    got = run(ours, torch.float32)
    assert_as_true([got], [eager], [run(F.conv2d, torch.float64)])
    assert {n: t.stride() for n, t in got.items()} == {n: t.stride() for n, t in eager.items()}


def test_who_else_serves() -> None:
    """Small calls, small images, groups, dtypes with products of their own, and stride 1."""

    def chosen(image: tuple[int, ...], dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        weight = torch.empty(64, image[1] // options.get("groups", 1), 3, 3, dtype=dtype)
        return tuple(choose(torch.empty(image, dtype=dtype), weight, *sizes(options))[1:])

    image, strided = (2, 64, 28, 28), {"stride": 2, "padding": 1}
    assert chosen(image, **strided) == ("windows",) * 3
    assert chosen((1, 1, 12, 12), **strided) == ("direct",) * 3
    assert chosen((64, 64, 8, 8), **strided) == (None,) * 3
    assert chosen(image, groups=4, **strided) == (None,) * 3
    assert chosen(image, padding=1) == (None,) * 3
    assert chosen((16, 3, 32, 32), padding=1) == ("direct", "windows", None)
    assert chosen(image, torch.float64, **strided) == ("direct",) * 3
    for dtype in (torch.bfloat16, torch.float16):
        served = None if native.torch_multiplies(dtype) else "windows"
        assert chosen(image, dtype, **strided) == (served,) * 3


def test_the_same_bits_for_any_number_of_threads() -> None:
    """And the weight's gradient where each thread has channels of its own."""
    threads, found = torch.get_num_threads(), []
    x, w = torch.randn(3, 70, 29, 29), torch.randn(66, 70, 3, 3)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaves = [t.clone().requires_grad_() for t in (x, w)]
            out = bigops.conv2d_relu(*leaves, stride=2, padding=1)
            found.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            assert torch.equal(one, same)
