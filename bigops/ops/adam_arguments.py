"""adam's arguments, and what is said when one does not fit."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .arguments import ArgumentError
from .step_arguments import WIDE, check_lists, check_numbers, check_scalar


class Options(NamedTuple):
    """What is one value for all tensors of a call, and lists that few calls have."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    amsgrad: bool
    maximize: bool
    decoupled_weight_decay: bool
    max_grad_norm: float | None
    total_norm: Tensor | None
    grad_scale: Tensor | None
    found_inf: Tensor | None
    low_precision_params: list[Tensor] | None
    exp_avg_scales: list[Tensor] | None
    exp_avg_sq_scales: list[Tensor] | None

    @property
    def scales(self) -> dict[str, list[Tensor] | None]:
        """By name."""
        return {
            "exp_avg_scales": self.exp_avg_scales,
            "exp_avg_sq_scales": self.exp_avg_sq_scales,
        }


def check(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    options: Options,
) -> None:
    """Raise for the first argument that is wrong, naming it."""
    lists: dict[str, Any] = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if options.amsgrad:
        lists["max_exp_avg_sqs"] = max_exp_avg_sqs
    if not isinstance(state_steps, list):
        raise TypeError(f"state_steps must be a list of tensors, got {type(state_steps).__name__}")
    if len(state_steps) != len(params):
        raise ArgumentError(
            f"state_steps must have params' length {len(params)}, got {len(state_steps)}"
        )
    check_lists(params, lists, options.scales, options.low_precision_params)
    for i, step in enumerate(state_steps):
        check_scalar(f"state_steps[{i}]", step, params, WIDE)
        if step.dim() != 0:
            raise ArgumentError(f"state_steps[{i}] must have no dimensions, got {step.dim()}")
    check_options(params, options)


def check_options(params: list[Tensor], options: Options) -> None:
    """Raise for the first option that is wrong, naming it."""
    check_numbers(params, options, ("lr", "beta1", "beta2", "eps", "weight_decay"))
    if options.amsgrad and options.exp_avg_scales is not None:
        raise ArgumentError("amsgrad must be False where states are codes")
