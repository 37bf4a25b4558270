"""act(batch_norm(input) + residual) and its gradients.

A tensor is `images` times `size` pixels times channels; channels_last is one image of all pixels.
Training takes three launches: sums over a share of the pixels of some channels each, which are of
numbers from which an estimate of the channel's mean was taken (squares would lose the variance's
digits otherwise); the shares added in their order, in float64, and made into coefficients; and the
pass that normalises, adds and cuts off. Backward is the same with the sums of g and g * (x - mean),
g being the gradient where ReLU let a number pass. The first of its passes leaves g where the
residual's gradient goes, so that the second one reads neither the gradient nor the output again. No
atomics: equal bits run to run.

Ioffe and Szegedy 2015, "Batch normalization"; Chan, Golub and LeVeque 1983, "Algorithms for
computing the sample variance".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import hardware
from .launch import launch, made, replayed

SIZES = ["images", "size", "channels", "count", "splits"]
SAMPLED = tl.constexpr(4)  # numbers that the estimate of a mean is made of


@triton.jit
def _channels(channels, BLOCK_C: tl.constexpr):
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    return offs_c, offs_c < channels


@triton.jit
def _tile(
    chunk, offs_c, mask_c, size, stride_n, stride_c, stride_p,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Offsets of BLOCK_C channels of the chunk's BLOCK_P pixels; 64 bits for where it starts."""
    chunks = tl.cdiv(size, BLOCK_P)
    n, start = chunk // chunks, chunk % chunks * BLOCK_P
    base = n.to(tl.int64) * stride_n + start.to(tl.int64) * stride_p
    base += (tl.program_id(1) * BLOCK_C).to(tl.int64) * stride_c
    p, c = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    offs = base + (c[:, None] * stride_c + p[None, :] * stride_p)
    return offs, mask_c[:, None] & (start + p < size)[None, :]


@triton.jit
def _estimate(x_ptr, offs_c, mask_c, images, size, stride_n, stride_c, stride_p):
    """The mean of a few numbers of each channel, 0 where it is not finite."""
    total = tl.zeros(offs_c.shape, tl.float32)
    for k in tl.static_range(SAMPLED):
        n, p = images * k // SAMPLED, size * k // SAMPLED
        at = n.to(tl.int64) * stride_n + p.to(tl.int64) * stride_p
        x = tl.load(x_ptr + at + offs_c.to(tl.int64) * stride_c, mask=mask_c, other=0.0)
        total += x.to(tl.float32)
    total = total * (1.0 / SAMPLED)
    return tl.where(tl.abs(total) < float("inf"), total, 0.0)


