"""sgd's arguments, and what is said when one does not fit."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .step_arguments import check_lists, check_number, check_numbers


class Options(NamedTuple):
    """What is one value for all tensors of a call, and lists that few calls have."""

    lr: float | Tensor
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    is_first_step: bool
    max_grad_norm: float | None
    total_norm: Tensor | None
    grad_scale: Tensor | None
    found_inf: Tensor | None
    low_precision_params: list[Tensor] | None
    momentum_buffer_scales: list[Tensor] | None
    rounding_seed: Tensor | None

    @property
    def scales(self) -> dict[str, list[Tensor] | None]:
        """By name."""
        return {"momentum_buffer_scales": self.momentum_buffer_scales}


def check(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    options: Options,
) -> None:
    """Raise for the first argument that is wrong, naming it."""
    check_number("momentum", options.momentum, params)
    lists: dict[str, Any] = {"grads": grads}
    scales: dict[str, Any] = {}
    if options.momentum != 0:
        lists["momentum_buffers"] = momentum_buffers
        scales = options.scales
    check_lists(params, lists, scales, options.low_precision_params)
    check_options(params, options)


def check_options(params: list[Tensor], options: Options) -> None:
    """Raise for the first option that is wrong, naming it."""
    check_numbers(params, options, ("lr", "momentum", "dampening", "weight_decay"))
