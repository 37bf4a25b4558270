"""Max-pooling by torch's own function."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F


def max_pool2d(input: Tensor, *options: Any) -> Any:
    """The windows' maxima and, if wanted, where in the image they are.

    options: kernel, stride, padding, dilation, ceil_mode, return_indices.
    """
    return F.max_pool2d(input, *options)
