"""adam's and grad_norm's arguments, and what is said when one does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import ArgumentError, number

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDE = (torch.float32, torch.float64)


class Options(NamedTuple):
    """What is one value for all tensors of a call."""

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
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if options.amsgrad:
        lists["max_exp_avg_sqs"] = max_exp_avg_sqs
    for name, tensors in {"params": params, **lists, "state_steps": state_steps}.items():
        if not isinstance(tensors, list):
            raise TypeError(f"{name} must be a list of tensors, got {type(tensors).__name__}")
        if len(tensors) != len(params):
            raise ArgumentError(
                f"{name} must have params' length {len(params)}, got {len(tensors)}"
            )
    for i, param in enumerate(params):
        _check_tensor(f"params[{i}]", param)
        if param.device != params[0].device:
            raise ArgumentError(
                f"params[{i}] must be on params[0]'s device {params[0].device}, got {param.device}"
            )
        for name, tensors in lists.items():
            _check_tensor(f"{name}[{i}]", tensors[i])
            for what in ("dtype", "shape", "device"):
                wanted, got = getattr(param, what), getattr(tensors[i], what)
                if got != wanted:
                    raise ArgumentError(
                        f"{name}[{i}] must have params[{i}]'s {what} {wanted}, got {got}"
                    )
        step = state_steps[i]
        _check_scalar(f"state_steps[{i}]", step, params, WIDE)
        if step.dim() != 0:
            raise ArgumentError(f"state_steps[{i}] must have no dimensions, got {step.dim()}")
    check_options(params, options)


def check_low_precision(params: list[Tensor], copies: Any) -> None:
    """Raise for the first of low_precision_params that is wrong, naming it."""
    name = "low_precision_params"
    if not isinstance(copies, list):
        raise TypeError(f"{name} must be a list of tensors, got {type(copies).__name__}")
    if len(copies) != len(params):
        raise ArgumentError(f"{name} must have params' length {len(params)}, got {len(copies)}")
    for i, (param, copy) in enumerate(zip(params, copies, strict=True)):
        _check_tensor(f"{name}[{i}]", copy)
        for what in ("shape", "device"):
            wanted, got = getattr(param, what), getattr(copy, what)
            if got != wanted:
                raise ArgumentError(
                    f"{name}[{i}] must have params[{i}]'s {what} {wanted}, got {got}"
                )


def check_grads(grads: Sequence[Tensor]) -> None:
    """Raise for the first gradient that is none, naming it."""
    for i, grad in enumerate(grads):
        _check_tensor(f"grads[{i}]", grad)
        if grad.device != grads[0].device:
            raise ArgumentError(
                f"grads[{i}] must be on grads[0]'s device {grads[0].device}, got {grad.device}"
            )


def check_options(params: list[Tensor], options: Options) -> None:
    """Raise for the first option that is wrong, naming it."""
    for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "max_grad_norm"):
        value = getattr(options, name)
        if isinstance(value, Tensor):
            _check_scalar(name, value, params)
        elif value is not None or name != "max_grad_norm":
            number(name, value)
    for name in ("total_norm", "grad_scale", "found_inf"):
        value = getattr(options, name)
        if value is not None:
            _check_scalar(name, value, params, () if name == "found_inf" else WIDE)
    if options.low_precision_params is not None:
        check_low_precision(params, options.low_precision_params)


def _check_scalar(
    name: str, value: Any, params: list[Tensor], dtypes: tuple[torch.dtype, ...] = ()
) -> None:
    """A tensor of one number, of any dtype if none is given."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ArgumentError(f"{name} must be a tensor of one number, got {value!r}")
    if dtypes and value.dtype not in dtypes:
        raise ArgumentError(f"{name} must be {' or '.join(map(str, dtypes))}, got {value.dtype}")
    devices = {torch.device("cpu"), *(param.device for param in params[:1])}
    if value.device not in devices:
        wanted = " or ".join(sorted(map(str, devices)))
        raise ArgumentError(f"{name} must be on {wanted}, got {value.device}")


def require_tensors(name: str, tensors: Any) -> None:
    """They are a list of tensors, or something like it."""
    if not hasattr(tensors, "__iter__"):
        raise TypeError(f"{name} must be a list of tensors, got {type(tensors).__name__}")
    if not all(issubclass(kind, Tensor) for kind in set(map(type, tensors))):
        for i, value in enumerate(tensors):
            _check_tensor(f"{name}[{i}]", value)


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise ArgumentError(f"{name} must be a dense tensor, got layout {value.layout}")
    if value.dtype not in DTYPES:
        raise ArgumentError(
            f"{name} must be one of {', '.join(map(str, DTYPES))}, got {value.dtype}"
        )
    if value.dim() > 8:
        raise ArgumentError(f"{name} must have 8 dimensions or fewer, got {value.dim()}")
    written = not name.startswith("grads")
    if written and any(n > 1 and s == 0 for n, s in zip(value.shape, value.stride(), strict=True)):
        raise ArgumentError(f"{name} must not be an expanded tensor: it is written")
    if value.is_neg():
        raise ArgumentError(f"{name} must not be a negative view; call resolve_neg()")
