"""Real handwritten digits without a download: scikit-learn carries 1797 of them in its wheel."""

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from bigops.training.outputs import InputError, require


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, size, size) in fp32, standardised by the training part; labels (N,) int64."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def load_digits(seed: int = 0, held_out: float = 0.2, size: int = 28) -> Digits:
    """The 8x8 digits, enlarged bilinearly to size x size and split by class and by `seed`.

    Raises:
        InputError: scikit-learn is missing, or the data file in its wheel cannot be read.
    """
    datasets = require("sklearn.datasets", "scikit-learn")
    selection = require("sklearn.model_selection", "scikit-learn")
    try:
        raw: Any = datasets.load_digits()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"data: scikit-learn's digits cannot be read ({_line(error)})") from error
    train_rows, test_rows = selection.train_test_split(
        range(len(raw.target)), test_size=held_out, stratify=raw.target, random_state=seed
    )
    images = torch.from_numpy(raw.images).to(torch.float32).unsqueeze(1)
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(raw.target).to(torch.int64)
    seen = images[train_rows]
    images = (images - seen.mean()) / seen.std()
    return Digits(images[train_rows], labels[train_rows], images[test_rows], labels[test_rows])


def patches(images: torch.Tensor, size: int = 4) -> torch.Tensor:
    """Cut images (B, C, H, W) into tokens (B, (H / size) * (W / size), C * size * size)."""
    return F.unfold(images, size, stride=size).transpose(1, 2).contiguous()


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
