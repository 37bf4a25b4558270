"""Samples, eager baselines and costs of conv2d_act and conv2d_relu_max_pool2d."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference.conv2d_act import ACTIVATIONS
from .activation import OF_INPUT
from .conv2d_arguments import (
    Size,
    conv_arguments,
    conv_sizes,
    output_shape,
    pool_arguments,
    pooled_sizes,
)
from .declare import Call, Cost, Sample


def act_eager(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *args: Any,
    activation: str | None = "relu",
    residual: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """conv2d_act of torch's functions."""
    out = F.conv2d(input, weight, bias, *args, **kwargs)
    if residual is not None:
        out = out + residual
    return out if activation in (None, "none") else ACTIVATIONS[activation](out)


def pool_eager(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *args: Any,
    pool_kernel_size: Any = 2,
    pool_stride: Any = None,
    pool_padding: Any = 0,
    **kwargs: Any,
) -> Tensor:
    """conv2d_relu_max_pool2d of torch's functions."""
    out = F.relu(F.conv2d(input, weight, bias, *args, **kwargs))
    return F.max_pool2d(out, pool_kernel_size, pool_stride, pool_padding)


def conv_cost(
    passes: str,
    input: Tensor,
    weight: Tensor,
    out: int,
    sizes: Sequence[int],
) -> Cost:
    """Products and bytes of a convolution of `sizes` whose result keeps `out` elements."""
    pixels = input.shape[0] * sizes[0] * sizes[1]
    forward = 2.0 * pixels * weight.numel()
    moved = float(input.element_size() * (input.numel() + weight.numel() + out))
    if passes == "forward":
        return Cost(forward, moved)
    backward = 2.0 if input.requires_grad else 1.0
    return Cost((1.0 + backward) * forward, 3.0 * moved)


def act_cost(
    passes: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    activation: str | None = "relu",
    residual: Tensor | None = None,
) -> Cost:
    """conv2d_act's. What is kept of the activation and a residual count as an output each."""
    call = conv_arguments(input, weight, bias, stride, padding, dilation, groups)
    sizes = conv_sizes(call[0], weight, *call[3:6])
    out = input.shape[0] * weight.shape[0] * sizes[0] * sizes[1]
    kept = activation in OF_INPUT and passes != "forward"
    return conv_cost(passes, input, weight, out * (1 + kept + (residual is not None)), sizes)


def pool_cost(
    passes: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    pool_kernel_size: Size = 2,
    pool_stride: Size | None = None,
    pool_padding: Size = 0,
) -> Cost:
    """conv2d_relu_max_pool2d's."""
    conv = conv_arguments(input, weight, bias, stride, padding, dilation, groups)
    pool = pool_arguments(conv, pool_kernel_size, pool_stride, pool_padding)
    sizes = conv_sizes(conv[0], weight, *conv[3:6])
    rows, columns = pooled_sizes(sizes, *pool)
    return conv_cost(
        passes, input, weight, input.shape[0] * weight.shape[0] * rows * columns, sizes
    )


def conv_sample(
    name: str,
    image: tuple[int, int, int, int],
    weight: tuple[int, int, int, int],
    *,
    bias: bool = True,
    bias_step: int = 1,
    channels_last: bool = False,
    input_grad: bool = True,
    bench: bool = False,
    gradcheck: bool = False,
    dtypes: tuple[torch.dtype, ...] = (),
    residual: bool = False,
    **kwargs: Any,
) -> Sample:
    """A sample call whose outputs have the spread of its inputs."""

    def make(device: str, dtype: torch.dtype) -> Call:
        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(shape, device=device, dtype=dtype) * scale
            if channels_last and len(shape) == 4:
                drawn = torch.empty_like(drawn, memory_format=torch.channels_last).copy_(drawn)
            return drawn

        taps = weight[1] * weight[2] * weight[3]
        args = [
            draw(*image).requires_grad_(input_grad),
            draw(*weight, scale=taps**-0.5).requires_grad_(),
        ]
        if bias:
            drawn = draw(weight[0] * bias_step)
            if bias_step > 1:
                drawn = drawn[::bias_step].detach()
            args.append(drawn.requires_grad_())
        given = dict(kwargs)
        if residual:
            sizes = {n: v for n, v in kwargs.items() if n != "activation"}
            given["residual"] = draw(*output_shape(args[0], args[1], **sizes)).requires_grad_()
        return tuple(args), given

    return Sample(name, make, bench=bench, gradcheck=gradcheck, dtypes=dtypes)


