"""Convolution as an implicit matrix product: forward and data gradient, in one kernel.

    forward          out[pixel, filter]     = sum over (tap, channel)  x[pixel + tap, channel] * w
    data gradient    grad_x[pixel, channel] = sum over (tap, filter)   grad[pixel - tap, filter] * w

The matrix of input patches ("im2col": as many times the input as the kernel has taps) is never
written: each tile of it is gathered from the image when the tile's turn comes (Chetlur et al.,
cuDNN, arXiv:1410.0759). What keeps this small and fast:

- The data gradient is the forward kernel. An input pixel h meets the taps k with
  (h + padding - k * dilation) % stride == 0. All pixels of one residue h % stride meet the same
  taps, evenly spaced, and read output pixels that step back by dilation / gcd(stride, dilation):
  a convolution with stride 1 of the gradient and a slice of the weight, for each residue. So no
  product with the zeros that a stride puts between gradients is ever computed.
- ReLU's derivative is applied where a gradient is read (out <= 0: no gradient; a load, not a pass),
  bias, residual and activation before the sum is rounded, and 2x2 max-pooling inside the tile: its
  rows are ordered window by window, so that a whole window lies in one accumulator.
- With channels_last tensors of 16n channels every load is 16 bytes wide and asynchronous; where the
  GPU has tensor descriptors and the stride is 1, loads are boxes of pixels (conv2d_boxes.py).

The weight gradient is in conv2d_weight.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from . import hardware
from .activation import activate, activation_grad
from .conv2d_boxes import (
    BY_POINTERS,
    choose,
    describe,
    in_one_row,
    legal_strides,
    load_box,
    pixels_of_box,
    start_of_box,
    windows_together,
)
from .conv2d_tiles import conv_tiles, target
from .launch import launch
from .products import add_product

OUTSIDE = tl.constexpr(-(1 << 30))  # a row above every image, for a tile's unused places
BLOCKED = tl.constexpr(255)  # stands for the place of a window's maximum where ReLU made it 0


@triton.jit
def along(vector, DIM: tl.constexpr):
    """The vector as dimension DIM of a 2-D tile."""
    return tl.expand_dims(vector, 1 - DIM)


@triton.jit
def locate(first_image, position, rows, columns):
    """Image, row and column of pixels counted from the start of first_image."""
    pixels = rows * columns
    within = position % pixels
    return first_image + position // pixels, within // columns, within % columns


@triton.jit
def max_of_windows(tile, AREA: tl.constexpr):
    """The maximum over each AREA rows of a tile after ReLU, and its place, as torch's max_pool2d.

    Floats that are not negative are ordered as their bits are, and NaN comes last, as it must: it
    wins. Among equals torch takes the first, among NaN the last.
    """
    NAN: tl.constexpr = 0x7FC00000
    bits = tl.where(tile != tile, NAN, tile.to(tl.int32, bitcast=True))
    bits = tl.reshape(bits, (tile.shape[0] // AREA, AREA, tile.shape[1]))
    best = tl.max(bits, axis=1)
    position = tl.arange(0, AREA)[None, :, None]
    rank = tl.where(bits == NAN, position, AREA - 1 - position)
    winner = tl.max(tl.where(bits == best[:, None, :], rank, -1), axis=1)
    return best.to(tl.float32, bitcast=True), tl.where(best == NAN, winner, AREA - 1 - winner)


@triton.jit(
    do_not_specialize=[
        "images", "height", "width", "out_height", "out_width",
        "first_h", "first_w", "step_h", "step_w",
    ]
)  # fmt: skip
def conv_kernel(
    x_ptr, y_ptr, w_ptr, bias_ptr, added_ptr, out_ptr, pre_ptr, index_ptr,
    images, channels, height, width, filters, out_height, out_width,
    taps_h, taps_w, conv_stride_h, conv_stride_w, first_h, first_w, step_h, step_w,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_yn, stride_yc, stride_yh, stride_yw,
    stride_wg, stride_wf, stride_wc, stride_wh, stride_ww,
    stride_on, stride_oc, stride_oh, stride_ow,
    stride_an, stride_ac, stride_ah, stride_aw,
    ACTIVATION: tl.constexpr, POOL: tl.constexpr, FLAT: tl.constexpr, PIXEL_DIM: tl.constexpr,
    PRECISION: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, FILTERS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[n, f, i, j] = sum of x[n, c, i * conv_stride + first + u * step, ...] * w[f, c, u, v].

    y_ptr, if given, is ReLU's output, and x the gradient that passes through it. added_ptr, if
    given, is added before the activation; pre_ptr takes what that is given. index_ptr, if given,
    takes the maximum's place in each POOL x POOL window (BLOCKED where it is 0), and out the
    maximum. channels and filters are those of one group (the grid's second axis). Unless BOX_W is
    0, a tile's pixels are a box, conv_stride is 1, and x, y and w are read by descriptors: w's
    filters lie one after the other (FILTERS_LAST) or its channels.
    """
    AREA: tl.constexpr = POOL * POOL
    WINDOWS: tl.constexpr = BLOCK_P // AREA
    blocks_f = tl.cdiv(filters, BLOCK_F)
    group = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0) // blocks_f
    first_f = tl.program_id(0) % blocks_f * BLOCK_F
    offs_f = first_f + tl.arange(0, BLOCK_F)
    mask_f = offs_f < filters
    x_ptr += group * channels * stride_xc
    w_ptr += group * stride_wg
    if y_ptr is not None:
        y_ptr += group * channels * stride_yc
    if BOX_W:
        BOX_N: tl.constexpr = BLOCK_P // (BOX_H * BOX_W)
        first_image, first_row, first_column = start_of_box(
            tile, out_height, out_width, BOX_N, BOX_H // POOL, BOX_W // POOL
        )
        top = first_row * POOL + first_h
        left = first_column * POOL + first_w
        x_boxes = describe(
            x_ptr, images, height, width, channels, stride_xn, stride_xh, stride_xw,
            BOX_N, BOX_H, BOX_W, BLOCK_K,
        )  # fmt: skip
        if y_ptr is not None:
            y_boxes = describe(
                y_ptr, images, height, width, channels, stride_yn, stride_yh, stride_yw,
                BOX_N, BOX_H, BOX_W, BLOCK_K,
            )  # fmt: skip
        if FILTERS_LAST:
            w_boxes = describe(
                w_ptr, channels, taps_h, taps_w, filters, stride_wc, stride_wh, stride_ww,
                BLOCK_K, 1, 1, BLOCK_F,
            )  # fmt: skip
        else:
            w_boxes = describe(
                w_ptr, filters, taps_h, taps_w, channels, stride_wf, stride_wh, stride_ww,
                BLOCK_F, 1, 1, BLOCK_K,
            )  # fmt: skip
    else:
        start = tile.to(tl.int64) * WINDOWS
        first_image = start // (out_height * out_width)
        position = (start - first_image * (out_height * out_width)).to(tl.int32)
        offs_p = tl.arange(0, BLOCK_P)
        image, row, column = locate(first_image, position + offs_p // AREA, out_height, out_width)
        mask_p = image < images
        top = (row * POOL + offs_p % AREA // POOL) * conv_stride_h + first_h
        top = tl.where(mask_p, top, OUTSIDE)
        left = (column * POOL + offs_p % POOL) * conv_stride_w + first_w
        x_ptrs = x_ptr + along(image * stride_xn + top * stride_xh + left * stride_xw, PIXEL_DIM)
        if y_ptr is not None:
            offs_y = image * stride_yn + top * stride_yh + left * stride_yw
            y_ptrs = y_ptr + along(offs_y, PIXEL_DIM)
        w_ptrs = w_ptr + offs_f[None, :] * stride_wf

    taps = taps_h * taps_w
    steps = tl.cdiv(channels * taps, BLOCK_K) if FLAT else tl.cdiv(channels, BLOCK_K) * taps

    acc = tl.zeros((BLOCK_P, BLOCK_F), tl.float32)
    for step in range(steps):
        # Few channels: taps and channels share the tile. Many: one tap at a time, with all its
        # addresses affine in the channel; taps innermost, as they find the image in L1.
        if FLAT:
            k = step * BLOCK_K + tl.arange(0, BLOCK_K)
            tap = k // channels
            channel = k % channels
            mask_k = tap < taps
        else:
            tap = step % taps
            first_k = step // taps * BLOCK_K
            channel = first_k + tl.arange(0, BLOCK_K)
            mask_k = channel < channels
        tap_h = tap // taps_w
        tap_w = tap % taps_w
        below = tap_h * step_h
        right = tap_w * step_w
        if BOX_W:
            x = load_box(x_boxes, first_image, top + below, left + right, first_k)
            if y_ptr is not None:
                y = load_box(y_boxes, first_image, top + below, left + right, first_k)
                x = activation_grad(x, y, "relu")
            if FILTERS_LAST:
                weight = load_box(w_boxes, first_k, tap_h, tap_w, first_f)
            else:
                weight = tl.trans(load_box(w_boxes, first_f, tap_h, tap_w, first_k))
        else:
            if FLAT:
                h = along(top, PIXEL_DIM) + along(below, 1 - PIXEL_DIM)
                w = along(left, PIXEL_DIM) + along(right, 1 - PIXEL_DIM)
            else:
                h = along(top + below, PIXEL_DIM)
                w = along(left + right, PIXEL_DIM)
            mask_x = (h >= 0) & (h < height) & (w >= 0) & (w < width)
            mask_x = mask_x & along(mask_k, 1 - PIXEL_DIM)
            offs_k = channel * stride_xc + below * stride_xh + right * stride_xw
            x = tl.load(x_ptrs + along(offs_k, 1 - PIXEL_DIM), mask=mask_x, other=0.0)
            if y_ptr is not None:
                offs_k = channel * stride_yc + below * stride_yh + right * stride_yw
                y = tl.load(y_ptrs + along(offs_k, 1 - PIXEL_DIM), mask=mask_x, other=0.0)
                x = activation_grad(x, y, "relu")
            if PIXEL_DIM == 1:
                x = tl.trans(x)
            offs_k = channel * stride_wc + tap_h * stride_wh + tap_w * stride_ww
            mask_w = mask_k[:, None] & mask_f[None, :]
            weight = tl.load(w_ptrs + offs_k[:, None], mask=mask_w, other=0.0)
        acc = add_product(x, weight, acc, PRECISION)

    if bias_ptr is not None:
        bias = tl.load(bias_ptr + group * filters + offs_f, mask=mask_f, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if POOL > 1:
        if BOX_W:
            acc = windows_together(acc, BOX_H, BOX_W, POOL)
        acc = activate(acc, ACTIVATION)
        acc, index = max_of_windows(acc, AREA)
        index = tl.where(acc <= 0, BLOCKED, index)
    if BOX_W:
        image, row, column = pixels_of_box(
            first_image, first_row, first_column, BOX_N, BOX_H // POOL, BOX_W // POOL
        )
        mask_p = (image < images) & (row < out_height) & (column < out_width)
    elif POOL > 1:
        offs_o = position + tl.arange(0, WINDOWS)
        image, row, column = locate(first_image, offs_o, out_height, out_width)
        mask_p = image < images
    offs_o = along(image * stride_on + row * stride_oh + column * stride_ow, PIXEL_DIM)
    offs_o += along((group * filters + offs_f) * stride_oc, 1 - PIXEL_DIM)
    mask_o = along(mask_p, PIXEL_DIM) & along(mask_f, 1 - PIXEL_DIM)
    if PIXEL_DIM == 1:
        acc = tl.trans(acc)
    if POOL == 1:
        if added_ptr is not None:
            offs_a = along(image * stride_an + row * stride_ah + column * stride_aw, PIXEL_DIM)
            offs_a += along((group * filters + offs_f) * stride_ac, 1 - PIXEL_DIM)
            acc += tl.load(added_ptr + offs_a, mask=mask_o, other=0.0).to(tl.float32)
        if pre_ptr is not None:
            tl.store(pre_ptr + offs_o, acc.to(pre_ptr.dtype.element_ty), mask=mask_o)
        acc = activate(acc, ACTIVATION)
    tl.store(out_ptr + offs_o, acc.to(out_ptr.dtype.element_ty), mask=mask_o)
    if index_ptr is not None:
        if PIXEL_DIM == 1:
            index = tl.trans(index)
        tl.store(index_ptr + offs_o, index.to(tl.uint8), mask=mask_o)


def pixel_dim(x: torch.Tensor) -> int:
    """Which dimension of a gathered tile is pixels: the last is for neighbours in memory."""
    return 0 if x.stride(1) == 1 and x.shape[1] > 1 else 1


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    conv_stride: list[int],
    first: list[int],
    step: list[int],
    *,
    y: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    added: torch.Tensor | None = None,
    pre: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    activation: str = "none",
) -> None:
    """conv_kernel on views; weight is (groups, filters, channels, taps_h, taps_w), pre lies as
    out."""
    if out.numel() == 0:
        return
    groups, filters, channels, taps_h, taps_w = weight.shape
    pool = 2 if index is not None else 1
    if (taps_h, taps_w, *first) == (1, 1, 0, 0):
        # A plain product of the pixels that a stride leaves.
        x, y = (t if t is None else t[:, :, :: conv_stride[0], :: conv_stride[1]] for t in (x, y))
        conv_stride = [1, 1]
        if pool == 1:
            x, y, out, added, pre = in_one_row(x, y, out, added, pre)
    dim = pixel_dim(x if y is None else y)
    vectors = dim == 0 and channels % 16 == 0
    here = target(x)
    tiles = conv_tiles(channels, filters, taps_h * taps_w, vectors, here)
    sizes = out.shape[0], out.shape[2], out.shape[3]
    blocks = triton.cdiv(math.prod(sizes) * pool * pool, tiles.rows)
    flat = channels < 16
    steps_x, steps_y, steps_w = x.stride(), (x if y is None else y).stride(), weight.stride()
    # Descriptors have last what lies one after the other.
    filters_last = weight.stride(2) != 1
    matrix = weight[0].transpose(0, 1) if filters_last else weight[0]
    box = BY_POINTERS
    if not flat and list(conv_stride) == [1, 1]:
        steps = taps_h * taps_w * triton.cdiv(channels, tiles.depth)
        pitches = (channels, weight.stride(0)) if groups > 1 else ()
        box = choose(tiles.rows // pool**2, steps, sizes, here.precision, (x, y, matrix), pitches)
    if box.width:
        blocks = box.tiles(*sizes)
        steps_x, steps_y = legal_strides(x), legal_strides(x if y is None else y)
        outer, inner, *steps_taps = legal_strides(matrix)
        between = (inner, outer) if filters_last else (outer, inner)
        steps_w = (weight.stride(0), *between, *steps_taps)
    else:
        filters_last = False
    grid = (blocks * triton.cdiv(filters, tiles.columns), groups)
    with hardware.guard(x.device):
        launch(
            conv_kernel, grid,
            x, y, weight, None if bias is None else bias.contiguous(), added, out, pre, index,
            x.shape[0], channels, x.shape[2], x.shape[3], filters, out.shape[2], out.shape[3],
            taps_h, taps_w, *conv_stride, *first, *step,
            *steps_x, *steps_y, *steps_w, *out.stride(),
            *(out if added is None else added).stride(),
            ACTIVATION=activation, POOL=pool, FLAT=flat, PIXEL_DIM=dim, PRECISION=here.precision,
            BOX_H=box.height * pool, BOX_W=box.width * pool, FILTERS_LAST=filters_last,
            BLOCK_P=tiles.rows, BLOCK_F=tiles.columns, BLOCK_K=tiles.depth,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages, enable_fp_fusion=True,
        )  # fmt: skip


def residues(
    size: int, stride: int, padding: int, dilation: int
) -> Iterator[tuple[int, slice, int]]:
    """For each residue of input pixels: itself, the taps it meets, its first output pixel."""
    for residue in range(stride):
        taps = [k for k in range(size) if (residue + padding - k * dilation) % stride == 0]
        first = taps[0] if taps else size
        spacing = stride // math.gcd(stride, dilation)
        yield residue, slice(first, None, spacing), (residue + padding - first * dilation) // stride


def data_gradient(
    grad: torch.Tensor,
    y: torch.Tensor | None,
    weight: torch.Tensor,
    grad_input: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> None:
    """The gradient of a convolution's input, written to grad_input; y masks grad where ReLU did."""
    weight = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    sizes = weight.shape[3:]
    step = [-(d // math.gcd(s, d)) for s, d in zip(stride, dilation, strict=True)]
    for row, taps_h, first_h in residues(sizes[0], stride[0], padding[0], dilation[0]):
        for column, taps_w, first_w in residues(sizes[1], stride[1], padding[1], dilation[1]):
            convolve(
                grad,
                weight[:, :, :, taps_h, taps_w],
                grad_input[:, :, row :: stride[0], column :: stride[1]],
                [1, 1],
                [first_h, first_w],
                step,
                y=y,
            )
