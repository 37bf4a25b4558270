"""Winograd's products of 3x3 convolutions on the CPU: kernels and when they are taken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import bigops
from bigops import check, ops
from bigops.backends import native
from bigops.ops import conv2d_winograd as winograd
from bigops.ops.conv2d_cases import conv_sample

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))

PLANES, PIXELS = torch.contiguous_format, torch.channels_last
LAYOUTS = pytest.mark.parametrize("layout", [PLANES, PIXELS], ids=["planes", "pixels"])


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    with bigops.use_backend("native"):
        yield


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What each of the kernels' calls returned: whether all was finite."""
    found: list[bool] = []

    class Kernels:
        def __getattr__(self, name: str) -> Any:
            kernel = getattr(native.kernels, name)

            def counted(*args: Any) -> bool:
                found.append(kernel(*args))
                return found[-1]

            return counted

    monkeypatch.setattr(winograd, "native", type("", (), {"kernels": Kernels()}))
    return found


def directly(grad: Tensor, x: Tensor, weight: Tensor, padding: list[int]) -> Any:
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], 1, [True, True, False]
    )


# Images, channels, rows, columns; filters; padding.
SHAPES = [
    ((1, 1, 1, 1), 1, [1, 1]),
    ((2, 3, 4, 6), 5, [1, 1]),
    ((3, 17, 7, 5), 33, [1, 1]),  # odd sizes, channels beyond vectors
    ((2, 16, 9, 3), 16, [0, 0]),
    ((1, 20, 1, 8), 70, [2, 1]),  # one row of pixels, filters beyond a panel
    ((2, 70, 8, 8), 9, [0, 2]),  # channels beyond a chain
    ((40, 8, 2, 4), 16, [1, 1]),  # many images in a task
    ((1, 4, 90, 90), 4, [1, 1]),  # many tasks in an image
    ((9, 160, 30, 31), 130, [1, 1]),  # many batches of the weight's gradient
]


@LAYOUTS
@pytest.mark.parametrize(("image", "filters", "padding"), SHAPES)
def test_kernels_in_float64(
    image: tuple[int, int, int, int],
    filters: int,
    padding: list[int],
    layout: torch.memory_format,
) -> None:
    """In which nothing is lost between 16 products and 36, whichever way the weight lies."""
    x = torch.randn(image, dtype=torch.float64).contiguous(memory_format=layout)
    bias = torch.randn(filters, dtype=torch.float64)
    for weight_layout in (PLANES, PIXELS):
        weight = torch.randn(filters, image[1], 3, 3, dtype=torch.float64)
        weight = weight.contiguous(memory_format=weight_layout)
        want = F.conv2d(x, weight, bias, padding=padding)
        out = torch.full_like(want, float("nan")).contiguous(memory_format=layout)
        for relu in (False, True):
            assert native.kernels.conv2d_winograd(x, weight, bias, out, None, padding, relu, False)
            torch.testing.assert_close(out, want.relu() if relu else want)
        grad = torch.randn_like(out)
        grads = [torch.full_like(t, float("nan")) for t in (x, weight)]
        assert native.kernels.conv2d_winograd(
            grad, weight, None, grads[0], None, padding, False, True
        )
        assert native.kernels.conv2d_winograd_weight(grad, x, grads[1], padding)
        for got, right in zip(grads, directly(grad, x, weight, padding), strict=False):
            torch.testing.assert_close(got, right)


@LAYOUTS
@pytest.mark.parametrize(
    ("op", "image", "filters", "options"),
    [
        ("conv2d_act", (2, 64, 28, 28), 64, {}),
        ("conv2d_act", (4, 17, 13, 15), 33, {"activation": "gelu", "residual": True}),
        ("conv2d_act", (1, 512, 14, 14), 64, {"activation": "none"}),
        ("conv2d_relu_max_pool2d", (4, 32, 14, 14), 64, {}),
        ("conv2d_relu_max_pool2d", (3, 20, 13, 15), 33, {}),
    ],
)
@pytest.mark.parametrize("dtype", ops.get("conv2d_act").dtypes, ids=str)
def test_ops_are_true(
    op: str,
    image: tuple[int, int, int, int],
    filters: int,
    options: dict[str, Any],
    layout: torch.memory_format,
    dtype: torch.dtype,
    taken: list[bool],
) -> None:
    sample = conv_sample(
        "a", image, (filters, image[1], 3, 3), padding=1, channels_last=layout is PIXELS, **options
    )
    for found in check.check_sample(ops.get(op), sample, "native", dtype):
        assert found.ok, found
    dtypes = winograd.POOLED if op == "conv2d_relu_max_pool2d" else winograd.DTYPES
    assert all(taken)
    assert bool(taken) == (dtype in dtypes)