ACT_SAMPLES = (
    conv_sample("gradcheck", (2, 2, 5, 4), (3, 2, 3, 2), padding=1, gradcheck=True),
    conv_sample(
        "gradcheck, stride 2", (1, 4, 5, 6), (4, 2, 2, 3), stride=2, groups=2, gradcheck=True
    ),
    conv_sample("one element", (1, 1, 1, 1), (1, 1, 1, 1)),
    conv_sample("no bias", (2, 3, 8, 9), (5, 3, 3, 3), bias=False),
    conv_sample("padded", (2, 4, 9, 7), (17, 4, 3, 3), padding=1),
    conv_sample("one channel", (3, 1, 12, 11), (32, 1, 3, 3), padding=1),
    conv_sample("5x5 stride 2", (2, 3, 15, 16), (33, 3, 5, 5), stride=2, padding=2),
    conv_sample("stem 7x7 stride 2", (1, 3, 20, 22), (16, 3, 7, 7), stride=2, padding=3),
    conv_sample("11x11 stride 4", (1, 3, 27, 27), (8, 3, 11, 11), stride=4, padding=2),
    conv_sample("1x1", (2, 20, 6, 5), (40, 20, 1, 1)),
    conv_sample("1x1 stride 2", (2, 20, 7, 5), (24, 20, 1, 1), stride=2),
    conv_sample("dilation", (1, 6, 14, 13), (10, 6, 3, 3), padding=2, dilation=2),
    conv_sample(
        "uneven", (1, 2, 13, 10), (6, 2, 3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)
    ),
    conv_sample("groups", (2, 6, 9, 8), (9, 2, 3, 3), padding=1, groups=3),
    conv_sample("depthwise", (1, 12, 8, 8), (12, 1, 3, 3), padding=1, groups=12),
    conv_sample("same", (1, 3, 8, 9), (4, 3, 4, 3), padding="same"),
    conv_sample("channels_last", (2, 16, 10, 9), (32, 16, 3, 3), padding=1, channels_last=True),
    conv_sample("channels_last, one channel", (2, 1, 8, 8), (16, 1, 3, 3), channels_last=True),
    conv_sample("bias in steps", (2, 4, 9, 7), (17, 4, 3, 3), bias_step=2),
    conv_sample("one column, stride 3", (1, 6, 35, 9), (3, 2, 5, 7), stride=(4, 3), groups=3),
    conv_sample("no batch", (0, 3, 8, 8), (4, 3, 3, 3)),
    conv_sample("4096 elements", (2, 32, 16, 16), (64, 32, 3, 3), padding=1),
    *(
        conv_sample(
            f"{activation}, residual", (2, 20, 9, 11), (18, 20, 3, 3), padding=1,
            activation=activation, residual=True,
        )
        for activation in ("none", "relu", "sigmoid", "tanh", "gelu", "silu")
    ),
    *(
        conv_sample(
            f"{activation}, gradcheck", (1, 2, 5, 4), (2, 2, 3, 2), padding=1,
            activation=activation, residual=residual, gradcheck=True,
        )
        for activation, residual in (("sigmoid", False), ("tanh", True), ("gelu", True),
                                     ("silu", False), (None, True))
    ),
    conv_sample("gelu, channels_last", (2, 16, 10, 9), (32, 16, 3, 3), channels_last=True,
                activation="gelu"),
    conv_sample("silu, 4096 elements", (2, 32, 16, 16), (64, 32, 3, 3), padding=1,
                activation="silu"),
    conv_sample("none, no residual", (2, 32, 16, 16), (64, 32, 3, 3), padding=1,
                activation="none"),
    conv_sample("1x1, gradcheck", (2, 3, 4, 5), (4, 3, 1, 1), activation="gelu", residual=True,
                gradcheck=True),
    conv_sample("1x1, channels_last, stride 2, gradcheck", (2, 3, 5, 4), (4, 3, 1, 1), stride=2,
                channels_last=True, gradcheck=True),
    conv_sample("1x1, 4096 elements", (2, 40, 14, 14), (70, 40, 1, 1), activation="silu",
                residual=True),
    conv_sample("1x1, channels_last, 4096 elements", (5, 140, 9, 7), (20, 140, 1, 1),
                channels_last=True),
    conv_sample("depthwise, planes", (3, 5, 13, 22), (5, 1, 3, 3), padding=1, groups=5),
    conv_sample("depthwise, two filters each, stride 2", (2, 4, 15, 18), (8, 1, 5, 3), padding=2,
                stride=2, groups=4, activation="gelu", residual=True),
    conv_sample("depthwise, gradcheck", (2, 2, 11, 10), (4, 1, 3, 2), stride=(3, 1), groups=2,
                dilation=(1, 2), padding=(2, 1), activation="silu", residual=True,
                gradcheck=True),
    conv_sample("depthwise, channels_last", (2, 20, 9, 12), (20, 1, 3, 5), padding=1, groups=20,
                channels_last=True, activation="silu", residual=True),
    conv_sample("depthwise, channels_last, stride 2, gradcheck", (2, 3, 7, 8), (3, 1, 3, 2),
                padding=(1, 2), stride=(2, 3), dilation=(1, 2), groups=3, channels_last=True,
                activation="none", gradcheck=True),
    conv_sample("depthwise, 16x64x56x56", (16, 64, 56, 56), (64, 1, 3, 3), padding=1, groups=64,
                bench=True),
    conv_sample("16x64x56x56 -> 64", (16, 64, 56, 56), (64, 64, 3, 3), padding=1, bench=True),
    conv_sample(
        "64x1x28x28 -> 32", (64, 1, 28, 28), (32, 1, 3, 3), padding=1, input_grad=False, bench=True
    ),
)  # fmt: skip

