"""Triton's convolutions that read boxes of pixels by descriptors: right at every border, and taken
where they can be.

Interpreted, in a process of their own (tests/interpreter.py); that the compiled ones load by the
tensor memory accelerator is in test_ledger.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bigops
from bigops import check

pytest.importorskip("triton")

from bigops.kernels import conv2d, conv2d_weight, hardware
from bigops.kernels.conv2d_boxes import BY_POINTERS, Box, box_for, choose, in_one_row, legal_strides

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="needs the interpreter: test_interpreted runs it"
)


def drawn(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).bfloat16().contiguous(memory_format=torch.channels_last)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Each product launched, and whether it is by boxes."""
    found: list[tuple[str, bool]] = []
    for module in (conv2d, conv2d_weight):

        def launch(kernel: Any, *args: Any, launch: Any = module.launch, **meta: Any) -> None:
            if "BOX_W" in meta:
                found.append((kernel.fn.__name__, meta["BOX_W"] > 0))
            launch(kernel, *args, **meta)

        monkeypatch.setattr(module, "launch", launch)
    return found


def eager(image: Tensor, weight: Tensor, bias: Tensor, pooled: bool, **sizes: Any) -> Tensor:
    out = F.relu(F.conv2d(image, weight, bias, **sizes))
    return F.max_pool2d(out, 2) if pooled else out


def ours(image: Tensor, weight: Tensor, bias: Tensor, pooled: bool, **sizes: Any) -> Tensor:
    function = bigops.conv2d_relu_max_pool2d if pooled else bigops.conv2d_relu
    return function(image, weight, bias, **sizes)


def step(function: Any, inputs: list[Tensor], grad: Tensor, **sizes: Any) -> list[Tensor]:
    leaves = [t.to(grad.dtype).detach().requires_grad_() for t in inputs]
    with bigops.use_backend("triton"):
        out = function(*leaves, **sizes)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


BOTH = ["conv_kernel", "weight_grad_kernel"]
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3x3": ((3, 72, 9, 17), (40, 72, 3, 3), {"padding": 1}),
    "1x1": ((2, 72, 9, 7), (136, 72, 1, 1), {}),
    "1x1, stride 2": ((2, 64, 9, 6), (24, 64, 1, 1), {"stride": 2}),
    "dilation": ((2, 64, 9, 10), (24, 64, 3, 2), {"padding": (0, 2), "dilation": 2}),
    "groups": ((2, 128, 7, 9), (48, 64, 3, 3), {"padding": 1, "groups": 2}),
    "one pixel": ((5, 64, 1, 1), (16, 64, 3, 3), {"padding": 1}),
    "stride": ((2, 64, 11, 14), (24, 64, 5, 2), {"padding": 2, "stride": (2, 3)}),
    "3x3, pooled": ((2, 64, 13, 11), (40, 64, 3, 3), {"padding": 1}),
    "1x1, pooled": ((2, 64, 9, 10), (16, 64, 1, 1), {}),
}


@interpreted
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("name", CASES)
def test_boxes_meet_every_border(name: str, launched: list[tuple[str, bool]]) -> None:
    """Sizes that no box divides, channels and filters that no tile does."""
    image, weight, sizes = CASES[name]
    sizes = {"pooled": "pooled" in name, **sizes}
    scale = (weight[1] * weight[2] * weight[3]) ** -0.5
    inputs = [drawn(*image), drawn(*weight, scale=scale), torch.randn(weight[0]).bfloat16()]
    grad = drawn(*eager(*inputs, **sizes).shape)
    got = step(ours, inputs, grad, **sizes)
    described = {kernel for kernel, boxes in launched if boxes}
    # With a stride, forward meets every stride-th pixel and its data gradient does not.
    assert launched[0] == ("conv_kernel", name != "stride")
    assert described == set(BOTH)
    other, right = (step(eager, inputs, t, **sizes) for t in (grad, grad.double()))
    for what, *three in zip(("out", "input", "weight", "bias"), got, other, right, strict=True):
        found = check.compare(what, *three)
        assert found.ok, found


@interpreted
@pytest.mark.parametrize(("size", "padding"), [(7, 0), (1, 1)])
def test_what_no_tap_meets_may_be_infinite(size: int, padding: int) -> None:
    """Pixels of a box that lie beyond the output's: a tap's gradient does not see them."""
    inputs = [drawn(2, 64, size, size), drawn(16, 64, 3, 3), torch.randn(16).bfloat16()]
    inputs[0][:, :, -1] = inputs[0][:, :, :, -1] = torch.inf
    grad = drawn(2, 16, size - 2 + 2 * padding, size - 2 + 2 * padding)
    options = {"pooled": False, "padding": padding}
    got = step(ours, inputs, grad, **options)[2].isfinite()
    want = step(eager, inputs, grad.double(), **options)[2].isfinite()
    assert torch.equal(got, want)
    assert want.any()
    assert not want.all()


