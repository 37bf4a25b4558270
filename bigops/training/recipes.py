"""What is trained and how: a recipe holds all that decides a run, so that a run can be repeated.

Two runs of one recipe on one device and thread count give the same losses, bit for bit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from bigops.models import CNN, Transformer
from bigops.optim import SGD, Adam
from bigops.training.data import patches
from bigops.training.outputs import InputError


@dataclass(frozen=True)
class Recipe:
    """The part that all models share.

    Args:
        plain: build the model, and step it, with torch's own layers and optimizer.
        epochs: times that the training part is gone through, at least 1.
        batch_size: images a step; the last step of an epoch takes what is left.
        lr: learning rate, finite and above 0.
        seed: of the split, the initial values, the order of the data and dropout; below 2**32.

    Raises:
        InputError: a value is outside its range; the message names it.
    """

    plain: bool = False
    epochs: int = 10
    batch_size: int = 32
    lr: float = 0.01
    seed: int = 0

    name: ClassVar[str]

    def __post_init__(self) -> None:
        self._at_least_one("epochs", "batch_size")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"lr must be a finite number above 0, got {self.lr}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed must be at least 0 and below 2**32, got {self.seed}")

    def _at_least_one(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")

    def build(self) -> nn.Module:
        """A new model; its initial values come from torch's global generator."""
        raise NotImplementedError

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of the model's parameters."""
        raise NotImplementedError

    def inputs(self, images: torch.Tensor) -> torch.Tensor:
        """What the model takes, from images (B, 1, 28, 28)."""
        return images


@dataclass(frozen=True)
class CNNRecipe(Recipe):
    """`CNN` with cross-entropy and bigops' SGD."""

    name: ClassVar[str] = "cnn"

    def build(self) -> nn.Module:
        return CNN(plain=self.plain)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        sgd = torch.optim.SGD if self.plain else SGD
        return sgd(model.parameters(), lr=self.lr)


@dataclass(frozen=True)
class TransformerRecipe(Recipe):
    """`Transformer` on 49 patches of 4x4 pixels with cross-entropy and bigops' Adam.

    The size is one that learns in seconds on two cores. Dropout is off by default: it gains
    nothing at this size, and the fused attention serves every step without it.
    """

    lr: float = 0.001
    d_model: int = 64
    heads: int = 4
    layers: int = 2
    ff: int = 128
    dropout: float = 0.0

    name: ClassVar[str] = "transformer"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one("d_model", "heads", "layers", "ff")
        if self.d_model % self.heads:
            raise InputError(f"heads must divide d_model, got {self.heads} and {self.d_model}")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"dropout must be at least 0 and below 1, got {self.dropout}")

    def build(self) -> nn.Module:
        return Transformer(
            in_features=16,
            max_length=49,
            d_model=self.d_model,
            num_heads=self.heads,
            num_layers=self.layers,
            dim_feedforward=self.ff,
            dropout=self.dropout,
            plain=self.plain,
        )

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        adam = torch.optim.Adam if self.plain else Adam
        return adam(model.parameters(), lr=self.lr)

    def inputs(self, images: torch.Tensor) -> torch.Tensor:
        return patches(images)


RECIPES: Mapping[str, type[Recipe]] = {
    recipe.name: recipe for recipe in (CNNRecipe, TransformerRecipe)
}
