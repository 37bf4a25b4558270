"""activation(conv2d(input, weight, bias) + residual) and its gradients, by the implicit products of
conv2d.py and conv2d_weight.py.

Forward is one kernel: bias, residual and activation are applied to the fp32 sums before they are
rounded and written. Backward needs no pass of its own for ReLU: where the output is 0 there is no
gradient, and the products read the output beside the gradient. The slopes of the other activations
would be worked out anew for every tap, so one pass applies them first; a residual's gradient is
what that pass writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import hardware
from .activation import activate, activation_grad
from .conv2d import convolve, data_gradient
from .conv2d_tiles import target
from .conv2d_weight import weight_gradient
from .launch import launch, made, replayed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def unravel(program, BLOCK: tl.constexpr, channels, height, width, CHANNELS_LAST: tl.constexpr):
    """(n, c, h, w) of BLOCK neighbours in memory, and their places; 64 bits only for the image."""
    image = channels * height * width
    start = program.to(tl.int64) * BLOCK
    first_image = start // image
    offs = tl.arange(0, BLOCK)
    position = (start - first_image * image).to(tl.int32) + offs
    n = first_image + position // image
    rest = position % image
    if CHANNELS_LAST:
        c = rest % channels
        w = rest // channels % width
        h = rest // channels // width
    else:
        w = rest % width
        h = rest // width % height
        c = rest // width // height
    return n, c, h, w, start + offs


@triton.jit(do_not_specialize=["images", "height", "width"])
def activation_kernel(
    x_ptr, bias_ptr, added_ptr, pre_ptr, images, channels, height, width,
    stride_an, stride_ac, stride_ah, stride_aw,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x = activation(x + bias + added) in place; pre, if given, takes what is activated."""
    n, c, h, w, offs = unravel(tl.program_id(0), BLOCK, channels, height, width, CHANNELS_LAST)
    mask = n < images
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + c, mask=mask, other=0.0).to(tl.float32)
    if added_ptr is not None:
        offs_a = n * stride_an + c * stride_ac + h * stride_ah + w * stride_aw
        x += tl.load(added_ptr + offs_a, mask=mask, other=0.0).to(tl.float32)
    if pre_ptr is not None:
        tl.store(pre_ptr + offs, x.to(pre_ptr.dtype.element_ty), mask=mask)
    tl.store(x_ptr + offs, activate(x, ACTIVATION).to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["images", "height", "width"])