@triton.jit(do_not_specialize=SIZES)
def statistics_kernel(
    x_ptr, sums_ptr, images, size, channels, splits, stride_n, stride_c, stride_p,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """sums (splits, 2, channels): of x - estimate and of its square."""
    offs_c, mask_c = _channels(channels, BLOCK_C)
    center = _estimate(x_ptr, offs_c, mask_c, images, size, stride_n, stride_c, stride_p)
    first = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    second = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for chunk in range(tl.program_id(0), images * tl.cdiv(size, BLOCK_P), splits):
        offs, mask = _tile(
            chunk, offs_c, mask_c, size, stride_n, stride_c, stride_p, BLOCK_C, BLOCK_P
        )
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        off = tl.where(mask, x - center[:, None], 0.0)
        first += off
        second += off * off
    row = sums_ptr + tl.program_id(0) * 2 * channels + offs_c
    tl.store(row, tl.sum(first, 1), mask=mask_c)
    tl.store(row + channels, tl.sum(second, 1), mask=mask_c)


@triton.jit
def _total(sums_ptr, offs_c, mask_c, channels, splits, BLOCK_C: tl.constexpr):
    first = tl.zeros((BLOCK_C,), tl.float64)
    second = tl.zeros((BLOCK_C,), tl.float64)
    for split in range(splits):
        row = sums_ptr + split * 2 * channels + offs_c
        first += tl.load(row, mask=mask_c, other=0.0).to(tl.float64)
        second += tl.load(row + channels, mask=mask_c, other=0.0).to(tl.float64)
    return first, second


@triton.jit
def _or_else(ptr, offs_c, mask_c, GIVEN: tl.constexpr, otherwise):
    if GIVEN:
        return tl.load(ptr + offs_c, mask=mask_c, other=0.0).to(tl.float64)
    return tl.zeros(offs_c.shape, tl.float64) + otherwise


@triton.jit(do_not_specialize=[*SIZES, "eps"])
def coefficients_kernel(
    x_ptr, sums_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, coefficients_ptr, eps,
    images, size, channels, splits, stride_n, stride_c, stride_p,
    TRAINING: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """coefficients (3, channels): out = (x - center) * scale + shift."""
    offs_c, mask_c = _channels(channels, BLOCK_C)
    if TRAINING:
        center = _estimate(x_ptr, offs_c, mask_c, images, size, stride_n, stride_c, stride_p)
        first, second = _total(sums_ptr, offs_c, mask_c, channels, splits, BLOCK_C)
        count = images.to(tl.float64) * size
        off = first / count
        mean = center.to(tl.float64) + off
        var = second / count - off * off
        var = tl.where(var < 0.0, 0.0, var)  # a NaN stays
        tl.store(mean_ptr + offs_c, mean.to(tl.float32), mask=mask_c)
        tl.store(var_ptr + offs_c, (var * (count / (count - 1.0))).to(tl.float32), mask=mask_c)
    else:
        mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float64)
        var = tl.load(var_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float64)
    scale = _or_else(weight_ptr, offs_c, mask_c, HAS_WEIGHT, 1.0) / tl.sqrt(var + eps)
    shift = _or_else(bias_ptr, offs_c, mask_c, HAS_BIAS, 0.0)
    lost = mean.to(tl.float32).to(tl.float64) - mean  # where the mean is rounded
    shift += tl.where(tl.abs(lost) < float("inf"), lost * scale, 0.0)
    row = coefficients_ptr + offs_c
    tl.store(row, mean.to(tl.float32), mask=mask_c)
    tl.store(row + channels, scale.to(tl.float32), mask=mask_c)
    tl.store(row + 2 * channels, shift.to(tl.float32), mask=mask_c)


@triton.jit
def _coefficient(ptr, number, offs_c, mask_c, channels):
    return tl.load(ptr + number * channels + offs_c, mask=mask_c, other=0.0)[:, None]


@triton.jit(do_not_specialize=SIZES)
def normalise_kernel(
    x_ptr, residual_ptr, coefficients_ptr, out_ptr,
    images, size, channels, stride_n, stride_c, stride_p,
    HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    offs_c, mask_c = _channels(channels, BLOCK_C)
    offs, mask = _tile(
        tl.program_id(0), offs_c, mask_c, size, stride_n, stride_c, stride_p, BLOCK_C, BLOCK_P
    )
    center = _coefficient(coefficients_ptr, 0, offs_c, mask_c, channels)
    scale = _coefficient(coefficients_ptr, 1, offs_c, mask_c, channels)
    shift = _coefficient(coefficients_ptr, 2, offs_c, mask_c, channels)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    out = (x - center) * scale + shift
    if HAS_RESIDUAL:
        out += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        out = tl.where(out < 0.0, 0.0, out)  # a NaN stays
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _passed(grad_ptr, out_ptr, offs, mask, RELU: tl.constexpr):
    g = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        out = tl.load(out_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        g = tl.where(out <= 0.0, 0.0, g)
    return g


@triton.jit(do_not_specialize=SIZES)
def grad_sums_kernel(
    grad_ptr, out_ptr, x_ptr, mean_ptr, grad_residual_ptr, sums_ptr,
    images, size, channels, splits, stride_n, stride_c, stride_p,
    RELU: tl.constexpr, NEEDS_RESIDUAL: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """sums (splits, 2, channels): of g and of g * (x - mean)."""
    offs_c, mask_c = _channels(channels, BLOCK_C)
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    first = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    second = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for chunk in range(tl.program_id(0), images * tl.cdiv(size, BLOCK_P), splits):
        offs, mask = _tile(
            chunk, offs_c, mask_c, size, stride_n, stride_c, stride_p, BLOCK_C, BLOCK_P
        )
        g = _passed(grad_ptr, out_ptr, offs, mask, RELU)
        if NEEDS_RESIDUAL:
            g_stored = g.to(grad_residual_ptr.dtype.element_ty)
            tl.store(grad_residual_ptr + offs, g_stored, mask=mask)
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        first += g
        second += g * (x - mean[:, None])
    row = sums_ptr + tl.program_id(0) * 2 * channels + offs_c
    tl.store(row, tl.sum(first, 1), mask=mask_c)
    tl.store(row + channels, tl.sum(second, 1), mask=mask_c)


@triton.jit(do_not_specialize=[*SIZES, "eps"])
def grad_coefficients_kernel(
    sums_ptr, mean_ptr, var_ptr, weight_ptr, coefficients_ptr, grad_weight_ptr, grad_bias_ptr, eps,
    channels, count, splits,
    TRAINING: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr, NEEDS_BIAS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """coefficients (4, channels): grad = (g - lift - (x - center) * slope) * scale."""
    offs_c, mask_c = _channels(channels, BLOCK_C)
    first, second = _total(sums_ptr, offs_c, mask_c, channels, splits, BLOCK_C)
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)
    var = tl.load(var_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float64)
    numbers = tl.maximum(count, 1).to(tl.float64)
    if TRAINING:
        var = var * ((numbers - 1.0) / numbers)
    inv_std = 1.0 / tl.sqrt(var + eps)
    if NEEDS_WEIGHT:
        grad_weight = tl.where(count > 0, second * inv_std, 0.0)  # of nothing var is anything
        tl.store(
            grad_weight_ptr + offs_c,
            grad_weight.to(tl.float32).to(grad_weight_ptr.dtype.element_ty),
            mask=mask_c,
        )
    if NEEDS_BIAS:
        tl.store(
            grad_bias_ptr + offs_c,
            first.to(tl.float32).to(grad_bias_ptr.dtype.element_ty),
            mask=mask_c,
        )
    scale = _or_else(weight_ptr, offs_c, mask_c, HAS_WEIGHT, 1.0) * inv_std
    slope = second * inv_std * inv_std / numbers
    row = coefficients_ptr + offs_c
    tl.store(row, mean.to(tl.float32), mask=mask_c)
    tl.store(row + channels, (first / numbers).to(tl.float32), mask=mask_c)
    tl.store(row + 2 * channels, slope.to(tl.float32), mask=mask_c)
    tl.store(row + 3 * channels, scale.to(tl.float32), mask=mask_c)


@triton.jit(do_not_specialize=SIZES)
def spread_kernel(
    grad_ptr, out_ptr, x_ptr, coefficients_ptr, grad_input_ptr, grad_residual_ptr,
    images, size, channels, stride_n, stride_c, stride_p,
    TRAINING: tl.constexpr, RELU: tl.constexpr, NEEDS_INPUT: tl.constexpr,
    NEEDS_RESIDUAL: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    offs_c, mask_c = _channels(channels, BLOCK_C)
    offs, mask = _tile(
        tl.program_id(0), offs_c, mask_c, size, stride_n, stride_c, stride_p, BLOCK_C, BLOCK_P
    )
    g = _passed(grad_ptr, out_ptr, offs, mask, RELU)
    if NEEDS_RESIDUAL:
        tl.store(grad_residual_ptr + offs, g.to(grad_residual_ptr.dtype.element_ty), mask=mask)
    if NEEDS_INPUT:
        if TRAINING:
            center = _coefficient(coefficients_ptr, 0, offs_c, mask_c, channels)
            lift = _coefficient(coefficients_ptr, 1, offs_c, mask_c, channels)
            slope = _coefficient(coefficients_ptr, 2, offs_c, mask_c, channels)
            x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            g = g - (lift + (x - center) * slope)
        g = g * _coefficient(coefficients_ptr, 3, offs_c, mask_c, channels)
        tl.store(grad_input_ptr + offs, g.to(grad_input_ptr.dtype.element_ty), mask=mask)


class Plan(NamedTuple):
    """How a tensor is taken apart: sizes and strides for the kernels, tiles, shares of the sums."""

    images: int
    size: int
    channels: int
    strides: tuple[int, int, int]  # of an image, a channel, a pixel
    block_c: int
    block_p: int
    splits: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.images, self.size, self.channels

    @property
    def chunks(self) -> int:
        return self.images * triton.cdiv(self.size, self.block_p)

    @property
    def channel_blocks(self) -> int:
        return triton.cdiv(self.channels, self.block_c)


def plan(x: torch.Tensor, channels_last: bool) -> Plan:
    """Tiles of 2048 numbers, 16 for each thread of 4 warps, along what lies side by side; enough
    shares that every multiprocessor has two. Interpreted, of more, as there the cost is the number
    of operations."""
    gpu = hardware.of(x)
    tile = 2**15 if gpu.interpreted else 2048
    channels = x.shape[1]
    pixels = x.numel() // max(x.shape[0] * channels, 1)
    if channels_last:
        images, size, strides = 1, x.shape[0] * pixels, (0, 1, channels)
        block_c = min(triton.next_power_of_2(max(channels, 1)), 64)
        block_p = min(triton.next_power_of_2(max(size, 1)), tile // block_c)
    else:
        images, size, strides = x.shape[0], pixels, (channels * pixels, pixels, 1)
        block_p = min(triton.next_power_of_2(max(size, 1)), tile)
        block_c = min(triton.next_power_of_2(max(channels, 1)), max(tile // block_p, 1))
    chunks = images * triton.cdiv(size, block_p)
    blocks = max(triton.cdiv(channels, block_c), 1)
    splits = max(min(chunks, triton.cdiv(2 * gpu.multiprocessors, blocks), 256), 1)
    return Plan(images, size, channels, strides, block_c, block_p, splits)


def why_not(input: torch.Tensor, *rest: object) -> str | None:
    """Why these kernels do not serve a call that torch accepts; None if they do."""
    if input.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {input.dtype}"
    return None


@replayed
def forward(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
    channels_last: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, and in training mean and unbiased variance. `input` and `residual` lie densely,
    channels_last or contiguous as said."""
    p = plan(input, channels_last)
    out = made(torch.empty_strided(input.shape, input.stride(), dtype=input.dtype,
                                   device=input.device))  # fmt: skip
    found = [
        made(input.new_empty(p.channels if training else 0, dtype=torch.float32)) for _ in range(2)
    ]
    if not input.numel():
        return out, found[0], found[1]
    mean, var = found if training else (running_mean, running_var)
    sums = made(input.new_empty((p.splits, 2, p.channels), dtype=torch.float32))
    coefficients = made(input.new_empty((3, p.channels), dtype=torch.float32))
    tile = {"BLOCK_C": p.block_c, "BLOCK_P": p.block_p, "enable_fp_fusion": True}
    with hardware.guard(input.device):
        if training:
            launch(
                statistics_kernel, (p.splits, p.channel_blocks),
                input, sums, *p.sizes, p.splits, *p.strides, **tile,
            )  # fmt: skip
        launch(
            coefficients_kernel, (1, p.channel_blocks),
            input, sums, mean, var, _or(weight, input), _or(bias, input), coefficients, eps,
            *p.sizes, p.splits, *p.strides,
            TRAINING=training, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
            BLOCK_C=p.block_c, enable_fp_fusion=True,
        )  # fmt: skip
        launch(
            normalise_kernel, (p.chunks, p.channel_blocks),
            input, _or(residual, input), coefficients, out, *p.sizes, *p.strides,
            HAS_RESIDUAL=residual is not None, RELU=relu, **tile,
        )  # fmt: skip
    return out, found[0], found[1]


def _or(given: torch.Tensor | None, instead: torch.Tensor) -> torch.Tensor:
    """A pointer for an argument that the kernel does not read."""
    return instead if given is None else given


@replayed
def backward(
    grad_out: torch.Tensor,
    input: torch.Tensor,
    out: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    training: bool,
    eps: float,
    relu: bool,
    needs: Sequence[bool],
    channels_last: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of input, weight, bias, residual; None where not needed. All images lie alike."""
    p = plan(input, channels_last)

    def image(needed: bool) -> torch.Tensor | None:
        return made(torch.empty_strided(input.shape, input.stride(), dtype=input.dtype,
                                        device=input.device)) if needed else None  # fmt: skip

    def row(needed: bool) -> torch.Tensor | None:
        dtype = mean.dtype if weight is None else weight.dtype
        return made(input.new_empty(p.channels, dtype=dtype)) if needed else None

    grads = image(needs[0]), row(needs[1]), row(needs[2]), image(needs[3])
    grad_input, grad_weight, grad_bias, grad_residual = grads
    summed = needs[1] or needs[2] or (training and needs[0])
    splits = p.splits if summed and input.numel() else 0
    sums = made(input.new_empty((max(splits, 1), 2, p.channels), dtype=torch.float32))
    coefficients = made(input.new_empty((4, p.channels), dtype=torch.float32))
    tile = {"BLOCK_C": p.block_c, "BLOCK_P": p.block_p, "enable_fp_fusion": True}
    left = splits > 0 and grad_residual is not None  # g, by the first pass
    with hardware.guard(input.device):
        if splits:
            launch(
                grad_sums_kernel, (splits, p.channel_blocks),
                grad_out, out, input, mean, _or(grad_residual, input), sums,
                *p.sizes, splits, *p.strides,
                RELU=relu, NEEDS_RESIDUAL=grad_residual is not None, **tile,
            )  # fmt: skip
        if p.channels:
            launch(
                grad_coefficients_kernel, (1, p.channel_blocks),
                sums, mean, var, _or(weight, input), coefficients,
                _or(grad_weight, sums), _or(grad_bias, sums), eps,
                p.channels, p.images * p.size, splits,
                TRAINING=training, HAS_WEIGHT=weight is not None,
                NEEDS_WEIGHT=needs[1], NEEDS_BIAS=needs[2],
                BLOCK_C=p.block_c, enable_fp_fusion=True,
            )  # fmt: skip
        if input.numel() and (needs[0] or (needs[3] and not left)):
            launch(
                spread_kernel, (p.chunks, p.channel_blocks),
                grad_residual if left else grad_out, out, input, coefficients,
                _or(grad_input, input), _or(grad_residual, input), *p.sizes, *p.strides,
                TRAINING=training, RELU=relu and not left, NEEDS_INPUT=needs[0],
                NEEDS_RESIDUAL=needs[3] and not left, **tile,
            )  # fmt: skip
    return grads
