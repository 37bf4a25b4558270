"""The gradients of a convolution's weight and bias: a matrix product with a long, split sum.

    grad_w[tap, channel, filter] = sum over pixels  x[pixel + tap, channel] * grad[pixel, filter]

The sum runs over every pixel of the batch and its result is small, so it is split over programs
until the device is full; a second kernel adds the partial sums in a fixed order: no atomics, equal
bits run to run. Patches are gathered as in conv2d.py, by boxes whatever the stride: a tile is of
one tap then, which meets every stride-th pixel. ReLU's derivative is applied where the gradient is
read, and the bias gradient comes from the same tiles in passing.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from . import hardware
from .activation import activation_grad
from .conv2d import OUTSIDE, along, locate, pixel_dim
from .conv2d_boxes import (
    BY_POINTERS,
    choose,
    describe,
    in_one_row,
    legal_strides,
    load_box,
    met_by_tap,
    start_of_box,
)
from .conv2d_tiles import WGMMA_ROWS, Tiles, target, weight_grad_tiles
from .launch import launch, made
from .products import add_product


@triton.jit(do_not_specialize=["images", "height", "width", "out_height", "out_width", "chunk"])
def weight_grad_kernel(
    x_ptr, grad_ptr, y_ptr, partial_ptr,
    images, channels, height, width, filters, out_height, out_width, chunk,
    taps_h, taps_w, conv_stride_h, conv_stride_w, padding_h, padding_w, dilation_h, dilation_w,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_gn, stride_gc, stride_gh, stride_gw,
    stride_yn, stride_yc, stride_yh, stride_yw,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, PIXEL_DIM: tl.constexpr, PRECISION: tl.constexpr,
    BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """partial[split, group, j, f] = sum over a chunk of pixels of patch[pixel, j] * grad[pixel, f].

    j counts tap * channels + channel; the row after the last one is the bias gradient. Unless BOX_W
    is 0, pixels come by boxes that descriptors read, and a tile's rows are channels of one tap.
    """
    blocks_f = tl.cdiv(filters, BLOCK_F)
    first_f = tl.program_id(0) % blocks_f * BLOCK_F
    offs_f = first_f + tl.arange(0, BLOCK_F)
    block_j = tl.program_id(0) // blocks_f
    group = tl.program_id(1).to(tl.int64)
    columns = taps_h * taps_w * channels if WEIGHT else 0
    mask_f = offs_f < filters
    x_ptr += group * channels * stride_xc
    grad_ptr += group * filters * stride_gc
    if y_ptr is not None:
        y_ptr += group * filters * stride_yc
    if BOX_W:
        BOX_N: tl.constexpr = BLOCK_P // (BOX_H * BOX_W)
        blocks_c = tl.cdiv(channels, BLOCK_J)
        first_c = block_j % blocks_c * BLOCK_J
        tap = block_j // blocks_c
        offs_j = tap * channels + first_c + tl.arange(0, BLOCK_J)
        mask_j = first_c + tl.arange(0, BLOCK_J) < channels
        first_h, size_h, below = met_by_tap(
            tap // taps_w, height, out_height, conv_stride_h, padding_h, dilation_h
        )
        first_w, size_w, right = met_by_tap(
            tap % taps_w, width, out_width, conv_stride_w, padding_w, dilation_w
        )
        x_boxes = describe(
            x_ptr + first_h * stride_xh + first_w * stride_xw, images, size_h, size_w, channels,
            stride_xn, tl.cast(stride_xh, tl.int64) * conv_stride_h,
            tl.cast(stride_xw, tl.int64) * conv_stride_w,
            BOX_N, BOX_H, BOX_W, BLOCK_J,
        )  # fmt: skip
        grad_boxes = describe(
            grad_ptr, images, out_height, out_width, filters, stride_gn, stride_gh, stride_gw,
            BOX_N, BOX_H, BOX_W, BLOCK_F,
        )  # fmt: skip
        if y_ptr is not None:
            y_boxes = describe(
                y_ptr, images, out_height, out_width, filters, stride_yn, stride_yh, stride_yw,
                BOX_N, BOX_H, BOX_W, BLOCK_F,
            )  # fmt: skip
        first_box = tl.program_id(2) * (chunk // BLOCK_P)
    else:
        offs_j = block_j * BLOCK_J + tl.arange(0, BLOCK_J)
        mask_j = offs_j < columns
        grad_ptrs = grad_ptr + along(offs_f * stride_gc, 1 - PIXEL_DIM)
        if y_ptr is not None:
            y_ptrs = y_ptr + along(offs_f * stride_yc, 1 - PIXEL_DIM)
        tap = offs_j // channels
        below = tl.where(mask_j, tap // taps_w * dilation_h - padding_h, OUTSIDE)
        right = tap % taps_w * dilation_w - padding_w
        offs_xj = offs_j % channels * stride_xc + below * stride_xh + right * stride_xw
        pixels = out_height * out_width
        start = tl.program_id(2).to(tl.int64) * chunk
        first_image = start // pixels
        position = (start - first_image * pixels).to(tl.int32) + tl.arange(0, BLOCK_P)

    acc = tl.zeros((BLOCK_J, BLOCK_F), tl.float32)
    acc_bias = tl.zeros((BLOCK_P, BLOCK_F), tl.float32)
    for done in range(0, chunk, BLOCK_P):
        if BOX_W:
            image, row, column = start_of_box(
                first_box + done // BLOCK_P, out_height, out_width, BOX_N, BOX_H, BOX_W
            )
            grad = load_box(grad_boxes, image, row, column, first_f)
            if y_ptr is not None:
                grad = activation_grad(grad, load_box(y_boxes, image, row, column, first_f), "relu")
        else:
            image, row, column = locate(first_image, position + done, out_height, out_width)
            mask_p = image < images
            mask_g = along(mask_p, PIXEL_DIM) & along(mask_f, 1 - PIXEL_DIM)
            offs_g = image * stride_gn + row * stride_gh + column * stride_gw
            grad = tl.load(grad_ptrs + along(offs_g, PIXEL_DIM), mask=mask_g, other=0.0)
            if y_ptr is not None:
                offs_y = image * stride_yn + row * stride_yh + column * stride_yw
                y = tl.load(y_ptrs + along(offs_y, PIXEL_DIM), mask=mask_g, other=0.0)
                grad = activation_grad(grad, y, "relu")
        if PIXEL_DIM == 1:
            grad = tl.trans(grad)
        if BIAS:
            acc_bias += grad.to(tl.float32)
        if WEIGHT:
            if BOX_W:
                x = load_box(x_boxes, image, row + below, column + right, first_c)
            else:
                top = tl.where(mask_p, row * conv_stride_h, OUTSIDE)
                left = column * conv_stride_w
                h = along(top, PIXEL_DIM) + along(below, 1 - PIXEL_DIM)
                w = along(left, PIXEL_DIM) + along(right, 1 - PIXEL_DIM)
                mask_x = (h >= 0) & (h < height) & (w >= 0) & (w < width)
                offs_x = along(image * stride_xn + top * stride_xh + left * stride_xw, PIXEL_DIM)
                offs_x += along(offs_xj, 1 - PIXEL_DIM)
                x = tl.load(x_ptr + offs_x, mask=mask_x, other=0.0)
            if PIXEL_DIM == 0:
                x = tl.trans(x)
            acc = add_product(x, grad, acc, PRECISION)

    rows = columns + 1 if BIAS else columns
    partial_ptr += (tl.program_id(2) * tl.num_programs(1) + group) * rows * filters
    if WEIGHT:
        offs_o = offs_j[:, None] * filters + offs_f[None, :]
        tl.store(partial_ptr + offs_o, acc, mask=mask_j[:, None] & mask_f[None, :])
    if BIAS:
        bias = tl.sum(acc_bias, axis=0)
        # Every row of tiles has seen the whole gradient; only the first stores.
        offs_b = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
        tl.store(partial_ptr + columns * filters + offs_b, bias, mask=offs_b < filters)


@triton.jit(do_not_specialize=["splits"])
def sum_partials_kernel(
    partial_ptr, weight_grad_ptr, bias_grad_ptr, splits, channels, filters, taps_h, taps_w,
    stride_wf, stride_wc, stride_wh, stride_ww, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum over splits, in order, written in the weight's layout and dtype."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(1).to(tl.int64)
    columns = channels * taps_h * taps_w if weight_grad_ptr is not None else 0
    rows = columns + 1 if bias_grad_ptr is not None else columns
    mask = offs < rows * filters
    total = tl.zeros((BLOCK,), tl.float32)
    for s in range(0, splits, BLOCK_S):
        offs_s = s + tl.arange(0, BLOCK_S)
        offs_g = (offs_s * tl.num_programs(1) + group) * rows * filters
        mask_s = (offs_s < splits)[:, None] & mask[None, :]
        part = tl.load(partial_ptr + offs_g[:, None] + offs[None, :], mask=mask_s, other=0.0)
        total += tl.sum(part, axis=0)
    f = group * filters + offs % filters
    j = offs // filters
    if weight_grad_ptr is not None:
        tap = j // channels
        offs_w = f * stride_wf + j % channels * stride_wc
        offs_w += tap // taps_w * stride_wh + tap % taps_w * stride_ww
        total_w = total.to(weight_grad_ptr.dtype.element_ty)
        tl.store(weight_grad_ptr + offs_w, total_w, mask=mask & (j < columns))
    if bias_grad_ptr is not None:
        total_b = total.to(bias_grad_ptr.dtype.element_ty)
        tl.store(bias_grad_ptr + f, total_b, mask=mask & (j == columns))


def weight_gradient(
    x: torch.Tensor,
    grad: torch.Tensor,
    y: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
    grad_bias: torch.Tensor | None,
    taps: tuple[int, int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> None:
    """The gradients of weight and bias (either may be None), written to them.

    Workspace: about two tiles of fp32 partial sums for each multiprocessor.
    """
    channels, filters = x.shape[1] // groups, grad.shape[1] // groups
    here = target(x)
    columns = channels * taps[0] * taps[1] if grad_weight is not None else 0
    if (*taps, *stride, *padding) == (1, 1, 1, 1, 0, 0):
        x, grad, y = in_one_row(x, grad, y)
    dim = pixel_dim(x)
    vectors = dim == 0 and channels % 16 == 0
    sizes = grad.shape[0], grad.shape[2], grad.shape[3]
    pixels = math.prod(sizes)

    def grid(tiles: Tiles, columns: int) -> int:
        return triton.cdiv(filters, tiles.columns) * max(1, triton.cdiv(columns, tiles.rows))

    box = BY_POINTERS
    if columns and channels >= WGMMA_ROWS:
        tiles = weight_grad_tiles(channels, filters, vectors, here)
        area = taps[0] * taps[1] * grid(tiles, channels)
        steps = triton.cdiv(pixels, tiles.depth) * area * groups // here.programs
        pitches = (channels, filters) if groups > 1 else ()
        box = choose(tiles.depth, steps, sizes, here.precision, (x, grad, y), pitches)
    if box.width:
        blocks = box.tiles(*sizes)
    else:
        tiles = weight_grad_tiles(columns, filters, vectors, here)
        area = grid(tiles, columns)
        blocks = triton.cdiv(pixels, tiles.depth)
    steps_x, steps_grad, steps_y = (
        legal_strides(t) if box.width else t.stride() for t in (x, grad, grad if y is None else y)
    )
    splits = max(1, min(here.programs // (area * groups), blocks), triton.cdiv(pixels, 1 << 30))
    chunk = triton.cdiv(blocks, splits) * tiles.depth
    splits = triton.cdiv(blocks * tiles.depth, chunk) if chunk else 1
    rows = columns + (1 if grad_bias is not None else 0)
    partial = made(torch.empty(splits, groups, rows, filters, dtype=torch.float32, device=x.device))
    with hardware.guard(x.device):
        launch(
            weight_grad_kernel, (area, groups, splits),
            x, grad, y, partial,
            x.shape[0], channels, x.shape[2], x.shape[3], filters, *grad.shape[2:], chunk,
            *taps, *stride, *padding, *dilation,
            *steps_x, *steps_grad, *steps_y,
            WEIGHT=grad_weight is not None, BIAS=grad_bias is not None, PIXEL_DIM=dim,
            PRECISION=here.precision, BOX_H=box.height, BOX_W=box.width,
            BLOCK_J=tiles.rows, BLOCK_F=tiles.columns, BLOCK_P=tiles.depth,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
        strides = grad_weight.stride() if grad_weight is not None else (0, 0, 0, 0)
        launch(
            sum_partials_kernel, (triton.cdiv(rows * filters, 256), groups),
            partial, grad_weight, grad_bias, splits, channels, filters, *taps, *strides,
            BLOCK_S=16, BLOCK=256, enable_fp_fusion=True,
        )  # fmt: skip
