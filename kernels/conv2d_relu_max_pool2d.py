"""max_pool2d(relu(conv2d(input, weight, bias))) and its gradients.

Saved for backward is one byte for each pooled value: where in its window the maximum was (at most
255 places, so windows up to 15 x 15), or 255 where it is 0 and ReLU passes no gradient. Windows of
2 x 2 that do not overlap, the usual ones, are pooled inside the convolution's tiles, and the map
before pooling is never written. Other windows take a second kernel over that map, which is dropped
afterwards.

Backward first spreads the gradient over that map again: each pixel looks at the windows that cover
it and takes the gradients of those whose byte names it (a gather, so no atomics, and equal bits
run to run). Then conv2d_act's products go on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import conv2d_act, hardware
from .conv2d import BLOCKED, convolve
from .conv2d_act import (
    block,
    conv_size,
    memory_format,
    out_size,
    product_gradients,
    unravel,
)
from .launch import launch, made, replayed


@triton.jit(do_not_specialize=["images", "height", "width", "out_height", "out_width"])
def max_pool_kernel(
    x_ptr, out_ptr, index_ptr, images, channels, height, width, out_height, out_width,
    stride_xn, stride_xc, stride_xh, stride_xw,
    POOL_H: tl.constexpr, POOL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each window's maximum after ReLU and its place; as torch, the first of equals, NaN wins."""
    n, c, row, column, offs_o = unravel(
        tl.program_id(0), BLOCK, channels, out_height, out_width, CHANNELS_LAST
    )
    mask_o = n < images
    x_ptrs = x_ptr + n * stride_xn + c * stride_xc
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    index = tl.zeros((BLOCK,), tl.int32)
    for place in range(POOL_H * POOL_W):
        h = row * STRIDE_H - PADDING_H + place // POOL_W
        w = column * STRIDE_W - PADDING_W + place % POOL_W
        mask = mask_o & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        offs_x = h * stride_xh + w * stride_xw
        x = tl.load(x_ptrs + offs_x, mask=mask, other=float("-inf")).to(tl.float32)
        better = (x > best) | (x != x)
        best = tl.where(better, x, best)
        index = tl.where(better, place, index)
    index = tl.where(best <= 0, BLOCKED, index)
    tl.store(out_ptr + offs_o, best.to(out_ptr.dtype.element_ty), mask=mask_o)
    tl.store(index_ptr + offs_o, index.to(tl.uint8), mask=mask_o)


@triton.jit(do_not_specialize=["images", "height", "width", "out_height", "out_width"])
def spread_kernel(
    grad_ptr, index_ptr, spread_ptr, images, channels, height, width, out_height, out_width,
    stride_gn, stride_gc, stride_gh, stride_gw,
    stride_in, stride_ic, stride_ih, stride_iw,
    POOL_H: tl.constexpr, POOL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of the map before pooling and ReLU: a pixel gathers from the windows over it."""
    OVER_H: tl.constexpr = (POOL_H + STRIDE_H - 1) // STRIDE_H
    OVER_W: tl.constexpr = (POOL_W + STRIDE_W - 1) // STRIDE_W
    n, c, h, w, offs_s = unravel(tl.program_id(0), BLOCK, channels, height, width, CHANNELS_LAST)
    mask_s = n < images
    last_row = (h + PADDING_H) // STRIDE_H
    last_column = (w + PADDING_W) // STRIDE_W
    total = tl.zeros((BLOCK,), tl.float32)
    for window in range(OVER_H * OVER_W):
        row = last_row - window // OVER_W
        column = last_column - window % OVER_W
        place_h = h + PADDING_H - row * STRIDE_H
        place_w = w + PADDING_W - column * STRIDE_W
        mask = mask_s & (row >= 0) & (row < out_height) & (column >= 0) & (column < out_width)
        mask = mask & (place_h < POOL_H) & (place_w < POOL_W)
        offs_i = n * stride_in + c * stride_ic + row * stride_ih + column * stride_iw
        index = tl.load(index_ptr + offs_i, mask=mask, other=255).to(tl.int32)
        mask = mask & (index == place_h * POOL_W + place_w)
        offs_g = n * stride_gn + c * stride_gc + row * stride_gh + column * stride_gw
        total += tl.load(grad_ptr + offs_g, mask=mask, other=0.0).to(tl.float32)
    tl.store(spread_ptr + offs_s, total.to(spread_ptr.dtype.element_ty), mask=mask_s)


def why_not(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    pool_kernel: list[int],
    pool_stride: list[int],
    pool_padding: list[int],
) -> str | None:
    """Why these kernels do not serve a call that torch accepts; None if they do."""
    if pool_kernel[0] * pool_kernel[1] > 255:
        return f"a place in a window is one byte: at most 255 places, not {pool_kernel}"
    return conv2d_act.why_not(input, weight, bias, None, stride, padding, dilation, groups)


@replayed
def forward(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    pool_kernel: list[int],
    pool_stride: list[int],
    pool_padding: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pooled map and each maximum's uint8 place in its window (row * pool width + column).

    BLOCKED stands for the place where the maximum is 0.
    """
    layout = memory_format(input, weight)
    before = conv_size(input, weight, stride, padding, dilation)
    pooled = [out_size(before[i], pool_kernel[i], pool_stride[i], pool_padding[i]) for i in (0, 1)]
    out = made(
        torch.empty(
            (input.shape[0], weight.shape[0], *pooled),
            dtype=input.dtype,
            device=input.device,
            memory_format=layout,
        )
    )
    index = made(torch.empty_like(out, dtype=torch.uint8))
    if out.numel() == 0:
        return out, index
    if list(pool_kernel) == list(pool_stride) == [2, 2] and not any(pool_padding):
        grouped = weight.unflatten(0, (groups, -1))
        first = [-p for p in padding]
        convolve(
            input, grouped, out, stride, first, dilation, bias=bias, index=index, activation="relu"
        )
        return out, index
    x, _ = conv2d_act.forward(
        input, weight, bias, None, stride, padding, dilation, groups, "relu", False
    )
    with hardware.guard(x.device):
        launch(
            max_pool_kernel, (triton.cdiv(out.numel(), block(x)),),
            x, out, index, *x.shape, *pooled, *x.stride(),
            *pool_kernel, *pool_stride, *pool_padding,
            CHANNELS_LAST=layout is torch.channels_last, BLOCK=block(x),
            enable_fp_fusion=True,
        )  # fmt: skip
    return out, index


@replayed
def backward(
    grad_out: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    index: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    pool_kernel: list[int],
    pool_stride: list[int],
    pool_padding: list[int],
    needs: list[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of input, weight, bias; None where not needed. Allocates the map before pooling."""
    layout = memory_format(input, weight)
    before = conv_size(input, weight, stride, padding, dilation)
    spread = grad_out.new_empty((input.shape[0], weight.shape[0], *before))
    spread = made(torch.empty_like(spread, memory_format=layout))
    if spread.numel():
        with hardware.guard(grad_out.device):
            launch(
                spread_kernel, (triton.cdiv(spread.numel(), block(spread)),),
                grad_out, index, spread, *spread.shape, *index.shape[2:],
                *grad_out.stride(), *index.stride(),
                *pool_kernel, *pool_stride, *pool_padding,
                CHANNELS_LAST=layout is torch.channels_last, BLOCK=block(spread),
                enable_fp_fusion=True,
            )  # fmt: skip
    return product_gradients(spread, input, weight, None, stride, padding, dilation, groups, needs)
