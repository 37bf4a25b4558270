"""Convolutions, the models of them and the optimizers on a CPU beside the best of PyTorch:

    python -m bigops.bench.cnn_goals [WORD]                  # lines with WORD in their name
    python -m bigops.bench.cnn_goals [WORD] --convolutions   # the set of convolutions instead
    ... --no-compile                                         # without torch.compile's minutes

What a line says is in goals.py; all are forward + backward, or a whole step. PyTorch gets what a
user would write: eager and compiled, of inputs laid out as the line says, and where these are
contiguous also with channels_last inside the call. A line of the set tells who served it too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

import bigops
from bigops import optim
from bigops.bench import models
from bigops.bench.cases import COMPILE, EAGER, OURS
from bigops.bench.goals import Call, Contestants, Goal, head, line
from bigops.bench.models import CHANNELS_LAST, FUSED
from bigops.bench.records import torch_times
from bigops.ops.adam_cases import LAYER

FLOAT, BFLOAT = torch.float32, torch.bfloat16
CONTIGUOUS, INSIDE = "contiguous", "channels_last inside"
LAYOUTS = (CONTIGUOUS, CHANNELS_LAST)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m bigops.bench.cnn_goals")
    parser.add_argument("word", nargs="?", default="", help="only lines with this in their name")
    parser.add_argument("--convolutions", action="store_true", help="the set of convolutions")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    given = parser.parse_args()
    head()
    for dtype, (name, ours, theirs) in convolutions() if given.convolutions else goals():
        if given.word not in name:
            continue
        call, others = ours(), theirs()
        if given.no_compile:
            others.pop(COMPILE, None)
        line(name, dtype, call, others, said=served(call) if given.convolutions else "")


def goals() -> Iterator[tuple[torch.dtype, Goal]]:
    """(dtype, (name, ours, PyTorch's)); built when they are asked for."""
    yield FLOAT, _model("CNN step, 256 x 1x28x28, SGD", models.cnn())
    yield BFLOAT, _model("CNN step, bf16 autocast", models.cnn(autocast=BFLOAT))
    yield FLOAT, _model("ResNet18 step, 16 x 3x64x64, SGD", models.resnet18())
    pooled, rectified = (bigops.conv2d_relu_max_pool2d, _pooled), (bigops.conv2d_relu, _rectified)
    for layout in LAYOUTS:
        image = (64, 1, 28, 28)
        yield FLOAT, _conv("1->32 3x3 + ReLU + pool, 64x28x28", layout, *pooled, image, 32)
        image = (64, 32, 14, 14)
        yield FLOAT, _conv("32->64 3x3 + ReLU + pool, 64x14x14", layout, *pooled, image, 64)
        image, name = (16, 64, 56, 56), "3x3 + ReLU, 16x56x56"
        yield FLOAT, _conv(f"64->64 {name}", layout, *rectified, image, 64)
        yield FLOAT, _conv(f"64 depthwise {name}", layout, *rectified, image, 64, groups=64)
        yield FLOAT, _pool("max_pool2d 2x2, 64x64x56x56", layout, (64, 64, 56, 56))
    shapes = LAYER * 6
    yield FLOAT, _step("AdamW, 14.2M parameters in 48 tensors", "AdamW", shapes)
    yield FLOAT, _step("clip + AdamW, 14.2M parameters", "AdamW", shapes, max_grad_norm=1.0)
    yield FLOAT, _step("AdamW, 1000 tensors of 1000", "AdamW", [(1000,)] * 1000)
    yield FLOAT, _step("AdamW with int8 states, 14.2M", "AdamW", shapes, state_dtype="int8")
    yield FLOAT, _step("SGD momentum, 14.2M parameters", "SGD", shapes, momentum=0.9)


# Batch, channels, side -> filters, kernel; stride, groups.
FIRST = [
    (64, 1, 28, 32, 3, 1, 1),
    (16, 3, 32, 32, 3, 1, 1),
    (8, 3, 112, 32, 3, 2, 1),
    (4, 3, 224, 64, 7, 2, 1),
]
RESNET50 = [
    (4, 64, 56, 64, 1, 1, 1),
    (4, 64, 56, 64, 3, 1, 1),
    (4, 64, 56, 256, 1, 1, 1),
    (4, 256, 56, 64, 1, 1, 1),
    (4, 256, 56, 128, 1, 1, 1),
    (4, 128, 56, 128, 3, 2, 1),
    (4, 256, 56, 512, 1, 2, 1),
    (4, 128, 28, 512, 1, 1, 1),
    (4, 512, 28, 128, 1, 1, 1),
    (4, 128, 28, 128, 3, 1, 1),
    (4, 256, 28, 256, 3, 2, 1),
    (4, 256, 14, 1024, 1, 1, 1),
    (4, 256, 14, 256, 3, 1, 1),
    (4, 512, 14, 512, 3, 2, 1),
    (4, 512, 7, 2048, 1, 1, 1),
    (4, 512, 7, 512, 3, 1, 1),
]
OTHERS = [
    (16, 64, 56, 64, 3, 1, 64),
    (16, 96, 56, 96, 3, 2, 96),
    (16, 128, 14, 128, 5, 1, 128),
    (16, 32, 28, 64, 5, 2, 1),
    (16, 17, 28, 33, 3, 1, 1),
    (8, 45, 19, 61, 3, 2, 1),
    (16, 30, 28, 50, 1, 1, 1),
    (16, 64, 28, 64, 3, 1, 4),
]


def convolutions() -> Iterator[tuple[torch.dtype, Goal]]:
    """With a ReLU, in both layouts."""
    for sizes in (*FIRST, *RESNET50, *OTHERS):
        batch, channels, side, filters, kernel, stride, groups = sizes
        grouped = f", {groups} groups" if groups > 1 else ""
        name = f"{batch}x{channels}x{side}x{side}->{filters} {kernel}x{kernel}/{stride}{grouped}"
        image = (batch, channels, side, side)
        how = {"kernel": kernel, "stride": stride, "groups": groups}
        for layout in LAYOUTS:
            yield (
                FLOAT,
                _conv(name, layout, bigops.conv2d_relu, _rectified, image, filters, **how),
            )


def served(call: Call) -> str:
    """Who computed a call: the share of torch's kernels in its time, and the longest of them."""
    found = torch_times(lambda _: call())
    if found is None:
        return "no profile"
    whole, kernels = found
    share = min(1.0, sum(kernels.values()) / whole)
    if share < 0.01:
        return "own kernels"
    return f"torch {share:.0%}, most in {max(kernels, key=lambda name: kernels[name])}"


def _rectified(*args: Any, **kwargs: Any) -> Tensor:
    return F.relu(F.conv2d(*args, **kwargs))


def _pooled(*args: Any, **kwargs: Any) -> Tensor:
    return F.max_pool2d(_rectified(*args, **kwargs), 2)


def _conv(
    name: str,
    layout: str,
    function: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    image: tuple[int, int, int, int],
    filters: int,
    *,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
) -> Goal:
    kwargs = {"stride": stride, "padding": kernel // 2, "groups": groups}
    weight = torch.randn(filters, image[1] // groups, kernel, kernel)
    weight = weight * (weight[0].numel() ** -0.5)
    tensors = [*(_as(layout, t) for t in (torch.randn(image), weight)), torch.randn(filters)]
    for which, t in enumerate(tensors):
        # Images of few channels are a network's input, which has no gradient.
        t.requires_grad_(which > 0 or image[1] > 3)

    def inside(input: Tensor, weight: Tensor, bias: Tensor, **kwargs: Any) -> Tensor:
        out = eager(_as(CHANNELS_LAST, input), _as(CHANNELS_LAST, weight), bias, **kwargs)
        return out.contiguous()

    def run(call: Callable[..., Tensor]) -> Call:
        return _both_ways(call, tensors, kwargs)

    def theirs() -> Contestants:
        found = {EAGER: run(eager), COMPILE: run(torch.compile(eager, dynamic=False))}
        return found if layout == CHANNELS_LAST else found | {INSIDE: run(inside)}

    return f"{name}, {layout}", lambda: run(function), theirs


def _pool(name: str, layout: str, image: tuple[int, int, int, int]) -> Goal:
    input = _as(layout, torch.randn(image)).requires_grad_()

    def run(call: Callable[..., Tensor]) -> Call:
        return _both_ways(call, [input], {"kernel_size": 2})

    def theirs() -> Contestants:
        compiled = torch.compile(F.max_pool2d, dynamic=False)
        return {EAGER: run(F.max_pool2d), COMPILE: run(compiled)}

    return f"{name}, {layout}", lambda: run(bigops.max_pool2d), theirs


def _as(layout: str, t: Tensor) -> Tensor:
    last = layout == CHANNELS_LAST
    return t.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _both_ways(
    function: Callable[..., Tensor], tensors: list[Tensor], kwargs: dict[str, Any]
) -> Call:
    """Forward and backward of `function`."""
    wanted = [t for t in tensors if t.requires_grad]
    out = function(*tensors, **kwargs)
    grad_out = torch.empty_like(out).normal_()

    def call() -> Any:
        return torch.autograd.grad(function(*tensors, **kwargs), wanted, grad_out)

    return call


def _model(name: str, setting: models.Setting) -> Goal:
    def run(contestant: str) -> Call:
        step = models.ModelCase(setting, "cpu").runner(contestant)
        turn = iter(range(10**9))
        return lambda: step(next(turn))

    def theirs() -> Contestants:
        return {who: run(who) for who in (EAGER, *setting.peers, COMPILE)}

    return name, lambda: run(OURS), theirs


def _step(name: str, kind: str, shapes: list[tuple[int, ...]], **options: Any) -> Goal:
    """An optimizer's step; ours takes `options`, torch what it has of them."""
    clip = options.get("max_grad_norm")
    known = {k: v for k, v in options.items() if k not in ("max_grad_norm", "state_dtype")}

    def run(module: Any, **more: Any) -> Call:
        params = [torch.randn(shape).requires_grad_() for shape in shapes]
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer = getattr(module, kind)(params, lr=1e-3, **more)
        if clip is None or module is optim:
            return lambda: optimizer.step()

        def clipped() -> None:
            clip_grad_norm_(params, clip, foreach=True if "fused" in more else None)
            optimizer.step()

        return clipped

    def theirs() -> Contestants:
        return {
            "default": run(torch.optim, **known),
            FUSED: run(torch.optim, fused=True, **known),
            "foreach": run(torch.optim, foreach=True, **known),
        }

    return name, lambda: run(optim, **options), theirs


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
