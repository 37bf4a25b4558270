"""Batch normalisation, residual and activation, each by torch's own function."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import batch_norm, relu


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    """act(batch_norm(input) + residual); in training the running statistics are updated."""
    out = batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        out = out + residual
    return relu(out) if activation == "relu" else out