def activation_grad_kernel(
    grad_ptr, saved_ptr, out_ptr, images, channels, height, width,
    stride_gn, stride_gc, stride_gh, stride_gw,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient before the activation; saved and out lie alike, without gaps."""
    n, c, h, w, offs = unravel(tl.program_id(0), BLOCK, channels, height, width, CHANNELS_LAST)
    mask = n < images
    offs_g = n * stride_gn + c * stride_gc + h * stride_gh + w * stride_gw
    grad = tl.load(grad_ptr + offs_g, mask=mask, other=0.0).to(tl.float32)
    saved = grad
    if ACTIVATION != "none":
        saved = tl.load(saved_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    grad = activation_grad(grad, saved, ACTIVATION)
    tl.store(out_ptr + offs, grad.to(out_ptr.dtype.element_ty), mask=mask)


def block(x: torch.Tensor) -> int:
    """Elements of a program: eight a thread keep enough loads in flight to fill the memory pipe.

    The interpreter's cost is the number of operations, whatever their size.
    """
    return 16384 if target(x).product == "interpreted" else 1024


def out_size(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def conv_size(
    input: torch.Tensor,
    weight: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> list[int]:
    return [
        out_size(input.shape[2 + i], weight.shape[2 + i], stride[i], padding[i], dilation[i])
        for i in (0, 1)
    ]


def memory_format(*tensors: torch.Tensor) -> torch.memory_format:
    """torch's rule for a convolution's results: channels_last if input or weight is, by strides.

    (`is_contiguous` would not do: it calls one channel or one pixel both.)
    """

    def channels_last(x: torch.Tensor) -> bool:
        least = 0
        if x.stride(1) == 0:
            return False
        for dim in (1, 3, 2, 0):
            if x.shape[dim] == 0 or x.stride(dim) < least or (dim == 0 and least == x.stride(1)):
                return False
            least = x.stride(dim) * max(1, x.shape[dim])
        return True

    return torch.channels_last if any(map(channels_last, tensors)) else torch.contiguous_format


def why_not(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    *_: object,
) -> str | None:
    """Why these kernels do not serve a call that torch accepts; None if they do."""
    if input.dtype not in DTYPES:
        return f"Triton's convolution takes float32, bfloat16 and float16, not {input.dtype}"
    if groups > 65535:
        return f"Triton's convolution takes at most 65535 groups, not {groups}"
    # Within an image offsets are 32 bits wide, with room for a tile beyond the end.
    rows, columns = conv_size(input, weight, stride, padding, dilation)
    images = [input] if residual is None else [input, residual]
    largest = max(
        sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True)) for x in images
    )
    if max(largest, weight.shape[0] * rows * columns, weight.numel()) > 2**31 - 2**16:
        return "Triton's convolution takes images and weights of less than 2**31 elements"
    return None


@replayed
def forward(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (N, C_out, H_out, W_out), channels_last where torch's is, and what the activation was
    given, of no elements unless to be kept."""
    sizes = conv_size(input, weight, stride, padding, dilation)
    out = made(
        torch.empty(
            (input.shape[0], weight.shape[0], *sizes),
            dtype=input.dtype,
            device=input.device,
            memory_format=memory_format(input, weight),
        )
    )
    pre = made(torch.empty_like(out) if keep else out.new_empty(0))
    grouped = weight.unflatten(0, (groups, -1))
    first = [-p for p in padding]
    convolve(
        input, grouped, out, stride, first, dilation,
        bias=bias, added=residual, pre=pre if keep else None, activation=activation,
    )  # fmt: skip
    return out, pre


@replayed
def backward(
    grad_out: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    saved: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    needs: list[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of input, weight, bias and residual; None where not needed."""
    sizes = (stride, padding, dilation, groups)
    if activation in ("none", "relu") and not needs[3]:
        y = saved if activation == "relu" else None
        return (*product_gradients(grad_out, input, weight, y, *sizes, needs[:3]), None)
    grad = activation_gradient(grad_out, saved, memory_format(input, weight), activation)
    grads = product_gradients(grad, input, weight, None, *sizes, needs[:3])
    return (*grads, grad if needs[3] else None)


def activation_gradient(
    grad_out: torch.Tensor, saved: torch.Tensor, layout: torch.memory_format, activation: str
) -> torch.Tensor:
    """The gradient before the activation, lying in `layout` as saved does."""
    grad = made(
        torch.empty(
            grad_out.shape, dtype=grad_out.dtype, device=grad_out.device, memory_format=layout
        )
    )
    if grad.numel():
        with hardware.guard(grad.device):
            launch(
                activation_grad_kernel, (triton.cdiv(grad.numel(), block(grad)),),
                grad_out, saved, grad, *grad.shape, *grad_out.stride(),
                ACTIVATION=activation, CHANNELS_LAST=layout is torch.channels_last,
                BLOCK=block(grad), enable_fp_fusion=True,
            )  # fmt: skip
    return grad


def activate_(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    added: torch.Tensor | None,
    pre: torch.Tensor | None,
    layout: torch.memory_format,
    activation: str,
) -> None:
    """x = activation(x + bias + added) in place; pre, where given, takes what is activated.

    x and pre lie in `layout`, without gaps; bias is one number a channel.
    """
    if x.numel() == 0:
        return
    with hardware.guard(x.device):
        launch(
            activation_kernel, (triton.cdiv(x.numel(), block(x)),),
            x, None if bias is None else bias.contiguous(), added, pre, *x.shape,
            *(x if added is None else added).stride(),
            ACTIVATION=activation, CHANNELS_LAST=layout is torch.channels_last, BLOCK=block(x),
            enable_fp_fusion=True,
        )  # fmt: skip


def product_gradients(
    grad_out: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needs: list[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of input, weight, bias; None where not needed. Where out is given, ReLU's, it masks
    grad_out."""
    layout = memory_format(input, weight)
    grad_input = made(torch.empty_like(input, memory_format=layout)) if needs[0] else None
    grad_weight = made(torch.empty_like(weight, memory_format=layout)) if needs[1] else None
    grad_bias = made(weight.new_empty(weight.shape[0])) if needs[2] else None
    sizes = (stride, padding, dilation, groups)
    if grad_input is not None:
        data_gradient(grad_out, out, weight, grad_input, *sizes)
    if grad_weight is not None or grad_bias is not None:
        taps = (weight.shape[2], weight.shape[3])
        weight_gradient(input, grad_out, out, grad_weight, grad_bias, taps, *sizes)
    return grad_input, grad_weight, grad_bias
