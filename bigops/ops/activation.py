"""The activations that ops take by name."""

from __future__ import annotations

from typing import Any

from .arguments import ArgumentError

ACTIVATIONS = ("none", "relu", "sigmoid", "tanh", "gelu", "silu")
NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}  # csrc/cpu/activation.h's
# Their slopes are not to be had from the output: what the activation was given is kept.
OF_INPUT = ("gelu", "silu")


def named(activation: Any) -> str:
    """The name of an activation; None is "none". ArgumentError for anything else."""
    if activation is None:
        return "none"
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ArgumentError(
            f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    return activation
