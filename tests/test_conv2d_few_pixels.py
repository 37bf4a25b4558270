"""The weight's gradient of a convolution with few pixels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from truth import assert_as_true

import bigops
from bigops.backends import native
from bigops.ops import conv2d_few_pixels as few

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each such gradient."""
    found: list[None] = []

    def counted(*args: Any) -> torch.Tensor:
        found.append(None)
        return few.weight_gradient(*args)

    monkeypatch.setattr("bigops.ops.conv2d_native.weight_gradient", counted)
    return found


CASES = {
    "2x2 pixels": ((16, 64, 2, 2), (96, 64, 3, 3), {"padding": 1}),
    "uneven": ((4, 64, 5, 9), (72, 64, 3, 2), {"stride": (1, 3), "padding": (1, 0)}),
    "1x1": ((8, 256, 2, 4), (64, 256, 1, 1), {}),
    "1x1, stride 2": ((2, 256, 8, 8), (64, 256, 1, 1), {"stride": 2}),
    "one pixel": ((40, 80, 3, 3), (48, 80, 3, 3), {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_it_is_as_true_as_torchs(name: str, dtype: torch.dtype, products: list[None]) -> None:
    torch.manual_seed(0)
    image, filters, options = CASES[name]
    images = torch.randn(image).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(filters) * filters[1] ** -0.5).to(dtype)

    def gradients(function: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        x, w = (t.to(dtype).detach().requires_grad_() for t in (images, weight))
        out = function(x, w, **options)
        grad = torch.linspace(-1, 1, out.numel()).sin().view_as(out).to(dtype)
        return dict(zip(("input", "weight"), torch.autograd.grad(out, (x, w), grad), strict=True))

    def ours(*args: Any, **kwargs: Any) -> Any:
        return bigops.conv2d_act(*args, **kwargs, activation="none")

    got = gradients(ours, dtype)
    assert len(products) == 1
    assert got["weight"].is_contiguous(memory_format=torch.channels_last)
    assert_as_true([got], [gradients(F.conv2d, dtype)], [gradients(F.conv2d, torch.float64)])


@pytest.mark.parametrize(
    ("batch", "options", "layout", "dtype"),
    [
        (few.PIXELS // 4 + 1, {}, torch.channels_last, torch.bfloat16),
        (few.PIXELS // 4 + 1, {"dilation": 2, "padding": 2}, torch.channels_last, torch.float32),
        (4, {"dilation": 2, "padding": 2}, torch.channels_last, torch.bfloat16),
        (4, {"groups": 2}, torch.channels_last, torch.float32),
        (4, {}, torch.contiguous_format, torch.bfloat16),
    ],
)
def test_other_convolutions_are_torchs(
    batch: int,
    options: dict[str, Any],
    layout: torch.memory_format,
    dtype: torch.dtype,
    products: list[None],
) -> None:
    images = torch.randn(batch, 64, 2, 2, dtype=dtype).contiguous(memory_format=layout)
    weight = torch.randn(96, 64 // options.get("groups", 1), 3, 3, dtype=dtype, requires_grad=True)
    out = bigops.conv2d_act(images, weight, **{"padding": 1, **options}, activation="none")
    out.sum().backward()
    assert not products
