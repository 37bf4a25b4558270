"""Whole training steps of the reference models against their twins of torch's own layers.

A step is forward, cross-entropy, backward and the optimizer's step, on batches that rotate. The
twins start from equal parameters. Truth is judged on the loss and on every parameter's gradient,
against the plain twin in float64, with dropout off, whose random numbers are no part of truth. The
parameters after the step are not compared: Adam's first step has the length of its learning rate
whatever a gradient's size, so where a gradient is 0 (the keys' bias) it moves by rounding's sign.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigops import models, optim
from bigops.backends import native, triton
from bigops.bench import agreement, timing
from bigops.bench.cases import COMPILE, EAGER, OURS, STEP, Case, compiled
from bigops.bench.kinks import away_from_kinks, batch_away_from_kinks
from bigops.check import Comparison, compare

CHANNELS_LAST, FUSED = "channels_last", "fused"


@dataclass(frozen=True)
class Setting:
    """A model, its batch and its optimizer.

    `build(plain, dropout)` makes the model; `optimizer(plain, fused)` the optimizer's class with
    its arguments bound; `batch()` draws inputs and labels.
    """

    model: str
    name: str
    build: Callable[[bool, bool], nn.Module]
    optimizer: Callable[[bool, bool], Callable[..., torch.optim.Optimizer]]
    batch: Callable[[], tuple[Tensor, Tensor]]
    peers: tuple[str, ...]
    # Which inputs of a batch have a gradient that rounding cannot change by a jump.
    smooth: Callable[[Any, Tensor], Tensor] | None = None
    autocast: torch.dtype | None = None


class ModelCase(Case):
    """One training step of a model."""

    kind = "model"
    passes = STEP

    def __init__(self, setting: Setting, device: str, forced: str | None = None) -> None:
        self.setting, self.device, self.forced = setting, device, forced
        self.subject, self.name = setting.model, setting.name
        self.dtype = setting.autocast or torch.float32

    def peers(self) -> Sequence[str]:
        return self.setting.peers

    def backend(self) -> str:
        if self.forced is not None:
            return self.forced
        if self.device == "cpu":
            return "native" if native.why_not() is None else "reference"
        return "triton" if triton.why_not("cuda") is None else "reference"

    def _model(self, plain: bool, dropout: bool = True) -> nn.Module:
        torch.manual_seed(0)
        return self.setting.build(plain, dropout).to(self.device).train()

    def _batch(self) -> tuple[Tensor, Tensor]:
        inputs, labels = self.setting.batch()
        return inputs.to(self.device), labels.to(self.device)

    def runner(self, contestant: str, fresh: bool = False) -> timing.Call:
        plain = contestant != OURS
        model = self._model(plain)
        batches = [self._batch() for _ in range(1 if fresh else 3)]
        if contestant == CHANNELS_LAST:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            batches = [
                (inputs.to(memory_format=torch.channels_last), labels) for inputs, labels in batches
            ]
        make = self.setting.optimizer(plain, contestant == FUSED)
        optimizer = make(model.parameters())
        forward: Callable[[Tensor], Tensor] = compiled(model) if contestant == COMPILE else model

        def step(index: int) -> Tensor:
            inputs, labels = batches[index % len(batches)]
            optimizer.zero_grad()
            loss = self._loss(forward, inputs, labels)
            loss.backward()
            optimizer.step()
            return loss

        if contestant != OURS:
            return step

        def our_step(index: int) -> Tensor:
            with self.as_forced():
                return step(index)

        return our_step

    def _loss(self, forward: Callable[[Tensor], Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        wide = inputs.dtype == torch.float64
        dtype = None if wide else self.setting.autocast
        with torch.autocast(self.device, dtype=dtype, enabled=dtype is not None):
            return F.cross_entropy(forward(inputs), labels)

    def disagreement(self, peer: str) -> str | None:
        found, eager = (self._losses(contestant) for contestant in (peer, EAGER))
        return agreement.worst(found, eager, eager)

    def _losses(self, contestant: str) -> dict[str, Tensor]:
        """Of two steps, the second after an update; every contestant draws equal batches."""
        step = self.runner(contestant)
        torch.manual_seed(0)
        return {f"loss {index}": step(index).detach() for index in range(2)}

    def truth(self) -> list[Comparison]:
        inputs, labels = self._batch()
        wide = self._model(True, dropout=False).double()
        if self.setting.smooth is not None:
            rows = self.setting.smooth(wide, inputs.double())
            inputs, labels = inputs[rows], labels[rows]
        got = self._gradients(self._model(False, dropout=False), inputs, labels)
        eager = self._gradients(self._model(True, dropout=False), inputs, labels)
        reference = self._gradients(wide, inputs.double(), labels)
        return [compare(name, got[name], eager[name], reference[name]) for name in reference]

    def _gradients(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        with self.as_forced():
            loss = self._loss(model, inputs, labels)
            loss.backward()
        found = {name: _gradient(parameter) for name, parameter in model.named_parameters()}
        return found | {"loss": loss.detach()}


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _sgd(momentum: float) -> Callable[[bool, bool], Any]:
    def choose(plain: bool, fused: bool) -> Any:
        if not plain:
            return lambda params: optim.SGD(params, lr=0.01, momentum=momentum)
        return lambda params: torch.optim.SGD(
            params, lr=0.01, momentum=momentum, fused=fused or None
        )

    return choose


def _adam(plain: bool, fused: bool) -> Any:
    if not plain:
        return lambda params: optim.Adam(params, lr=1e-3)
    return lambda params: torch.optim.Adam(params, lr=1e-3, fused=fused or None)


def cnn(images: int = 256, autocast: torch.dtype | None = None) -> Setting:
    """The CNN on 28x28 images with SGD."""
    return Setting(
        "CNN",
        f"{images} images 28x28, SGD" + (", autocast" if autocast else ""),
        lambda plain, dropout: models.CNN(plain=plain),
        _sgd(0.0),
        lambda: (torch.randn(images, 1, 28, 28), torch.randint(10, (images,))),
        (CHANNELS_LAST, FUSED),
        None if autocast else away_from_kinks,
        autocast,
    )


def resnet18(images: int = 16, size: int = 64) -> Setting:
    """ResNet18 on small colour images with SGD and momentum."""
    return Setting(
        "ResNet18",
        f"{images} images {size}x{size}, SGD",
        lambda plain, dropout: models.ResNet18(num_classes=10, plain=plain),
        _sgd(0.9),
        lambda: (torch.randn(images, 3, size, size), torch.randint(10, (images,))),
        (CHANNELS_LAST, FUSED),
        batch_away_from_kinks,
    )


def transformer(
    batch: int, length: int, d_model: int, layers: int, dropout: float = 0.0
) -> Setting:
    """The encoder with Adam."""

    def build(plain: bool, with_dropout: bool) -> nn.Module:
        return models.Transformer(
            in_features=16,
            max_length=length,
            d_model=d_model,
            num_heads=d_model // 64,
            num_layers=layers,
            dim_feedforward=4 * d_model,
            dropout=dropout if with_dropout else 0.0,
            plain=plain,
        )

    return Setting(
        "Transformer",
        f"{batch}x{length} tokens, d {d_model}, {layers} layers, dropout {dropout:g}, Adam",
        build,
        _adam,
        lambda: (torch.randn(batch, length, 16), torch.randint(10, (batch,))),
        (FUSED,),
    )


def model_cases(quick: bool, device: str, forced: str | None = None) -> list[ModelCase]:
    """Both reference models; with `quick`, a smaller Transformer."""
    settings = [cnn(), cnn(autocast=torch.bfloat16)]
    if quick:
        settings.append(transformer(4, 128, 256, 2))
    else:
        settings.append(resnet18())
        settings += [transformer(4, 256, 512, 6), transformer(4, 256, 512, 6, dropout=0.1)]
    return [ModelCase(setting, device, forced) for setting in settings]
