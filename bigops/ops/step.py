"""What adam and sgd have in common: scaling and clipping, copies of parameters, quick checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..backends import native
from ..reference import adam as reference
from ..reference import codes
from ..reference.rounding import round_to_bfloat16
from . import dispatch

PLAIN = {Tensor, torch.nn.Parameter}
COMPILING = "torch.compile fuses the reference itself"
# What the native kernels fill low_precision_params of in their own pass, of float32 parameters.
COPIES = {torch.bfloat16, torch.float16}


class Named:
    """Kernels refuse in a few words what is wrong, before they write; then `check(*args)`, which is
    slow, names it. A class, since contextlib's takes longer than some kernels."""

    __slots__ = ("_args", "_check")

    def __init__(self, check: Callable[..., None], *args: Any) -> None:
        self._check, self._args = check, args

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            self._check(*self._args)


def copy_params(params: Sequence[Tensor], options: Any) -> None:
    """To low_precision_params, in a pass of its own."""
    for copy, param in zip(options.low_precision_params or (), params, strict=False):
        copy.copy_(param)


def skipped(options: Any) -> bool:
    return options.found_inf is not None and options.found_inf.item() != 0.0


def refuse_uncounted(params: Sequence[Tensor], steps: Sequence[Tensor]) -> None:
    """Raise where a CUDA graph is captured whose replays would not count steps."""
    if not params[0].is_cuda or not torch.cuda.is_current_stream_capturing():
        return
    for i, step in enumerate(steps):
        if not step.is_cuda:
            raise RuntimeError(
                f"state_steps[{i}] must be on params' device (capturable=True) in a CUDA graph, "
                f"whose replays would not count it on {step.device}"
            )


def grad_factor(options: Any, grads: list[Tensor]) -> Tensor | float:
    """What gradients are multiplied by: the sign, the loss scale and clip_grad_norm_'s factor."""
    sign = -1.0 if options.maximize else 1.0
    factor: Any = 1.0
    if options.grad_scale is not None:
        factor = 1.0 / options.grad_scale.reshape(()).double()
    if options.max_grad_norm is not None:
        total = reference.grad_norm(grads) if options.total_norm is None else options.total_norm
        clip = options.max_grad_norm / (total.double() * factor + 1e-6)
        factor = factor * clip.clamp(max=1.0)
    return sign * factor


def own_copies(params: Sequence[Tensor], options: Any) -> list[Tensor] | None:
    """low_precision_params, if a kernel fills them itself."""
    copies = options.low_precision_params
    if not copies or {param.dtype for param in params} != {torch.float32}:
        return None
    return copies if {copy.dtype for copy in copies} <= COPIES else None


def narrower(what: str, params: Sequence[Tensor], tensors: Any) -> str | None:
    """What is wrong, for kernels that want one dtype, with a list that goes with the parameters."""
    for param, tensor in zip(params, tensors if isinstance(tensors, list) else (), strict=False):
        if isinstance(tensor, Tensor) and tensor.dtype != param.dtype:
            return f"{what} of {tensor.dtype} beside parameters of {param.dtype}"
    return None


def narrow_grads(params: Sequence[Tensor], args: Sequence[Any]) -> str | None:
    """The same of gradients; without low_precision_params `check` says that it is an error."""
    copied = args and args[-1].low_precision_params
    return narrower("gradients", params, args[0]) if copied else None


def rounding(args: Sequence[Any]) -> str | None:
    """What is wrong with a seed for kernels that round to the nearest."""
    seed = args[-1].rounding_seed if args else None
    return None if seed is None else "rounding_seed is not served yet"


def unserved(params: Sequence[Tensor]) -> Iterator[str]:
    for kind in set(map(type, params)) - PLAIN:
        yield f"tensors of type {kind.__name__} are not served yet"


def native_serves(found: Any) -> bool:
    """Whether the native kernels take what `native.kernels.collect` found as it is. They check it
    themselves, so there is nothing else to ask."""
    return found.on_cpu and dispatch.forced() in (None, "native")


# What `alike` gave for lists that were found to be right: reading their metadata is one native
# call, checking it a dozen Python ones for each tensor.
_checked: set[Any] = set()
MOST = 256


def alike(lists: Sequence[Sequence[Tensor]], options: Any = None) -> Any:
    """Equal for lists whose tensors' metadata is, those among the options too; None where it cannot
    be told quickly. The first two are the parameters and gradients."""
    copies = None if options is None else options.low_precision_params
    scales = () if options is None else options.scales.values()
    given = [copies, *scales]
    lists = [*lists, *(own for own in given if own is not None)]
    if native.kernels is None or set(map(type, lists)) != {list}:
        return None
    tensors = tuple(chain.from_iterable(lists))
    if not set(map(type, tensors)) <= PLAIN:
        return None
    # Of averages nobody asks.
    if any(any(map(Tensor.is_neg, tensors)) for tensors in (*lists[:2], copies or ())):
        return None
    found = native.kernels.signature(tensors, (), tuple(PLAIN))
    present = tuple(own is not None for own in given)
    return None if found is None else (found, present, *map(len, lists))


def known(found: Any) -> bool:
    """Whether it was remembered."""
    return found is not None and found in _checked


def remember(found: Any) -> None:
    if found is not None:
        if len(_checked) >= MOST:
            _checked.clear()
        _checked.add(found)


States = Sequence[list[Tensor]]
Scales = Sequence[list[Tensor] | None]


def widen(
    params: list[Tensor],
    states: States,
    scales: Scales,
    signed: Sequence[bool],
    seed: Tensor | None,
) -> tuple[list[Tensor], States]:
    """Parameters and states as the reference takes them: of one dtype, float32 where states are
    codes or parameters are rounded by a seed; themselves where they are."""
    coded = any(own is not None for own in scales)
    rounded = {torch.bfloat16} if seed is not None else {}
    wide = [p.float() if coded or p.dtype in rounded else p for p in params]
    found = []
    for tensors, own, sign in zip(states, scales, signed, strict=True):
        if own is not None:
            found.append([codes.decode(t, s, sign) for t, s in zip(tensors, own, strict=True)])
        else:
            found.append([t.to(p.dtype) for p, t in zip(wide, tensors, strict=False)])
    return wide, found


def narrow_params(wide: list[Tensor], params: list[Tensor], seed: Tensor | None) -> None:
    """Write back the parameters."""
    for number, (value, param) in enumerate(zip(wide, params, strict=True)):
        if seed is not None and param.dtype == torch.bfloat16:
            param.copy_(round_to_bfloat16(value, seed, number))
        elif value is not param:
            param.copy_(value)


def narrow(wide: States, states: States, scales: Scales, signed: Sequence[bool]) -> None:
    """Write back what `widen` gave, where it is not the tensor itself."""
    for new, tensors, own, sign in zip(wide, states, scales, signed, strict=True):
        for i, (value, state) in enumerate(zip(new, tensors, strict=True)):
            if own is not None:
                code, scale = codes.encode(value, sign)
                state.copy_(code)
                own[i].copy_(scale)
            elif value is not state:
                state.copy_(value)
