"""conv2d_act beyond its table samples: random shapes, gradients, layouts, odd values, errors."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

import bigops
from bigops import check, ops
from bigops.backends import native
from bigops.ops.activation import ACTIVATIONS, NUMBERS
from bigops.ops.conv2d_arguments import is_channels_last
from bigops.ops.conv2d_cases import conv_sample
from bigops.ops.conv2d_native import NATIVE_DTYPES, laid_out

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}")

OP = ops.get("conv2d_act")


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    torch.manual_seed(0)
    with bigops.use_backend("native"):
        yield


def random_sample(seed: int) -> ops.Sample:
    """A convolution of any kind that torch takes, small enough to check in float64."""
    draw = random.Random(seed)
    groups = draw.choice((1, 1, 1, 2, 3))
    channels = draw.choice((1, 2, 3, 4, 7, 16, 20, 32))
    filters = groups * draw.choice((1, 5, 8, 16, 31, 33, 40))
    kernel = [draw.choice((1, 2, 3, 5, 7, 11)) for _ in "hw"]
    stride = [draw.choice((1, 1, 2, 3)) for _ in "hw"]
    dilation = [draw.choice((1, 1, 2)) for _ in "hw"]
    padding = [draw.choice((0, 1, k // 2, k)) for k in kernel]
    image = [
        max(1, d * (k - 1) + 1 - 2 * p) + draw.choice((0, 3, 8, 14))
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    return conv_sample(
        f"seed {seed}",
        (draw.choice((1, 2, 3)), channels * groups, *image),
        (filters, channels, *kernel),
        bias=draw.random() < 0.7,
        channels_last=draw.random() < 0.5,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )


@pytest.mark.parametrize("dtype", OP.dtypes, ids=str)
@pytest.mark.parametrize("seed", range(24))
def test_any_shape(seed: int, dtype: torch.dtype) -> None:
    for found in check.check_sample(OP, random_sample(seed), "native", dtype):
        assert found.ok, found


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("channels", "kernel", "kwargs"),
    [
        (1, (3, 3), {"padding": 1}),
        (4, (3, 2), {"stride": (2, 1), "dilation": (1, 2), "groups": 2}),
        (9, (1, 1), {}),
    ],
)
def test_gradcheck(
    channels: int, kernel: tuple[int, int], kwargs: dict[str, object], channels_last: bool
) -> None:
    groups = int(kwargs.get("groups", 1))  # type: ignore[call-overload]
    image = torch.randn(2, channels, 5, 6, dtype=torch.float64)
    if channels_last:
        image = torch.empty_like(image, memory_format=torch.channels_last).copy_(image)
    weight = torch.randn(4, channels // groups, *kernel, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (image, weight, bias)]
    assert torch.autograd.gradcheck(lambda *t: bigops.conv2d_relu(*t, **kwargs), inputs)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": 1}, {"groups": 2}], ids=str)
def test_gradients_outlive_the_next_call(options: dict[str, int], residual: bool) -> None:
    """Though memory between two passes is the same one; also of a larger call and another dtype."""

    def gradients(batch: int, dtype: torch.dtype) -> list[torch.Tensor]:
        torch.manual_seed(batch)
        image = torch.randn(batch, 40, 12, 12, dtype=dtype).requires_grad_()
        weight = torch.randn(20, 40 // options.get("groups", 1), 3, 3, dtype=dtype).requires_grad_()
        added = torch.randn_like(F.conv2d(image, weight, **options)) if residual else None
        leaves = [image, weight, *([added.requires_grad_()] if added is not None else [])]
        out = bigops.conv2d_act(image, weight, **options, residual=added)
        return list(torch.autograd.grad(out, leaves, torch.randn_like(out)))

    calls = [(2, torch.float32), (5, torch.float32), (3, torch.bfloat16), (2, torch.float32)]
    kept = [gradients(*call) for call in calls]
    copies = [[g.clone() for g in grads] for grads in kept]
    for _ in range(2):
        for call, grads, copied in zip(calls, kept, copies, strict=True):
            again = gradients(*call)
            for got, one, other in zip(again, grads, copied, strict=True):
                assert torch.equal(one, other)
                assert torch.equal(got, other)


def test_expanded_and_strided_gradients() -> None:
    image = torch.randn(2, 3, 9, 18)[..., ::2].requires_grad_()
    weight, bias = torch.randn(20, 3, 3, 3).requires_grad_(), torch.randn(20).requires_grad_()
    out, eager = bigops.conv2d_relu(image, weight, bias), F.relu(F.conv2d(image, weight, bias))
    for grad in (torch.ones(()).expand_as(out), torch.randn(20, 2, *out.shape[2:]).transpose(0, 1)):
        got = torch.autograd.grad(out, (image, weight, bias), grad, retain_graph=True)
        want = torch.autograd.grad(eager, (image, weight, bias), grad, retain_graph=True)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)


@pytest.mark.parametrize("channels", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nan_and_infinity_pass_as_in_torch(channels: int, dtype: torch.dtype) -> None:
    image = torch.randn(2, channels, 12, 12, dtype=dtype)
    image[0, 0, 3, 4], image[1, -1, 8, 2] = float("nan"), float("-inf")
    weight = torch.randn(17, channels, 3, 3, dtype=dtype) / (3 * channels**0.5)
    got = bigops.conv2d_relu(image, weight, padding=1)
    want = F.relu(F.conv2d(image, weight, padding=1))
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("channels", [1, 3, 40])
def test_layout_follows_torch(channels: int) -> None:
    """Of an input and a weight of either layout; one channel is judged by its strides."""
    for image_last in (False, True):
        for weight_last in (False, True):
            image, weight = torch.randn(2, channels, 8, 8), torch.randn(20, channels, 3, 3)
            image, weight = (
                torch.empty_like(t, memory_format=torch.channels_last).copy_(t) if last else t
                for t, last in ((image, image_last), (weight, weight_last))
            )
            assert is_channels_last(image) == image_last
            got = bigops.conv2d_relu(image, weight)
            assert got.stride() == F.conv2d(image, weight).stride()


def test_equal_bits_run_to_run() -> None:
    image = torch.randn(16, 3, 20, 20).requires_grad_()
    weight = torch.randn(24, 3, 3, 3).requires_grad_()
    runs = []
    for _ in range(3):
        out = bigops.conv2d_relu(image, weight)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (image, weight))))
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            assert torch.equal(a, b)


def test_only_needed_gradients_are_computed() -> None:
    image, weight = torch.randn(2, 3, 8, 8), torch.randn(20, 3, 3, 3).requires_grad_()
    out = bigops.conv2d_relu(image, weight)
    sizes = ([1, 1], [0, 0], [1, 1], 1)
    for needs in ([False, True, False, False], [False, False, True, True]):
        grads = torch.ops.bigops.conv2d_act_backward(
            torch.ones_like(out), image, weight, out, *sizes, "relu", needs
        )
        assert [g is not None for g in grads] == needs


def test_one_image() -> None:
    image, weight = torch.randn(3, 8, 8), torch.randn(20, 3, 3, 3)
    want = F.relu(F.conv2d(image, weight))
    torch.testing.assert_close(bigops.conv2d_relu(image, weight), want)
    added = torch.randn(20, 6, 6)
    got = bigops.conv2d_act(image, weight, activation=None, residual=added)
    torch.testing.assert_close(got, F.conv2d(image, weight) + added)


@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (12, 12)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_kept(activation: str, channels: int, groups: int) -> None:
    """Of gelu and silu what they are given, where a gradient is wanted; else only the output."""
    image = torch.randn(2, channels, 12, 12)
    weight = torch.randn(12, channels // groups, 3, 3, requires_grad=True)
    sizes: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = bigops.conv2d_act(image, weight, activation=activation, groups=groups)
    assert sizes == [image.numel(), weight.numel(), 0 if activation == "none" else out.numel()]
    with torch.no_grad():
        _, pre = torch.ops.bigops.conv2d_act(
            image, weight, None, None, [1, 1], [0, 0], [1, 1], groups, activation, False
        )
    assert pre.numel() == 0


def test_a_gradient_without_what_it_needs_says_so() -> None:
    image, weight = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3, requires_grad=True)
    out, _ = torch.ops.bigops.conv2d_act(
        image, weight, None, None, [1, 1], [0, 0], [1, 1], 1, "gelu", False
    )
    with pytest.raises(RuntimeError, match="keep=True"):
        out.sum().backward()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activations_and_slopes(activation: str, dtype: torch.dtype) -> None:
    """Over all sizes a value may have, in both tails, relative to what torch has in float64."""
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.logspace(-30, 1, 301), torch.zeros(1)])
    x = torch.cat([x, -x])[None, None, None].to(dtype)
    out, grad, number = torch.empty_like(x), torch.empty_like(x), NUMBERS[activation]
    native.kernels.activation_forward(x, None, out, None, number)
    wide = x.double().requires_grad_()
    want = wide.clone() if activation == "none" else EXACT[activation](wide)
    saved = out if activation in ("relu", "sigmoid", "tanh") else x
    ones = torch.ones_like(x)
    native.kernels.activation_backward(ones, saved, grad, None, number)
    (slope,) = torch.autograd.grad(want.sum(), wide)
    eps = torch.finfo(dtype).eps
    # gelu's tail is e to a number of that many ulp; a slope may be the difference of two terms.
    tail = 0.5 * wide.detach().square() if activation == "gelu" else 0.0
    limit = want.detach().abs() * eps * (8 + tail) + 1e-30
    assert ((out.double() - want.detach()).abs() <= limit).all()
    if saved is out:
        slope = slope_of_output(activation, out.double(), slope)
    torch.testing.assert_close(grad.double(), slope, rtol=8 * eps, atol=4 * eps)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize(("size", "stride", "dilation"), [(3, 1, 1), (5, 2, 1), (3, 2, 3)])
def test_bands_of_a_depthwise_gradient(
    size: int, stride: int, dilation: int, layout: torch.memory_format
) -> None:
    """Images so wide that a band holds a few of their rows only; integers, so nothing rounds."""
    options = {"padding": 2, "stride": stride, "dilation": dilation, "groups": 40}
    shapes = ((2, 40, 61, 240), (40, 1, size, size))
    leaves = [torch.randint(-2, 3, s).float().to(memory_format=layout) for s in shapes]
    leaves = [t.requires_grad_() for t in (*leaves, torch.randint(-2, 3, (40,)).float())]
    out = bigops.conv2d_act(*leaves, **options)
    want = F.relu(F.conv2d(*leaves, **options))
    grad = torch.randint(-2, 3, out.shape).float().to(memory_format=layout)
    assert torch.equal(out, want)
    for got, right in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True
    ):
        assert torch.equal(got, right)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize(
    ("image", "filters", "stride"),
    [
        ((2, 40, 15, 23), 140, [1, 1]),
        ((3, 140, 7, 7), 70, [1, 1]),
        ((2, 17, 9, 34), 33, [2, 3]),
        ((2, 17, 9, 34), 5, [1, 2]),
        ((2, 3, 9, 1), 5, [2, 2]),
        ((5, 3, 1, 1), 2, [1, 1]),
        ((1, 1, 70, 4), 1, [1, 1]),
    ],
)
def test_filters_of_one_pixel(
    image: tuple[int, ...],
    filters: int,
    stride: list[int],
    layout: torch.memory_format,
    dtype: torch.dtype,
) -> None:
    """Of integers, so nothing rounds before the end; several tiles, panels and chains of sums."""

    def draw(*shape: int) -> torch.Tensor:
        return laid_out(torch.randint(-2, 3, shape).to(dtype), layout)

    input, weight = draw(*image), draw(filters, image[1], 1, 1)
    bias = torch.randint(-2, 3, (filters,)).to(dtype)
    exact = [t.double().requires_grad_() for t in (input, weight, bias)]
    sums = F.conv2d(*exact, stride)
    residual, grad_out = draw(*sums.shape), draw(*sums.shape)
    added = residual.double().requires_grad_()
    want = F.relu(sums + added)
    sizes = (stride, [0, 0], [1, 1], 1)
    out, pre = torch.full_like(residual, math.nan), torch.full_like(residual, math.nan)
    native.kernels.conv2d_pointwise_forward(
        input, weight, bias, residual, out, pre, *sizes, NUMBERS["relu"]
    )
    assert torch.equal(out, want.to(dtype))
    assert torch.equal(pre, (sums + added).to(dtype))
    grads = [torch.full_like(t, math.nan) for t in (input, weight, bias, residual)]
    native.kernels.conv2d_pointwise_backward(
        grad_out, input, weight, out, *grads, *sizes, NUMBERS["relu"]
    )
    right = torch.autograd.grad(want, [*exact, added], grad_out.double())
    for got, exactly in zip(grads, right, strict=True):
        assert torch.equal(got, exactly.to(dtype))


def exact_gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * torch.special.erfc(-x * 0.5**0.5)


def slope_of_output(activation: str, y: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """The slope at the output as it was rounded."""
    return {"sigmoid": y * (1 - y), "tanh": 1 - y * y}.get(activation, slope)


EXACT = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": exact_gelu,
    "silu": F.silu,
}


def test_one_dimension() -> None:
    sound, weight = torch.randn(2, 4, 41), torch.randn(6, 2, 5, requires_grad=True)
    bias, added = torch.randn(6), torch.randn(2, 6, 20)
    options = {"stride": 2, "padding": 1, "groups": 2}
    got = bigops.conv1d_act(sound, weight, bias, **options, activation="silu", residual=added)
    want = F.silu(F.conv1d(sound, weight, bias, **options) + added)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(out.sum(), weight)[0] for out in (got, want)]
    torch.testing.assert_close(*grads)
    same = bigops.conv1d_act(sound[0], weight, padding="same", dilation=2, groups=2)
    torch.testing.assert_close(
        same, F.relu(F.conv1d(sound[0], weight, padding="same", dilation=2, groups=2))
    )
    for name, change in (
        ("input", {"input": sound[None]}),
        ("weight", {"weight": weight[None]}),
        ("stride", {"stride": (1, 2)}),
        ("padding", {"padding": 1.0}),
        ("residual", {"residual": added[0]}),
    ):
        with pytest.raises(ValueError, match=rf"^{name}\b"):
            bigops.conv1d_act(**{"input": sound, "weight": weight, "groups": 2} | change)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("input", {"input": torch.randn(3, 3)}),
        ("input", {"input": torch.randn(1, 4, 8, 8)}),
        ("weight", {"weight": torch.randn(4, 3, 3)}),
        ("weight", {"weight": torch.randn(4, 3, 3, 3, dtype=torch.float64)}),
        ("weight", {"weight": torch.randn(4, 3, 11, 3)}),
        ("bias", {"bias": torch.randn(3)}),
        ("bias", {"bias": torch.randn(4, 1)}),
        ("stride", {"stride": 0}),
        ("stride", {"stride": (1, 2, 3)}),
        ("padding", {"padding": -1}),
        ("padding", {"padding": "some"}),
        ("padding", {"padding": "same", "stride": 2}),
        ("dilation", {"dilation": (1, 0)}),
        ("groups", {"groups": 3}),
        ("activation", {"activation": "swish"}),
        ("residual", {"residual": torch.randn(1, 4, 8, 8)}),
        ("residual", {"residual": torch.randn(1, 4, 6, 6, dtype=torch.float64)}),
    ],
)
def test_bad_arguments_are_named(name: str, change: dict[str, object]) -> None:
    call = {"input": torch.randn(1, 3, 8, 8), "weight": torch.randn(4, 3, 3, 3)} | change
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        bigops.conv2d_act(**call)
    with pytest.raises(RuntimeError):
        bigops.conv2d_act(**call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (9, 56), (24, 24)])
def test_gradient_of_relu_in_planes(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Planes in one piece, of any length, are masked as torch's threshold does; so is the bias."""
    grad = torch.randn(3, 5, *size, dtype=dtype)
    out = torch.randn(3, 5, *size, dtype=dtype).relu()
    out[1, 2, 0, 0] = float("nan")
    got, bias = torch.full_like(grad, float("nan")), torch.full((5,), float("nan"), dtype=dtype)
    native.kernels.activation_backward(grad, out, got, bias, NUMBERS["relu"])
    want = torch.where(out <= 0, 0, grad)
    assert torch.equal(got, want)
    exact = want.double().sum((0, 2, 3))
    summed = check.compare("bias", bias, want.sum((0, 2, 3)), exact)
    assert summed.ok, summed