@LAYOUTS
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38], ids=str)
def test_what_is_not_finite_stays_where_it_is(
    value: float, layout: torch.memory_format, taken: list[bool]
) -> None:
    """A tile would spread it; and differences of large numbers are infinite before sums are."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 32, 12, 12), torch.randn(16, 32, 3, 3)
    x[1, 3, 5, 6] = x[1, 3, 5, 8] = value
    if value == 3e38:
        weight *= 0.1
        x[1, 3, 5, 8] = -value
    x, weight = (t.contiguous(memory_format=layout).requires_grad_() for t in (x, weight))
    out, want = bigops.conv2d_relu(x, weight, padding=1), F.conv2d(x, weight, padding=1).relu()
    torch.testing.assert_close(out, want, equal_nan=True)
    grad = torch.randn_like(out)
    grad[0, 2, 3, 4] = float("inf") if value == 3e38 else value
    got, right = (torch.autograd.grad(t, (x, weight), grad) for t in (out, want))
    for one, other in zip(got, right, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)
    assert taken == [False, False, False]


@LAYOUTS
@pytest.mark.parametrize("filters", [32, 33])
def test_the_first_of_equals_wins(filters: int, layout: torch.memory_format) -> None:
    """Of integers all products are exact, so that windows have ties, and 0 among them."""
    x = torch.randint(-2, 3, (3, 16, 13, 15)).float().contiguous(memory_format=layout)
    weight, bias = torch.randint(-1, 2, (filters, 16, 3, 3)).float(), torch.zeros(filters)
    conv = F.conv2d(x, weight, bias, padding=1).relu()
    best, place = F.max_pool2d(conv, 2, return_indices=True)
    rows, columns = place // 15 % 2, place % 15 % 2
    want = torch.where(best > 0, 2 * rows + columns, 255)
    out = torch.empty_like(best).contiguous(memory_format=layout)
    index = torch.empty_like(out, dtype=torch.uint8)
    assert winograd.pooled(x, weight, bias, out, index, [1, 1])
    assert torch.equal(out, best)
    assert torch.equal(index.long(), want)


def test_any_number_of_threads_gives_the_same() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 48, 31, 30).requires_grad_(), torch.randn(80, 48, 3, 3)
    weight.requires_grad_()
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            out = bigops.conv2d_relu(x, weight, padding=1)
            runs.append((out, *torch.autograd.grad(out.square().sum(), (x, weight))))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        for one, other in zip(runs[0], run, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("image", "weight", "options"),
    [
        ((8, 15, 8, 8), (16, 15, 3, 3), {}),
        ((8, 16, 8, 8), (15, 16, 3, 3), {}),
        ((7, 16, 4, 4), (16, 16, 3, 3), {}),  # 28 tiles
        ((40, 16, 8, 1), (16, 16, 3, 3), {}),
        ((1, 16, 2, 70000), (16, 16, 3, 3), {}),
        ((8, 16, 8, 8), (16, 16, 3, 1), {"padding": (1, 0)}),
        ((8, 32, 8, 8), (32, 16, 3, 3), {"groups": 2}),
        ((8, 16, 16, 16), (16, 16, 3, 3), {"stride": 2}),
        ((8, 16, 16, 16), (16, 16, 3, 3), {"dilation": 2}),
        ((8, 16, 16, 16), (16, 16, 3, 3), {"padding": 3}),
    ],
)
def test_other_convolutions_are_direct(
    image: tuple[int, ...], weight: tuple[int, ...], options: dict[str, Any], taken: list[bool]
) -> None:
    x, w = torch.randn(image), torch.randn(weight).requires_grad_()
    bigops.conv2d_relu(x, w, **{"padding": 1, **options}).sum().backward()
    assert not taken


def test_only_needed_gradients_are_computed(taken: list[bool]) -> None:
    """And the weight's of few channels by products of windows."""
    for channels, calls in ((32, [True, True]), (16, [True])):
        taken.clear()
        x, weight = torch.randn(8, channels, 8, 8), torch.randn(16, channels, 3, 3)
        bigops.conv2d_relu(x, weight.requires_grad_(), padding=1).sum().backward()
        assert taken == calls


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"padding": [3, 3]}, "padding"),
        ({"out": torch.empty(2, 16, 9, 8)}, "out"),
        ({"weight": torch.empty(16, 17, 3, 3)}, "channels"),
        ({"weight": torch.empty(16, 16, 3, 2)}, "3x3"),
        ({"input": torch.empty(2, 16, 8, 8).bfloat16()}, "dtypes"),
    ],
)
def test_kernels_refuse_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    call = {
        "input": torch.empty(2, 16, 8, 8),
        "weight": torch.empty(16, 16, 3, 3),
        "bias": None,
        "out": torch.empty(2, 16, 8, 8),
        "index": None,
        "padding": [1, 1],
    }
    with pytest.raises(ValueError, match=message):
        native.kernels.conv2d_winograd(*{**call, **change}.values(), False, False)
