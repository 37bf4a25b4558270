"""max_pool2d and its gradient.

Saved for backward is one byte for each window: where in it the maximum was. Forward, a program's
elements are neighbours in the output's memory, so that it writes, and in channels_last also reads,
whole lines. Backward, each pixel looks at the windows that cover it and takes the gradients of
those whose byte names it: a gather, so no atomics, and equal bits run to run. A pixel is written
once, and of the windows' numbers those that neighbours share come out of the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import hardware
from .conv2d_relu_max_pool2d import block, unravel
from .launch import launch, made, replayed

NOWHERE = tl.constexpr(255)  # of a window that has no place inside the image


@triton.jit(do_not_specialize=["images", "height", "width", "out_height", "out_width"])
def max_pool2d_kernel(
    x_ptr, out_ptr, index_ptr, images, channels, height, width, out_height, out_width,
    stride_xn, stride_xc, stride_xh, stride_xw,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each window's maximum and its place; as torch, the first of equals, and NaN wins."""
    n, c, row, column, offs_o = unravel(
        tl.program_id(0), BLOCK, channels, out_height, out_width, CHANNELS_LAST
    )
    mask_o = n < images
    x_ptrs = x_ptr + n * stride_xn + c * stride_xc
    compute = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    best = tl.full((BLOCK,), float("-inf"), compute)
    index = tl.full((BLOCK,), NOWHERE, tl.int32)
    for place in range(KERNEL_H * KERNEL_W):
        h = row * STRIDE_H - PADDING_H + place // KERNEL_W * DILATION_H
        w = column * STRIDE_W - PADDING_W + place % KERNEL_W * DILATION_W
        mask = mask_o & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        offs_x = h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
        x = tl.load(x_ptrs + offs_x, mask=mask, other=float("-inf")).to(compute)
        better = mask & ((x > best) | (x != x) | (index == NOWHERE))
        best = tl.where(better, x, best)
        index = tl.where(better, place, index)
    tl.store(out_ptr + offs_o, best.to(out_ptr.dtype.element_ty), mask=mask_o)
    tl.store(index_ptr + offs_o, index.to(tl.uint8), mask=mask_o)


@triton.jit(do_not_specialize=["images", "height", "width", "out_height", "out_width"])
def max_pool2d_grad_kernel(
    grad_ptr, index_ptr, grad_x_ptr, images, channels, height, width, out_height, out_width,
    stride_gn, stride_gc, stride_gh, stride_gw,
    stride_in, stride_ic, stride_ih, stride_iw,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A pixel's gradient, gathered from the windows that it won."""
    OVER_H: tl.constexpr = ((KERNEL_H - 1) * DILATION_H + STRIDE_H) // STRIDE_H
    OVER_W: tl.constexpr = ((KERNEL_W - 1) * DILATION_W + STRIDE_W) // STRIDE_W
    n, c, h, w, offs_x = unravel(tl.program_id(0), BLOCK, channels, height, width, CHANNELS_LAST)
    mask_x = n < images
    last_row = (h + PADDING_H) // STRIDE_H
    last_column = (w + PADDING_W) // STRIDE_W
    index_ptrs = index_ptr + n * stride_in + c * stride_ic
    grad_ptrs = grad_ptr + n * stride_gn + c * stride_gc
    total = tl.zeros((BLOCK,), tl.float32)
    for window in range(OVER_H * OVER_W):
        # The first windows first, as torch adds them.
        row = last_row - (OVER_H - 1 - window // OVER_W)
        column = last_column - (OVER_W - 1 - window % OVER_W)
        tap_h = (h + PADDING_H - row * STRIDE_H) // DILATION_H
        tap_w = (w + PADDING_W - column * STRIDE_W) // DILATION_W
        mask = mask_x & (row >= 0) & (row < out_height) & (column >= 0) & (column < out_width)
        mask = mask & (tap_h < KERNEL_H) & (tap_w < KERNEL_W)
        mask = mask & (row * STRIDE_H + tap_h * DILATION_H == h + PADDING_H)
        mask = mask & (column * STRIDE_W + tap_w * DILATION_W == w + PADDING_W)
        row64, column64 = row.to(tl.int64), column.to(tl.int64)
        index = tl.load(index_ptrs + row64 * stride_ih + column64 * stride_iw, mask=mask, other=0)
        mask = mask & (index.to(tl.int32) == tap_h * KERNEL_W + tap_w)
        grad = tl.load(grad_ptrs + row64 * stride_gh + column64 * stride_gw, mask=mask, other=0.0)
        total += grad.to(tl.float32)
    tl.store(grad_x_ptr + offs_x, total.to(grad_x_ptr.dtype.element_ty), mask=mask_x)


def why_not(input: torch.Tensor, *sizes: object) -> str | None:
    """Why these kernels do not serve a call that torch accepts; None if they do."""
    if input.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {input.dtype}"
    if input.numel() and input[0].numel() >= 2**31:
        return f"images of 2**31 elements or more, got {tuple(input.shape)}"
    return None


@replayed
def forward(
    input: torch.Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    size: list[int],
    channels_last: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows' maxima, `size` of them along each axis, and their uint8 places
    (kernel row * kernel width + kernel column)."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = made(
        torch.empty(
            (*input.shape[:2], *size), dtype=input.dtype, device=input.device, memory_format=layout
        )
    )
    index = made(torch.empty_like(out, dtype=torch.uint8))
    if out.numel():
        with hardware.guard(input.device):
            launch(
                max_pool2d_kernel, (triton.cdiv(out.numel(), block(input)),),
                input, out, index, *input.shape, *size, *input.stride(),
                *kernel, *stride, *padding, *dilation,
                CHANNELS_LAST=channels_last, BLOCK=block(input), enable_fp_fusion=True,
            )  # fmt: skip
    return out, index


@replayed
def backward(
    grad_out: torch.Tensor,
    index: torch.Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    size: list[int],
    channels_last: bool,
) -> torch.Tensor:
    """The gradient of an input of `size` along each axis."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    grad = made(
        torch.empty(
            (*index.shape[:2], *size),
            dtype=grad_out.dtype,
            device=grad_out.device,
            memory_format=layout,
        )
    )
    if grad.numel():
        with hardware.guard(grad_out.device):
            launch(
                max_pool2d_grad_kernel, (triton.cdiv(grad.numel(), block(grad)),),
                grad_out, index, grad, *grad.shape, *index.shape[2:],
                *grad_out.stride(), *index.stride(),
                *kernel, *stride, *padding, *dilation,
                CHANNELS_LAST=channels_last, BLOCK=block(grad), enable_fp_fusion=True,
            )  # fmt: skip
    return grad
