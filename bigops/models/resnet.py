"""ResNet18 and ResNet50 (He et al. 2016, "Deep residual learning for image recognition").

Behind each convolution eager PyTorch normalises, adds the residual and rectifies in passes of their
own, and keeps what each was given for the gradients. Here one op does it all. In a copy for
inference, `folded()`, nothing is left of the normalisation: the convolution's own op adds bias and
residual and rectifies. Images and weights may lie in either layout, as torch's may:
`model.to(memory_format=torch.channels_last)` pays for large images, but not for 16 of 64x64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Self

from torch import Tensor, nn
from torch.nn import functional as F

from bigops.folding import fold_batch_norm
from bigops.functional import batch_norm_act, conv2d_act, max_pool2d

Sizes = list[tuple[int, int, int, int]]  # channels, filters, kernel, stride of convolutions
Unit = Callable[..., Tensor]


def _plain_unit(
    x: Tensor, conv: Any, bn: Any, activation: str = "relu", residual: Tensor | None = None
) -> Tensor:
    """activation(bn(conv(x)) + residual)."""
    out = bn(conv(x))
    if residual is not None:
        out = out + residual
    return F.relu(out) if activation == "relu" else out


def _fused_unit(
    x: Tensor, conv: Any, bn: Any, activation: str = "relu", residual: Tensor | None = None
) -> Tensor:
    """The same in two ops, or in one where bn is folded into conv."""
    call = (x, conv.weight, conv.bias, conv.stride, conv.padding)
    if isinstance(bn, nn.Identity):
        return conv2d_act(*call, activation=activation, residual=residual)
    out = conv2d_act(*call, activation="none")
    if bn.training:
        bn.num_batches_tracked.add_(1)
    return batch_norm_act(
        out,
        bn.running_mean,
        bn.running_var,
        bn.weight,
        bn.bias,
        bn.training,
        bn.momentum,
        bn.eps,
        activation=activation,
        residual=residual,
    )


def _convolution(channels: int, filters: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, filters, kernel, stride, padding=kernel // 2, bias=False)


class _Block(nn.Module):
    """Convolutions, each normalised; the block's input is added before the last ReLU."""

    def __init__(self, sizes: Sizes, unit: Unit) -> None:
        super().__init__()
        self.unit, self.depth = unit, len(sizes)
        for index, size in enumerate(sizes, 1):
            self.add_module(f"conv{index}", _convolution(*size))
            self.add_module(f"bn{index}", nn.BatchNorm2d(size[1]))
        channels, filters = sizes[0][0], sizes[-1][1]
        stride = max(size[3] for size in sizes)
        self.downsample: nn.Sequential | None = None
        if stride > 1 or channels != filters:
            shortcut = _convolution(channels, filters, 1, stride)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(filters))

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        if self.downsample is not None:
            residual = self.unit(x, *self.downsample, activation="none")
        for index in range(1, self.depth + 1):
            conv, bn = getattr(self, f"conv{index}"), getattr(self, f"bn{index}")
            x = self.unit(x, conv, bn, residual=residual if index == self.depth else None)
        return x


class _ResNet(nn.Module):
    """A stem, four stages of blocks, the mean over pixels and a linear classifier."""

    blocks: tuple[int, int, int, int]
    expansion: int  # of a block's last filters over the others

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, plain: bool = False) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.in_channels, self.plain = in_channels, plain
        self.unit: Unit = _plain_unit if plain else _fused_unit
        self.conv1 = _convolution(in_channels, 64, 7, 2)
        self.bn1 = nn.BatchNorm2d(64)
        channels = 64
        for stage, count in enumerate(self.blocks):
            blocks = []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                sizes = self._sizes(channels, 64 * 2**stage, stride)
                channels = sizes[-1][1]
                blocks.append(_Block(sizes, self.unit))
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _sizes(self, channels: int, width: int, stride: int) -> Sizes:
        if self.expansion == 1:
            return [(channels, width, 3, stride), (width, width, 3, 1)]
        # The 3x3 has the stride, as in torchvision; in the paper it is the first 1x1.
        last = (width, self.expansion * width, 1, 1)
        return [(channels, width, 1, 1), (width, width, 3, stride), last]

    def forward(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or images.shape[1] != self.in_channels:
            wanted = f"(B, {self.in_channels}, H, W)"
            raise ValueError(f"images must be {wanted}, got {tuple(images.shape)}")
        x = self.unit(images, self.conv1, self.bn1)
        x = (F.max_pool2d if self.plain else max_pool2d)(x, 3, stride=2, padding=1)
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))

    def folded(self) -> Self:
        """A copy for inference, with each normalisation in the weight and bias before it.

        It gives what the model gives in evaluation and is in that mode; what the model learns
        afterwards is no part of it.

        Example:
            >>> model = bigops.models.ResNet18().folded()
            >>> model(torch.randn(1, 3, 224, 224)).shape
            torch.Size([1, 1000])
        """
        found = copy.deepcopy(self).eval()
        for module in list(found.modules()):
            for (name, conv), (bn_name, bn) in pairwise(list(module.named_children())):
                if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d):
                    setattr(module, name, fold_batch_norm(conv, bn))
                    setattr(module, bn_name, nn.Identity())
        return found

    def extra_repr(self) -> str:
        return f"plain={self.plain}"


class ResNet18(_ResNet):
    """Eight blocks of two 3x3 convolutions; 11.7M parameters.

    Parameters and buffers have torchvision's names, shapes and initial distributions, so that its
    checkpoints load.

    Args:
        num_classes: length of the output row.
        in_channels: channels of an image.
        plain: compute with torch's own layers; parameters keep their names and initial values.

    Shapes: images (B, in_channels, H, W) -> logits (B, num_classes). H and W are any; the last
    stage sees a 32nd of each, rounded up.

    Example:
        >>> model = bigops.models.ResNet18(num_classes=10)
        >>> model(torch.randn(8, 3, 64, 64)).shape
        torch.Size([8, 10])
    """

    blocks = (2, 2, 2, 2)
    expansion = 1


class ResNet50(_ResNet):
    """Sixteen blocks of a 1x1, a 3x3 and a 1x1 convolution; 25.6M parameters.

    Args, shapes and names as in `ResNet18`.

    Example:
        >>> model = bigops.models.ResNet50(num_classes=10)
        >>> model(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """

    blocks = (3, 4, 6, 3)
    expansion = 4
