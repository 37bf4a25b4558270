"""What the optimizers' steps take alike, and what is said when an argument does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .arguments import ArgumentError, number

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDE = (torch.float32, torch.float64)
CODE_BLOCK = 256  # elements of a state that share a scale, as in csrc/cpu/codes.h


def check_lists(
    params: list[Tensor],
    lists: Mapping[str, Any],
    scales: Mapping[str, Any],
    copies: list[Tensor] | None,
) -> None:
    """Raise for the first of the lists that is wrong, naming it.

    lists: "grads" and states by name. scales: by name, those of the states that are codes, in the
    states' order, or None for each. copies: low_precision_params.
    """
    copies_of: Sequence[Any] = copies if isinstance(copies, list) else ()
    states = [name for name in lists if name != "grads"]
    coded = any(scale is not None for scale in scales.values())
    given = scales if coded else {}
    for name, tensors in {"params": params, **lists, **given}.items():
        _check_length(name, tensors, params)
    for i, param in enumerate(params):
        check_tensor(f"params[{i}]", param)
        if param.device != params[0].device:
            raise ArgumentError(
                f"params[{i}] must be on params[0]'s device {params[0].device}, got {param.device}"
            )
        for name, tensors in lists.items():
            codes = coded and name in states
            check_tensor(f"{name}[{i}]", tensors[i], (torch.uint8,) if codes else DTYPES)
            if name != "grads":
                wanted = _state_dtype(param, lists[states[0]][i])
            else:
                copy = copies_of[i] if i < len(copies_of) else None
                wanted = _grad_dtype(param, tensors[i], copy)
            _check_alike(f"{name}[{i}]", tensors[i], i, param, torch.uint8 if codes else wanted)
        if coded and param.dtype == torch.float64:
            raise ArgumentError(f"params[{i}] must not be float64 where states are codes")
        for name, tensors in given.items():
            check_tensor(f"{name}[{i}]", tensors[i], (torch.float32,))
            blocks = -(-param.numel() // CODE_BLOCK)
            if tuple(tensors[i].shape) != (blocks,) or not tensors[i].is_contiguous():
                raise ArgumentError(
                    f"{name}[{i}] must be contiguous and have shape ({blocks},), a number for each "
                    f"{CODE_BLOCK} elements, got {tuple(tensors[i].shape)}"
                )


def _state_dtype(param: Tensor, state: Any) -> torch.dtype:
    """What states may be of beside the parameter's dtype: bfloat16, if the first one is."""
    narrow = param.dtype != torch.float64 and getattr(state, "dtype", None) == torch.bfloat16
    return torch.bfloat16 if narrow else param.dtype


def _grad_dtype(param: Tensor, grad: Tensor, copy: Any) -> torch.dtype:
    """What a gradient may be of beside the parameter's dtype: the copy's, of a float32 master."""
    wide = isinstance(copy, Tensor) and param.dtype == torch.float32
    return grad.dtype if wide and grad.dtype == copy.dtype else param.dtype


def _check_alike(name: str, tensor: Tensor, i: int, param: Tensor, dtype: torch.dtype) -> None:
    for what, wanted in (("dtype", dtype), ("shape", param.shape), ("device", param.device)):
        got = getattr(tensor, what)
        if got != wanted:
            raise ArgumentError(f"{name} must have params[{i}]'s {what} {wanted}, got {got}")


def _check_length(name: str, tensors: Any, params: list[Tensor]) -> None:
    if not isinstance(tensors, list):
        raise TypeError(f"{name} must be a list of tensors, got {type(tensors).__name__}")
    if len(tensors) != len(params):
        raise ArgumentError(f"{name} must have params' length {len(params)}, got {len(tensors)}")


def check_low_precision(params: list[Tensor], copies: Any) -> None:
    """Raise for the first of low_precision_params that is wrong, naming it."""
    name = "low_precision_params"
    _check_length(name, copies, params)
    for i, (param, copy) in enumerate(zip(params, copies, strict=True)):
        check_tensor(f"{name}[{i}]", copy)
        for what in ("shape", "device"):
            wanted, got = getattr(param, what), getattr(copy, what)
            if got != wanted:
                raise ArgumentError(
                    f"{name}[{i}] must have params[{i}]'s {what} {wanted}, got {got}"
                )


def check_grads(grads: Sequence[Tensor]) -> None:
    """Raise for the first gradient that is none, naming it."""
    for i, grad in enumerate(grads):
        check_tensor(f"grads[{i}]", grad)
        if grad.device != grads[0].device:
            raise ArgumentError(
                f"grads[{i}] must be on grads[0]'s device {grads[0].device}, got {grad.device}"
            )


def check_numbers(params: list[Tensor], options: Any, names: Sequence[str]) -> None:
    """Raise for the first option that is wrong, naming it: `names` and those of every optimizer."""
    for name in (*names, "max_grad_norm"):
        value = getattr(options, name)
        if value is not None or name != "max_grad_norm":
            check_number(name, value, params)
    for name in ("total_norm", "grad_scale", "found_inf"):
        value = getattr(options, name)
        if value is not None:
            check_scalar(name, value, params, () if name == "found_inf" else WIDE)
    if options.low_precision_params is not None:
        check_low_precision(params, options.low_precision_params)


def check_number(name: str, value: Any, params: list[Tensor]) -> None:
    """A number, or a tensor of one."""
    if isinstance(value, Tensor):
        check_scalar(name, value, params)
    else:
        number(name, value)


def check_scalar(
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
            check_tensor(f"{name}[{i}]", value)


def check_tensor(name: str, value: Any, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise ArgumentError(f"{name} must be a dense tensor, got layout {value.layout}")
    if value.dtype not in dtypes:
        raise ArgumentError(
            f"{name} must be one of {', '.join(map(str, dtypes))}, got {value.dtype}"
        )
    if value.dim() > 8:
        raise ArgumentError(f"{name} must have 8 dimensions or fewer, got {value.dim()}")
    written = not name.startswith("grads")
    if written and any(n > 1 and s == 0 for n, s in zip(value.shape, value.stride(), strict=True)):
        raise ArgumentError(f"{name} must not be an expanded tensor: it is written")
    if value.is_neg():
        raise ArgumentError(f"{name} must not be a negative view; call resolve_neg()")