POOL_SAMPLES = (
    conv_sample("gradcheck", (2, 2, 5, 4), (3, 2, 3, 2), padding=1, gradcheck=True),
    conv_sample(
        "gradcheck, overlapping windows",
        (1, 1, 6, 6),
        (3, 1, 3, 3),
        pool_kernel_size=3,
        pool_stride=1,
        gradcheck=True,
    ),
    conv_sample("one window", (1, 1, 2, 2), (1, 1, 1, 1)),
    conv_sample("no bias", (2, 3, 8, 9), (5, 3, 3, 3), bias=False),
    conv_sample("one channel", (3, 1, 12, 11), (32, 1, 3, 3), padding=1),
    conv_sample(
        "one channel, no gradient", (3, 1, 12, 12), (32, 1, 3, 3), padding=1, input_grad=False
    ),
    conv_sample("stem", (2, 3, 21, 23), (16, 3, 7, 7), stride=2, padding=3,
                pool_kernel_size=3, pool_stride=2, pool_padding=1),
    conv_sample("overlapping", (2, 5, 11, 12), (18, 5, 3, 3), padding=1,
                pool_kernel_size=3, pool_stride=2),
    conv_sample("stride 1 windows", (1, 4, 8, 8), (6, 4, 3, 3), pool_kernel_size=2, pool_stride=1),
    conv_sample("windows apart", (1, 4, 12, 13), (6, 4, 3, 3), pool_kernel_size=2, pool_stride=3),
    conv_sample("uneven windows", (1, 4, 12, 13), (6, 4, 3, 3), pool_kernel_size=(3, 2),
                pool_stride=(2, 1), pool_padding=(1, 0)),
    conv_sample("dilation", (1, 6, 14, 13), (10, 6, 3, 3), padding=2, dilation=2),
    conv_sample("groups", (2, 6, 9, 8), (9, 2, 3, 3), padding=1, groups=3),
    conv_sample("11x11 stride 4", (1, 3, 35, 35), (8, 3, 11, 11), stride=4, padding=2),
    conv_sample("channels_last", (2, 16, 10, 9), (32, 16, 3, 3), padding=1, channels_last=True),
    conv_sample("channels_last, one channel", (2, 1, 8, 8), (16, 1, 3, 3), channels_last=True),
    conv_sample("bias in steps", (2, 4, 9, 7), (17, 4, 3, 3), bias_step=2),
    conv_sample("one column, stride 3", (1, 6, 35, 9), (3, 2, 5, 7), stride=(4, 3), groups=3,
                pool_kernel_size=(2, 1)),
    conv_sample("no batch", (0, 3, 8, 8), (4, 3, 3, 3)),
    conv_sample("4096 elements", (2, 32, 16, 16), (64, 32, 3, 3), padding=1),
    conv_sample("64x1x28x28 -> 32", (64, 1, 28, 28), (32, 1, 3, 3), padding=1, input_grad=False,
                bench=True),
    conv_sample("64x32x14x14 -> 64", (64, 32, 14, 14), (64, 32, 3, 3), padding=1, bench=True),
    conv_sample("64x32x14x14 -> 64, channels_last", (64, 32, 14, 14), (64, 32, 3, 3), padding=1,
                channels_last=True, bench=True),
)  # fmt: skip


def _varied(device: str, *, batch: int | None = None, channels: int = 64, side: int = 56) -> Sample:
    """A 3x3 convolution that keeps the number of channels."""
    batch = batch or {"cpu": 16, "cuda": 64}[device]
    name = f"{batch}x{channels}x{side}x{side} -> {channels}"
    image, weight = (batch, channels, side, side), (channels, channels, 3, 3)
    return conv_sample(name, image, weight, padding=1, bench=True)


SWEEPS = {
    "N": lambda size, device: _varied(device, batch=size),
    "C": lambda size, device: _varied(device, channels=size),
    "HW": lambda size, device: _varied(device, side=size),
}
