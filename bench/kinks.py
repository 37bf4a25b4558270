"""Inputs whose gradients rounding cannot change by a jump.

Where a ReLU's input is near 0, or a pooling window near a tie, the least rounding, eager's or ours,
sends a gradient to another pixel, which says nothing about truth.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bigops import models

MARGIN = 4e-6  # several times float32's error in activations, which are around 1


class NearestKink(TorchDispatchMode):
    """Finds how near torch's ReLUs come to 0, and the two largest of its 3x3 windows, two apart
    and padded by one, to each other."""

    found = float("inf")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.relu.default:
            self.found = min(self.found, args[0].abs().min().item())
        elif func is torch.ops.aten.max_pool2d_with_indices.default:
            assert args[1:4] == ([3, 3], [2, 2], [1, 1])
            windows = F.pad(args[0], (1, 1, 1, 1)).unfold(2, 3, 2).unfold(3, 3, 2).flatten(-2)
            first, second = windows.topk(2).values.unbind(-1)
            self.found = min(self.found, (first - second)[first > 0].min().item())
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def away_from_kinks(model: models.CNN, images: Tensor) -> Tensor:
    """Which images are away from every kink of the small CNN.

    Of random images about one in seven is not.
    """
    keep = torch.ones(len(images), dtype=torch.bool, device=images.device)
    for conv in (model.conv1, model.conv2):
        windows = conv(images).unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2)
        first, second = windows.topk(2).values.unbind(-1)
        near = (first.abs() < MARGIN) | ((first > 0) & (first - second < MARGIN))
        keep &= ~near.flatten(1).any(1)
        images = first.relu()
    return keep & (model.linear1(images.flatten(1)).abs() > MARGIN).all(1)


@torch.no_grad()
def batch_away_from_kinks(
    plain: nn.Module, images: Tensor, size: int = 2, margin: float = MARGIN / 2
) -> Tensor:
    """The first `size` neighbours among the images that train a plain ResNet away from kinks.

    Only these: a batch with others has other statistics.
    """
    for rows in torch.arange(len(images)).split(size):
        with NearestKink() as nearest:
            copy.deepcopy(plain)(images[rows])
        if nearest.found > margin:
            return rows
    raise RuntimeError(f"none of {len(images)} images is away from kinks")
