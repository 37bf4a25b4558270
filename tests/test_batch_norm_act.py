"""batch_norm_act beyond its table samples: running statistics, what is saved, hard numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bigops
from bigops import check
from bigops.backends import native

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKEND = "triton" if INTERPRETED else "native"
LAYOUTS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)

pytestmark = pytest.mark.skipif(
    BACKEND == "native" and native.why_not() is not None, reason=f"{native.why_not()}"
)


@pytest.fixture(autouse=True)
def _forced() -> Iterator[None]:
    torch.manual_seed(0)
    with bigops.use_backend(BACKEND):
        yield


def plain(input: Tensor, *args: Any, residual: Tensor | None = None, **kw: Any) -> Tensor:
    out = F.batch_norm(input, *args, **kw)
    return F.relu(out if residual is None else out + residual)


@LAYOUTS
def test_a_module_trains_as_torchs_does(layout: torch.memory_format) -> None:
    """Statistics, their unbiased variance, and gradients over several steps."""
    ours, theirs = torch.nn.BatchNorm2d(20), torch.nn.BatchNorm2d(20)
    for step in range(3):
        image = (torch.randn(4, 20, 9, 8) + step).to(memory_format=layout)
        added = torch.randn(4, 20, 9, 8).to(memory_format=layout)
        grads = []
        for module, function in ((ours, bigops.batch_norm_act), (theirs, plain)):
            x, r = image.clone().requires_grad_(), added.clone().requires_grad_()
            out = function(
                x, module.running_mean, module.running_var, module.weight, module.bias,
                True, 0.1, module.eps, residual=r,
            )  # fmt: skip
            assert out.stride() == image.stride()
            leaves = (x, r, module.weight, module.bias)
            grads.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert grads[0][1].stride() == grads[0][2].stride() == image.stride()
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)
        torch.testing.assert_close(ours.running_var, theirs.running_var)


@LAYOUTS
@pytest.mark.parametrize("center", [1e3, -1e4])
def test_far_from_zero(center: float, layout: torch.memory_format) -> None:
    """Squares of the numbers themselves would lose all of the variance' digits."""
    image = (torch.randn(4, 8, 16, 16) + center).to(memory_format=layout)
    call = (None, None, None, None, True)
    want = plain(image.double(), *call)
    found = check.compare("out", bigops.batch_norm_act(image, *call), plain(image, *call), want)
    assert found.ok, found


@LAYOUTS
def test_one_channel_among_outliers(layout: torch.memory_format) -> None:
    """What the estimate of the mean is made of may be the only number that is unlike the others."""
    image = torch.randn(4, 3, 16, 16)
    image[0, 0, 0, 0] = 1e5
    image[:, 1] = 7.0
    image = image.to(memory_format=layout)
    call = (None, None, None, None, True)
    out, want = bigops.batch_norm_act(image, *call), plain(image.double(), *call)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    assert out[:, 1].count_nonzero() == 0


def test_nan_and_infinity_pass_as_in_torch() -> None:
    image = torch.randn(2, 3, 9, 9)
    image[0, 0, 1, 1], image[1, 1, 2, 2] = float("nan"), float("inf")
    stats = torch.zeros(3), torch.ones(3)
    for training in (False, True):
        x, y = image.clone().requires_grad_(), image.clone().requires_grad_()
        out = bigops.batch_norm_act(x, *(s.clone() for s in stats), training=training)
        want = plain(y, *(s.clone() for s in stats), training=training)
        torch.testing.assert_close(out, want, equal_nan=True)
        got, expected = (
            torch.autograd.grad(o, t, torch.ones_like(o))[0] for o, t in ((out, x), (want, y))
        )
        torch.testing.assert_close(got, expected, equal_nan=True)


def test_saves_input_output_and_two_numbers_a_channel() -> None:
    saved: list[Tensor] = []
    image = torch.randn(2, 5, 8, 8).requires_grad_()
    weight, residual = torch.ones(5).requires_grad_(), torch.randn(2, 5, 8, 8).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = bigops.batch_norm_act(image, None, None, weight, training=True, residual=residual)
    known = {t.data_ptr() for t in (image, weight, out)}
    assert [t.shape for t in saved if t.data_ptr() not in known] == [(5,), (5,)]


@LAYOUTS
@pytest.mark.parametrize("wanted", range(1, 16))
def test_only_gradients_that_are_needed(wanted: int, layout: torch.memory_format) -> None:
    image, residual = (torch.randn(3, 5, 8, 9).to(memory_format=layout) for _ in range(2))
    tensors = (image, torch.randn(5), torch.randn(5), residual)
    for training in (True, False):
        results = []
        for function in (bigops.batch_norm_act, plain):
            x, w, b, r = (
                t.clone().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(tensors)
            )
            out = function(x, torch.zeros(5), torch.ones(5), w, b, training, residual=r)
            leaves = [t for t in (x, w, b, r) if t.requires_grad]
            results.append(torch.autograd.grad(out.square().sum(), leaves))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(INTERPRETED, reason="of the native kernels")
@LAYOUTS
@pytest.mark.parametrize("shape", [(40, 2, 33, 35), (40, 64, 12, 11), (16, 256, 2, 2)])
def test_any_number_of_threads_gives_the_same(
    shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    image = torch.randn(shape).to(memory_format=layout).requires_grad_()
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            out = bigops.batch_norm_act(image, None, None, training=True)
            (grad,) = torch.autograd.grad(out.square().sum(), image)
            found.append((out, grad))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_under_compile_the_running_statistics_move_too() -> None:
    image = torch.randn(4, 6, 8, 8)
    stats = [torch.zeros(6), torch.ones(6)]
    expected = [s.clone() for s in stats]
    compiled = torch.compile(bigops.batch_norm_act, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        got = compiled(image, *stats, training=True)
        want = bigops.batch_norm_act(image, *expected, training=True)
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(stats, expected)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("input", {"input": torch.randn(1, 4, 1, 1), "training": True}),
        ("running_var", {"running_var": torch.ones(5)}),
        ("running_mean", {"running_mean": None}),
        ("weight", {"weight": torch.ones(4, 1)}),
        ("bias", {"bias": torch.ones(4).double()}),
        ("residual", {"residual": torch.ones(4)}),
        ("activation", {"activation": "gelu"}),
    ],
)
def test_bad_arguments_are_named(name: str, change: dict[str, Any]) -> None:
    call: dict[str, Any] = {
        "input": torch.randn(2, 4, 3, 3),
        "running_mean": torch.zeros(4),
        "running_var": torch.ones(4),
    }
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        bigops.batch_norm_act(**call | change)
