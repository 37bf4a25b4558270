"""Batch normalisation folded into the convolution before it, for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .ops.arguments import ArgumentError

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}  # SyncBatchNorm takes any


def fold_batch_norm(conv: Any, bn: Any) -> Any:
    """A convolution that computes what `bn(conv(x))` computes in evaluation.

    Its weight is conv's times weight / sqrt(running_var + eps), filter by filter; its bias holds
    the rest. Both are computed in float64 and rounded once.

    Args:
        conv: torch.nn.Conv1d, Conv2d or Conv3d of any floating dtype, with or without bias.
        bn: the batch normalisation of conv's output, with running statistics, in training or not;
            its dtype may differ from conv's.

    Returns:
        A new convolution of torch's class, conv's dtype, device and mode, that shares nothing with
        conv or bn: both stay as they are.

    Raises:
        TypeError, ValueError (also RuntimeError): naming the argument. A convolution with more in
            its forward, as ConvReLU2d, cannot be folded: its ReLU comes before the normalisation.

    Source: Jacob et al. 2018, "Quantization and training of neural networks for efficient
    integer-arithmetic-only inference" (arXiv:1712.05877), 3.2.

    Example:
        >>> conv, bn = torch.nn.Conv2d(3, 16, 3, bias=False), torch.nn.BatchNorm2d(16).eval()
        >>> bigops.fold_batch_norm(conv, bn)(torch.randn(8, 3, 32, 32)).shape
        torch.Size([8, 16, 30, 30])
    """
    kind, weight = _convolution(conv)
    mean, var = _statistics(bn, conv, kind)
    with torch.no_grad():
        scale = torch.rsqrt(var.double() + bn.eps)
        if bn.weight is not None:
            scale = scale * bn.weight.double()
        shift = -mean.double() if conv.bias is None else conv.bias.double() - mean.double()
        bias = shift * scale
        if bn.bias is not None:
            bias = bias + bn.bias.double()
        weight = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
        folded = nn.utils.skip_init(
            kind,
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            padding_mode=conv.padding_mode,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        folded.weight = nn.Parameter(weight.to(folded.weight.dtype), conv.weight.requires_grad)
        folded.bias = nn.Parameter(bias.to(folded.weight.dtype), conv.weight.requires_grad)
    return folded.train(conv.training)


def _convolution(conv: Any) -> tuple[Any, Tensor]:
    """torch's class of conv, and its weight."""
    kind = next((k for k in CONVOLUTIONS.values() if isinstance(conv, k)), None)
    if kind is None:
        raise TypeError(f"conv must be a Conv1d, Conv2d or Conv3d, got {type(conv).__name__}")
    if type(conv).forward is not kind.forward:
        raise TypeError(
            f"conv must compute a convolution and nothing else, got {type(conv).__name__}"
        )
    if nn.parameter.is_lazy(conv.weight):
        raise ArgumentError("conv must be initialised, which a lazy one is by its first call")
    if not conv.weight.dtype.is_floating_point:
        raise ArgumentError(f"conv must be floating, got {conv.weight.dtype}")
    return kind, conv.weight


def _statistics(bn: Any, conv: Any, kind: Any) -> tuple[Tensor, Tensor]:
    """The running mean and variance of bn, which fits conv."""
    if not isinstance(bn, _BatchNorm):
        raise TypeError(f"bn must be a batch normalisation, got {type(bn).__name__}")
    for norm, dims in NORMS.items():
        if isinstance(bn, norm) and CONVOLUTIONS[dims] is not kind:
            raise TypeError(f"bn must take the output of {kind.__name__}, got {norm.__name__}")
    if bn.running_mean is None or bn.running_var is None:
        raise ArgumentError("bn must have running statistics, got track_running_stats=False")
    if bn.num_features != conv.out_channels:
        raise ArgumentError(
            f"bn must have conv's {conv.out_channels} output channels, got {bn.num_features}"
        )
    if not bn.running_mean.dtype.is_floating_point:
        raise ArgumentError(f"bn must be floating, got {bn.running_mean.dtype}")
    if bn.running_mean.device != conv.weight.device:
        raise ArgumentError(
            f"bn must be on conv's device {conv.weight.device}, got {bn.running_mean.device}"
        )
    return bn.running_mean, bn.running_var
