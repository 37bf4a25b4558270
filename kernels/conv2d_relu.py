"""relu(conv2d(input, weight, bias)) and its gradients, by the implicit products of conv2d.py and
conv2d_weight.py.

Forward is one kernel: bias and ReLU are applied to the fp32 sums before they are rounded and
written. Backward needs no mask of its own: where the output is 0 there is no gradient, and the
products read the output beside the gradient.
"""

from __future__ import annotations

import torch

from .conv2d import convolve, data_gradient
from .conv2d_weight import weight_gradient
from .launch import made, replayed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> str | None:
    """Why these kernels do not serve a call that torch accepts; None if they do."""
    if input.dtype not in DTYPES:
        return f"Triton's convolution takes float32, bfloat16 and float16, not {input.dtype}"
    if groups > 65535:
        return f"Triton's convolution takes at most 65535 groups, not {groups}"
    # Within an image offsets are 32 bits wide, with room for a tile beyond the end.
    rows, columns = conv_size(input, weight, stride, padding, dilation)
    image = sum((n - 1) * s for n, s in zip(input.shape[1:], input.stride()[1:], strict=True))
    if max(image, weight.shape[0] * rows * columns, weight.numel()) > 2**31 - 2**16:
        return "Triton's convolution takes images and weights of less than 2**31 elements"
    return None


@replayed
def forward(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    """out (N, C_out, H_out, W_out), channels_last where torch's is."""
    sizes = conv_size(input, weight, stride, padding, dilation)
    out = made(
        torch.empty(
            (input.shape[0], weight.shape[0], *sizes),
            dtype=input.dtype,
            device=input.device,
            memory_format=memory_format(input, weight),
        )
    )
    grouped = weight.unflatten(0, (groups, -1))
    first = [-p for p in padding]
    convolve(input, grouped, out, stride, first, dilation, bias=bias, activation=True)
    return out


@replayed
def backward(
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
    """Gradients of input, weight, bias; None where not needed. out None: grad_out is unmasked."""
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