ONEDNN_FAILS = {
    "a dilated kernel of one pixel crashes": ((2, 64, 16, 1), (64, 64, 5, 1), (2, (0, 1), 2)),
    "windows that all miss the image crash": ((2, 64, 1, 15), (64, 64, 2, 5), (1, 1, 2)),
    "a window beside the image overruns": (
        (2, 64, 32, 14),
        (16, 64, 1, 7),
        ((3, 1), (0, 7), (1, 2)),
    ),
    "a single column": ((20, 1, 33, 1), (4, 1, 11, 11), ((1, 3), 5, 1)),
    "rows apart": ((3, 32, 8, 32), (64, 16, 3, 2), ((4, 1), 0, (1, 3))),
    "dilated rows, depthwise": ((3, 12, 32, 33), (12, 1, 3, 3), (1, 0, (3, 1))),
    "dilated rows": ((3, 34, 16, 33), (34, 17, 5, 2), (1, 0, (2, 1))),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("image", "filters", "sizes"), ONEDNN_FAILS.values(), ids=ONEDNN_FAILS)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_what_onednn_fails_at(
    image: tuple[int, ...],
    filters: tuple[int, ...],
    sizes: tuple[object, ...],
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> None:
    """Exact sums of integers, so that nothing rounds, also where torch's are wrong or crash.

    Several times: it depends on what lies where oneDNN should not read.
    """
    call = (None, *sizes, image[1] // filters[1])
    for _ in range(5):
        leaves = [torch.randint(-1, 2, s).to(dtype, memory_format=layout) for s in (image, filters)]
        wide = [t.double().requires_grad_() for t in leaves]
        out = bigops.conv2d_relu(*(t.requires_grad_() for t in leaves), *call)
        want = F.relu(F.conv2d(*wide, *call))
        assert torch.equal(out.double(), want)
        grads = torch.autograd.grad(out.sum(), leaves)
        for got, exact in zip(grads, torch.autograd.grad(want.sum(), wide), strict=True):
            assert torch.equal(got, exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_that_torch_misreads(dtype: torch.dtype) -> None:
    """Groups' filters, one pixel wide, rows and channels swapped in memory: taken for others."""
    image = torch.randint(-1, 2, (2, 64, 9, 1)).to(dtype).to(memory_format=torch.channels_last)
    weight = torch.randint(-1, 2, (64, 32, 5, 1)).to(dtype)
    swapped = weight.transpose(1, 2).contiguous().transpose(1, 2)
    results = []
    for filters in (weight, swapped):
        leaves = [image.detach().requires_grad_(), filters.detach().requires_grad_()]
        out = bigops.conv2d_relu(*leaves, groups=2)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
