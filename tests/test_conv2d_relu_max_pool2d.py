"""conv2d_relu_max_pool2d beyond its table samples: all windows, winners, layouts, errors."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

import bigops
from bigops import check, ops
from bigops.backends import native
from bigops.ops.conv2d_cases import conv_sample

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}")

OP = ops.get("conv2d_relu_max_pool2d")


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    torch.manual_seed(0)
    with bigops.use_backend("native"):
        yield


def eager(image: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, **kw: int) -> torch.Tensor:
    pool = (kw.pop("pool_kernel_size", 2), kw.pop("pool_stride", None), kw.pop("pool_padding", 0))
    return F.max_pool2d(F.relu(F.conv2d(image, weight, bias, **kw)), *pool)


def random_sample(seed: int) -> ops.Sample:
    draw = random.Random(seed)
    groups = draw.choice((1, 1, 1, 2))
    channels = draw.choice((1, 2, 3, 5, 16, 24, 33))
    kernel = [draw.choice((1, 2, 3, 5, 7)) for _ in "hw"]
    stride = [draw.choice((1, 1, 2)) for _ in "hw"]
    dilation = [draw.choice((1, 1, 2)) for _ in "hw"]
    padding = [draw.choice((0, 1, k // 2)) for k in kernel]
    window = [draw.choice((1, 2, 2, 3, 4)) for _ in "hw"]
    image = [
        max(1, d * (k - 1) + 1 + s * (w - 1) - 2 * p) + draw.choice((0, 3, 9, 16))
        for k, d, s, p, w in zip(kernel, dilation, stride, padding, window, strict=True)
    ]
    return conv_sample(
        f"seed {seed}",
        (draw.choice((1, 2, 3)), channels * groups, *image),
        (groups * draw.choice((1, 5, 16, 31, 40, 70)), channels, *kernel),
        bias=draw.random() < 0.7,
        channels_last=draw.random() < 0.5,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        pool_kernel_size=window,
        pool_stride=draw.choice((None, 1, 2, 3)),
        pool_padding=[draw.randint(0, w // 2) for w in window],
    )


def no_ties(sample: ops.Sample, dtype: torch.dtype) -> bool:
    """Half types meet equal maxima, whose gradient may go to either; float64 picks one of them."""
    return dtype in (torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", OP.dtypes, ids=str)
@pytest.mark.parametrize("seed", range(24))
def test_any_shape(seed: int, dtype: torch.dtype) -> None:
    sample = random_sample(seed)
    for found in check.check_sample(OP, sample, "native", dtype):
        assert found.ok or (found.tensor != "out" and not no_ties(sample, dtype)), found


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("channels", "kwargs"),
    [
        (1, {"padding": 1}),
        (3, {"pool_kernel_size": 3, "pool_stride": 2, "pool_padding": 1}),
        (4, {"groups": 2, "dilation": 2, "padding": 2, "pool_stride": 1}),
    ],
)
def test_gradcheck(channels: int, kwargs: dict[str, int], channels_last: bool) -> None:
    image = torch.randn(2, channels, 6, 7, dtype=torch.float64)
    if channels_last:
        image = torch.empty_like(image, memory_format=torch.channels_last).copy_(image)
    weight = torch.randn(4, channels // kwargs.get("groups", 1), 3, 3, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (image, weight, bias)]
    assert torch.autograd.gradcheck(lambda *t: bigops.conv2d_relu_max_pool2d(*t, **kwargs), inputs)


@pytest.mark.parametrize("pool", [(2, 2, 0), (3, 2, 1), (2, 1, 0), (15, 15, 7)])
def test_winners_are_torchs(pool: tuple[int, int, int]) -> None:
    """The byte is the first maximum's place in its window, or 255 if ReLU makes it 0; with ties."""
    kernel, stride, padding = pool
    image = torch.randint(-3, 3, (2, 1, 20, 21)).float()
    weight = torch.ones(17, 1, 1, 1)
    out, index = torch.ops.bigops.conv2d_relu_max_pool2d(
        image, weight, None, [1, 1], [0, 0], [1, 1], 1, [kernel] * 2, [stride] * 2, [padding] * 2
    )
    want, flat = F.max_pool2d(
        image.relu().expand(2, 17, 20, 21), kernel, stride, padding, return_indices=True
    )
    rows = torch.arange(out.shape[2]).unsqueeze(1) * stride - padding
    columns = torch.arange(out.shape[3]) * stride - padding
    place = (flat // 21 - rows) * kernel + flat % 21 - columns
    assert torch.equal(out, want)
    assert want.count_nonzero() < want.numel() or kernel > 3
    assert torch.equal(index.long(), torch.where(want > 0, place, 255))


@pytest.mark.parametrize("channels", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_nan_and_infinity_pass_as_in_torch(channels: int, dtype: torch.dtype) -> None:
    image = torch.randn(2, channels, 12, 12, dtype=dtype)
    image[0, 0, 3, 4], image[1, -1, 8, 2] = float("nan"), float("-inf")
    weight, bias = torch.randn(17, channels, 3, 3, dtype=dtype), torch.randn(17, dtype=dtype)
    got = bigops.conv2d_relu_max_pool2d(image, weight, bias, padding=1, pool_padding=1)
    # In float64: oneDNN's bf16 convolution spreads a NaN beyond its windows on some processors.
    wide = (t.double() for t in (image, weight, bias))
    want = eager(*wide, padding=1, pool_padding=1)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())


def test_an_image_of_nothing_but_minus_infinity() -> None:
    image = torch.full((1, 1, 6, 6), float("-inf")).requires_grad_()
    weight = torch.ones(16, 1, 1, 1).requires_grad_()
    out = bigops.conv2d_relu_max_pool2d(image, weight, pool_kernel_size=3, pool_padding=1)
    (grad,) = torch.autograd.grad(out.sum(), image)
    assert out.count_nonzero() == 0
    assert grad.count_nonzero() == 0


def test_a_nan_passes_its_gradient_as_in_torch() -> None:
    image = torch.randn(1, 2, 8, 8)
    image[0, 1, 2, 3] = float("nan")
    image.requires_grad_()
    weight, bias = torch.randn(18, 2, 1, 1), torch.randn(18)
    got, want = (f(image, weight, bias) for f in (bigops.conv2d_relu_max_pool2d, eager))
    grads = [torch.autograd.grad(out, image, torch.ones_like(out))[0] for out in (got, want)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("channels", [1, 40])
def test_layouts_and_expanded_gradients(channels: int) -> None:
    image = torch.randn(3, channels, 11, 10)
    weight, bias = torch.randn(33, channels, 3, 3).requires_grad_(), torch.randn(33)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.empty_like(image, memory_format=layout).copy_(image).requires_grad_()
        out, want = (f(x, weight, bias, padding=1) for f in (bigops.conv2d_relu_max_pool2d, eager))
        assert out.stride() == want.stride()
        for grad in (torch.ones(()).expand_as(out), torch.randn_like(out).contiguous()):
            got = torch.autograd.grad(out, (x, weight), grad, retain_graph=True)
            for g, w in zip(
                got, torch.autograd.grad(want, (x, weight), grad, retain_graph=True), strict=True
            ):
                torch.testing.assert_close(g, w, atol=1e-4, rtol=1e-4)
            assert got[0].stride() == x.stride()


def test_equal_bits_run_to_run() -> None:
    image = torch.randn(9, 16, 14, 14).requires_grad_()
    weight, bias = torch.randn(24, 16, 3, 3).requires_grad_(), torch.randn(24).requires_grad_()
    runs = []
    for _ in range(3):
        out = bigops.conv2d_relu_max_pool2d(image, weight, bias, pool_kernel_size=3, pool_stride=2)
        grads = torch.autograd.grad(out.square().sum(), (image, weight, bias))
        runs.append((out, *grads))
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            assert torch.equal(a, b)


def test_saves_only_a_byte_per_window() -> None:
    saved: list[torch.Tensor] = []
    image, weight = torch.randn(2, 1, 8, 8), torch.randn(16, 1, 3, 3).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = bigops.conv2d_relu_max_pool2d(image, weight, padding=1)
    allowed = {t.data_ptr() for t in (image, weight)}
    extra = [t for t in saved if t.data_ptr() not in allowed]
    assert [(t.dtype, t.shape) for t in extra] == [(torch.uint8, out.shape)]


def test_windows_beyond_a_byte_run_the_reference() -> None:
    image, weight = torch.randn(1, 1, 20, 20), torch.randn(3, 1, 3, 3)
    with bigops.use_backend(None), pytest.warns(bigops.FallbackWarning, match="pool_kernel_size"):
        got = bigops.conv2d_relu_max_pool2d(image, weight, pool_kernel_size=16)
    torch.testing.assert_close(got, eager(image, weight, None, pool_kernel_size=16))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("pool_kernel_size", {"pool_kernel_size": 9}),
        ("pool_kernel_size", {"pool_kernel_size": 0}),
        ("pool_stride", {"pool_stride": 0}),
        ("pool_padding", {"pool_padding": 2}),
        ("pool_padding", {"pool_padding": -1}),
        ("input", {"input": torch.randn(1, 2, 8, 8)}),
    ],
)
def test_bad_arguments_are_named(name: str, change: dict[str, object]) -> None:
    call = {"input": torch.randn(1, 3, 8, 8), "weight": torch.randn(4, 3, 3, 3)} | change
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        bigops.conv2d_relu_max_pool2d(**call)