@interpreted
def test_an_activation_and_a_residual(launched: list[tuple[str, bool]]) -> None:
    inputs = [drawn(2, 64, 9, 7), drawn(40, 64, 1, 1, scale=0.125), torch.randn(40).bfloat16()]
    inputs.append(drawn(2, 40, 9, 7))

    def call(*tensors: Tensor) -> Tensor:
        return bigops.conv2d_act(*tensors[:3], activation="silu", residual=tensors[3])

    def plain(*tensors: Tensor) -> Tensor:
        return F.silu(F.conv2d(*tensors[:3]) + tensors[3])

    grad = drawn(2, 40, 9, 7)
    got = step(call, inputs, grad)
    assert [boxes for _, boxes in launched] == [True] * 3
    for three in zip(
        got, step(plain, inputs, grad), step(plain, inputs, grad.double()), strict=True
    ):
        found = check.compare("", *three)
        assert found.ok, found


@pytest.mark.skipif(INTERPRETED, reason="it is what starts this session")
@pytest.mark.beside(["-q", str(Path(__file__))], 16)
def test_interpreted(beside: list[str]) -> None:
    """The session has passed."""
    assert beside


# ---- which box, and whether ----

SM_90 = hardware.Hardware("sm_90", 132, 227 << 10)


def test_boxes_are_full_where_sizes_allow_it() -> None:
    for sizes, box in {
        (32, 56, 56): Box(2, 8, 8),
        (32, 28, 28): Box(8, 4, 4),
        (64, 14, 14): Box(32, 2, 2),
        (128, 7, 7): Box(128, 1, 1),
        (1, 1, 100352): Box(1, 1, 128),
        (1, 64, 64): Box(1, 8, 16),
    }.items():
        assert box_for(128, *sizes) == box
        assert box.tiles(*sizes) * 128 == sizes[0] * sizes[1] * sizes[2]


def test_what_is_read_by_boxes() -> None:
    x = drawn(2, 64, 24, 24)

    def box(*tensors: Tensor | None, steps: int = 9, precision: str = "ieee", **kwargs: Any) -> Box:
        sizes = kwargs.get("sizes", (2, 24, 24))
        return choose(128, steps, sizes, precision, tensors, kwargs.get("pitches", ()))

    memory = torch.empty(x.numel() + 1).bfloat16()[1:]
    with hardware.pretend(SM_90):
        assert box(x, None, x[:, :32]) == Box(2, 8, 8)
        assert box(x[:, :, ::2, 1::3], x[:, 8:]) != BY_POINTERS
        assert box(x.float(), precision="tf32") != BY_POINTERS
        assert box(drawn(5, 64, 1, 1).contiguous()) != BY_POINTERS
        assert box(x, pitches=(24,)) != BY_POINTERS
        for other in (
            x.contiguous(),
            x[:, 1:],  # from an odd element on
            memory.as_strided(x.shape, x.stride()),
            drawn(2, 20, 24, 24),  # whose pixels are 40 bytes
            x[:, :, :1].expand(2, 64, 24, 24),
            x[:0],
        ):
            assert box(other) == box(x, other) == BY_POINTERS
        assert box(x.float()) == BY_POINTERS  # of IEEE products
        assert box(x, pitches=(20,)) == BY_POINTERS
        assert box(x, steps=3) == BY_POINTERS
        assert box(x, sizes=(1, 17, 17)) == BY_POINTERS  # more than half of each box is empty
    for arch, has in (("sm_86", False), ("sm_100", True), ("gfx942", False)):
        with hardware.pretend(hardware.Hardware(arch, 1, 1 << 20)):
            assert (box(x) != BY_POINTERS) == has


def test_strides_of_single_rows_are_legal() -> None:
    assert legal_strides(drawn(1, 24, 1, 5)) == [16, 1, 16, 24]
    assert legal_strides(torch.empty(3, 1, 2, 2)) == [4, 4, 2, 1]


def test_pixels_in_one_row() -> None:
    x = drawn(3, 24, 4, 5)
    for images in ((x, None, x[:, 8:]), (x[:, :, ::2, :1],), (x[:1, :, 1:],)):
        rows = in_one_row(*images)
        for image, row in zip(images, rows, strict=True):
            assert (image is None) == (row is None)
            if image is not None and row is not None:
                assert row.shape == (1, image.shape[1], 1, image.numel() // image.shape[1])
                assert torch.equal(row[0, :, 0], image.transpose(0, 1).flatten(1))
                assert row.data_ptr() == image.data_ptr()
    strided = x[:, :, ::2]
    assert in_one_row(x, strided)[1] is strided
    assert in_one_row(strided, strided)[0] is strided
    # Of more elements than 32 bits count, in memory that nobody touches.
    huge = torch.empty(1 << 9, 8, 1 << 10, 1 << 9, memory_format=torch.channels_last, device="meta")
    assert in_one_row(huge)[0] is huge
