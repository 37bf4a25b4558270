"""max_pool2d beyond its table samples: torch's bits, indices, layouts, what is saved."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bigops
from bigops.backends import native

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKEND = "triton" if INTERPRETED else "native"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, *([] if INTERPRETED else [torch.float64]))

pytestmark = pytest.mark.skipif(
    BACKEND == "native" and native.why_not() is not None, reason=f"{native.why_not()}"
)


@pytest.fixture(autouse=True)
def _forced() -> Iterator[None]:
    torch.manual_seed(0)
    with bigops.use_backend(BACKEND):
        yield


def image_of(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    """Small integers with many equals, some -inf and some NaN."""
    values = torch.randint(-3, 4, shape).to(dtype)
    for special in (float("-inf"), float("nan")):
        values = torch.where(torch.rand(shape) < 0.05, special, values)
    return values.to(memory_format=layout).requires_grad_()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(3 if INTERPRETED else 12))
def test_bits_are_torchs(seed: int, dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Maxima, their places, strides and gradients, whatever the windows."""
    draw = random.Random(seed)
    kernel = [draw.choice((1, 2, 3, 5)) for _ in "hw"]
    stride = [draw.choice((1, 2, 3, 4)) for _ in "hw"]
    dilation = [draw.choice((1, 1, 2, 3)) for _ in "hw"]
    padding = [draw.randint(0, k // 2) for k in kernel]
    size = [draw.randint((k - 1) * d + 1, 50) for k, d in zip(kernel, dilation, strict=True)]
    shape = (draw.choice((1, 3)), draw.choice((1, 3, 16, 37)), *size)
    windows = (kernel, stride, padding, dilation, draw.random() < 0.5)
    image = image_of(shape, dtype, layout)
    out, places = bigops.max_pool2d(image, *windows, return_indices=True)
    want, want_places = F.max_pool2d(image, *windows, return_indices=True)
    torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(places, want_places)
    assert out.stride() == want.stride()
    assert torch.equal(
        bigops.max_pool2d(image, *windows).nan_to_num(9.0), want.nan_to_num(9.0)
    )  # the short road's, too
    values = torch.randint(-4, 5, want.shape).to(dtype)
    for grad in (
        torch.empty_like(want).copy_(values),
        values,
        values[:1, :1, :1, :1].expand_as(out),
    ):
        (got,) = torch.autograd.grad(out, image, grad, retain_graph=True)
        (expected,) = torch.autograd.grad(want, image, grad, retain_graph=True)
        assert torch.equal(got, expected)
        assert got.stride() == image.stride()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_usual_windows_of_every_width(ceil_mode: bool, layout: torch.memory_format) -> None:
    widths = (2, 9) if INTERPRETED else range(2, 70)
    for width, height in itertools.product(widths, (4, 7)):
        image = torch.randn(2, 3, height, width).to(memory_format=layout).requires_grad_()
        for windows in ((2, 2, 0, 1), (3, 2, 1, 1)):
            out, want = (f(image, *windows, ceil_mode) for f in (bigops.max_pool2d, F.max_pool2d))
            assert torch.equal(out, want)
            grad = torch.randn_like(want)
            grads = [torch.autograd.grad(o, image, grad)[0] for o in (out, want)]
            torch.testing.assert_close(*grads)


def test_three_dimensions_and_no_batch() -> None:
    image = torch.randn(5, 9, 8).requires_grad_()
    out, places = bigops.max_pool2d(image, 3, 2, return_indices=True)
    want, want_places = F.max_pool2d(image, 3, 2, return_indices=True)
    assert torch.equal(out, want)
    assert torch.equal(places, want_places)
    assert bigops.max_pool2d(torch.randn(0, 5, 9, 8), 2).shape == (0, 5, 4, 4)


def test_saves_only_a_byte_per_window() -> None:
    saved: list[Tensor] = []
    image = torch.randn(2, 3, 8, 8).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = bigops.max_pool2d(image, 2)
    assert [(t.dtype, t.shape) for t in saved] == [(torch.uint8, out.shape)]


@pytest.mark.skipif(INTERPRETED, reason="of the native kernels")
def test_any_number_of_threads_gives_the_same() -> None:
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            image = torch.arange(40 * 33 * 35 * 31).remainder(977).float().view(40, 33, 35, 31)
            for layout in (torch.contiguous_format, torch.channels_last):
                x = image.to(memory_format=layout).requires_grad_()
                for windows in ((2,), (3, 2, 1)):
                    out = bigops.max_pool2d(x, *windows)
                    (grad,) = torch.autograd.grad(out.square().sum(), x)
                    found.append((out, grad))
    finally:
        torch.set_num_threads(threads)
    for i in range(4, len(found)):
        for one, other in zip(found[i % 4], found[i], strict=True):
            assert torch.equal(one, other)


def test_what_no_kernel_serves_runs_the_reference() -> None:
    image = torch.randn(1, 2, 40, 40)
    with bigops.use_backend(None), pytest.warns(bigops.FallbackWarning, match="kernel_size above"):
        got = bigops.max_pool2d(image, 16)
    assert torch.equal(got, F.max_pool2d(image, 16))
    integers = torch.randint(0, 9, (1, 2, 6, 6))
    with bigops.use_backend(None), pytest.warns(bigops.FallbackWarning, match="int64"):
        assert torch.equal(bigops.max_pool2d(integers, 2), F.max_pool2d(integers, 2))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("kernel_size", {"kernel_size": 9}),
        ("kernel_size", {"kernel_size": 0}),
        ("stride", {"stride": 0}),
        ("padding", {"padding": 2}),
        ("dilation", {"dilation": 0}),
        ("input", {"input": torch.randn(2, 0, 8, 8)}),
    ],
)
def test_bad_arguments_are_named(name: str, change: dict[str, object]) -> None:
    call = {"input": torch.randn(1, 3, 8, 8), "kernel_size": 3} | change
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        bigops.max_pool2d(**call)
    with pytest.raises(RuntimeError):  # torch's own kind
        F.max_pool2d(**call)
