"""A small convolutional classifier: two blocks of convolution, ReLU and pooling, two linear layers.

A block in eager PyTorch writes the convolution's output, the rectified output and the pooled
output, and keeps all three for the backward pass. Here each block is one op that keeps the pooled
output and one byte per window.
"""

import torch
from torch import nn
from torch.nn import functional as F

from bigops.functional import conv2d_relu_max_pool2d


class CNN(nn.Module):
    """Conv(32) - ReLU - pool - Conv(64) - ReLU - pool - Linear(128) - ReLU - Linear(num_classes).

    Convolutions are 3x3 with padding 1, pools 2x2 (a last odd row or column is dropped, as torch
    drops it).

    Args:
        input_size: height and width of an image in pixels, at least 4.
        num_classes: length of the output row.
        in_channels: channels of an image.
        plain: compute with torch's own layers; parameters keep their names and initial values.

    Shapes: images (B, in_channels, input_size, input_size) -> logits (B, num_classes).

    Example:
        >>> model = CNN()
        >>> model(torch.randn(8, 1, 28, 28)).shape
        torch.Size([8, 10])
    """

    def __init__(
        self,
        input_size: int = 28,
        num_classes: int = 10,
        in_channels: int = 1,
        plain: bool = False,
    ) -> None:
        super().__init__()
        if input_size < 4:
            raise ValueError(f"input_size must be at least 4 (two 2x2 pools), got {input_size}")
        self.image_shape = (in_channels, input_size, input_size)
        self.plain = plain
        self.conv1 = nn.Conv2d(in_channels, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.linear1 = nn.Linear(64 * (input_size // 4) ** 2, 128)
        self.linear2 = nn.Linear(128, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[1:] != self.image_shape:
            wanted = ", ".join(str(n) for n in self.image_shape)
            raise ValueError(f"images must be (B, {wanted}), got {tuple(images.shape)}")
        features = self._block(self.conv2, self._block(self.conv1, images))
        return self.linear2(F.relu(self.linear1(features.flatten(1))))

    def _block(self, conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        if self.plain:
            return F.max_pool2d(F.relu(conv(x)), 2)
        return conv2d_relu_max_pool2d(x, conv.weight, conv.bias, padding=1, pool_kernel_size=2)

    def extra_repr(self) -> str:
        return f"plain={self.plain}"
