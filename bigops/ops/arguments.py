"""Checks of a call's arguments, shared by all ops. They read metadata only."""

from __future__ import annotations

from typing import Any

import torch


class ArgumentError(ValueError, RuntimeError):
    """A bad argument. Both kinds at once: torch's own functions raise RuntimeError for most of
    these, so that code written for either keeps working."""


def tensor(name: str, value: Any, dims: int | None = None) -> None:
    """`value` is a dense tensor, of `dims` dimensions if given."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if dims is not None and value.dim() != dims:
        raise ArgumentError(f"{name} must have {dims} dimensions, got shape {tuple(value.shape)}")
    if value.layout != torch.strided:
        raise ArgumentError(f"{name} must be a dense tensor, got layout {value.layout}")


def alike(**tensors: torch.Tensor | None) -> None:
    """All given tensors share dtype and device with the first, which is floating."""
    (first_name, first), *others = tensors.items()
    assert first is not None
    if not first.dtype.is_floating_point:
        raise ArgumentError(f"{first_name} must be floating, got {first.dtype}")
    for name, other in others:
        if other is None:
            continue
        if other.dtype != first.dtype:
            raise ArgumentError(
                f"{name} must have {first_name}'s dtype {first.dtype}, got {other.dtype}"
            )
        if other.device != first.device:
            raise ArgumentError(
                f"{name} must be on {first_name}'s device {first.device}, got {other.device}"
            )


def number(name: str, value: Any) -> None:
    """`value` can be taken for a real number, as no string can."""
    # int and float first: torch.compile asks no symbol of its own for its attributes.
    if not (isinstance(value, int | float) or hasattr(value, "__float__")):
        raise TypeError(f"{name} must be a number, got {value!r}")


def probability(name: str, value: float) -> None:
    """`value` is in [0, 1]."""
    number(name, value)
    if not 0.0 <= value <= 1.0:
        raise ArgumentError(f"{name} must be in [0, 1], got {value}")


def autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Under torch.autocast, the tensors in its lower precision, as for torch's matrix products.

    As in torch, float64 is left alone.
    """
    device = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype)
        if t is not None and t.dtype.is_floating_point and t.dtype != torch.float64
        else t
        for t in tensors
    )
