"""torch's Conv2d with what follows it in the same op: a ReLU, a ReLU and a max-pooling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..functional import conv2d_relu, conv2d_relu_max_pool2d
from ..ops.conv2d_arguments import Size, pool_sizes


class ConvReLU2d(torch.nn.Conv2d):
    """relu(conv(input)): `torch.nn.Conv2d` with a ReLU; the arguments and state dict are its own.

    Args of forward:
        input: (N, in_channels, H, W) or (in_channels, H, W), as for `bigops.conv2d_relu`.

    Raises:
        What torch.nn.Conv2d raises; forward what `bigops.conv2d_relu` raises.

    Example:
        >>> layer = bigops.nn.ConvReLU2d(3, 16, 3, padding=1)
        >>> layer(torch.randn(8, 3, 32, 32)).shape
        torch.Size([8, 16, 32, 32])
    """

    def forward(self, input: Tensor) -> Tensor:
        return conv2d_relu(*_arguments(self, input))


class ConvReLUMaxPool2d(torch.nn.Conv2d):
    """max_pool2d(relu(conv(input))) that keeps a byte per window for its gradients.

    The state dict is that of `torch.nn.Conv2d`.

    Args:
        *args, **kwargs: of torch.nn.Conv2d.
        pool_kernel_size, pool_stride, pool_padding: of the pooling windows, in pixels, one int or
            (height, width); the stride defaults to the kernel size, the padding is at most half
            of it.

    Args of forward:
        input: (N, in_channels, H, W) or (in_channels, H, W), as for
            `bigops.conv2d_relu_max_pool2d`.

    Raises:
        ValueError (also RuntimeError): a pool_... argument is out of range; else what
            torch.nn.Conv2d raises; forward what `bigops.conv2d_relu_max_pool2d` raises.

    Example:
        >>> layer = bigops.nn.ConvReLUMaxPool2d(1, 32, 3, padding=1, pool_kernel_size=2)
        >>> layer(torch.randn(8, 1, 28, 28)).shape
        torch.Size([8, 32, 14, 14])
    """

    def __init__(
        self,
        *args: Any,
        pool_kernel_size: Size = 2,
        pool_stride: Size | None = None,
        pool_padding: Size = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        sizes = pool_sizes(pool_kernel_size, pool_stride, pool_padding)
        self.pool_kernel_size, self.pool_stride, self.pool_padding = map(tuple, sizes)

    def forward(self, input: Tensor) -> Tensor:
        return conv2d_relu_max_pool2d(
            *_arguments(self, input),
            pool_kernel_size=self.pool_kernel_size,
            pool_stride=self.pool_stride,
            pool_padding=self.pool_padding,
        )

    def extra_repr(self) -> str:
        pools = ("pool_kernel_size", "pool_stride", "pool_padding")
        return ", ".join([super().extra_repr(), *(f"{p}={getattr(self, p)}" for p in pools)])


def _arguments(conv: torch.nn.Conv2d, input: Tensor) -> tuple[Any, ...]:
    """Of a convolution, padded beforehand by what zeros are not."""
    padding: Any = conv.padding
    if conv.padding_mode != "zeros":
        sides = conv._reversed_padding_repeated_twice
        input, padding = pad(input, sides, mode=conv.padding_mode), 0
    return input, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups
