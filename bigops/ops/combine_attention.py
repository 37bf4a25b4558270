"""combine_attention: attention over disjoint sets of keys, put together exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import native
from ..reference.combine_attention import combine_attention as reference
from . import arguments, configurations, route
from . import combine_attention_cases as cases
from .arguments import ArgumentError
from .attention_arguments import lse_dtype
from .declare import Backend, Op, declare
from .dispatch import is_fast

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def combine_attention(
    outs: Tensor | Sequence[Tensor], lses: Tensor | Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Attention over all keys out of attention over N disjoint sets of them.

        lse = log(sum_n exp(lses[n])),  out = sum_n exp(lses[n] - lse) * outs[n]

    So a long sequence can be split over devices: each computes `attention(..., return_lse=True)`
    over the keys that it holds, and the parts are combined.

    Args:
        outs: (N, B, H, S, Dv), N at least 1, or a list of N of (B, H, S, Dv), which is stacked;
            float32, bfloat16, float16 or (native) float64. Best float32: a part that is rounded
            to 16 bits stays rounded.
        lses: (N, B, H, S) or a list, float32 (float64 for float64). Where one is -inf, its part
            weighs nothing, whatever its out.

    Returns:
        (out, lse): (B, H, S, Dv) in outs' dtype and (B, H, S) in lses'; 0 and -inf where all parts
        are -inf. Both are differentiable in outs and lses.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.

    Source: Rabe and Staats 2021, "Self-attention does not need O(n^2) memory"; Dao et al. 2023,
    "Flash-Decoding for long-context inference".

    Example:
        >>> q, k, v = torch.randn(3, 2, 8, 128, 64).unbind()
        >>> parts = [bigops.attention(q, k[:, :, half], v[:, :, half], return_lse=True)
        ...          for half in (slice(0, 64), slice(64, 128))]
        >>> out, lse = bigops.combine_attention(*zip(*parts))
    """
    # Lists are stacked first: such a call is checked each time.
    given = (outs, lses) if isinstance(outs, Tensor) and isinstance(lses, Tensor) else None
    if given is not None and (known := route.find(OP, given, ())) is not None:
        return known(*given)
    outs, lses = _stacked("outs", outs, 4), _stacked("lses", lses, 3)
    if not outs.dtype.is_floating_point:
        raise ArgumentError(f"outs must be floating, got {outs.dtype}")
    if outs.shape[0] == 0:
        raise ArgumentError("outs must have at least one part, got none")
    if lses.shape != outs.shape[:4]:
        raise ArgumentError(
            f"lses must have outs' shape without the last dimension {tuple(outs.shape[:4])}, "
            f"got {tuple(lses.shape)}"
        )
    if lses.dtype != lse_dtype(outs):
        raise ArgumentError(f"lses must be {lse_dtype(outs)} for {outs.dtype}, got {lses.dtype}")
    if lses.device != outs.device:
        raise ArgumentError(f"lses must be on outs' device {outs.device}, got {lses.device}")
    call = (outs, lses)
    if is_fast(OP, call):
        if given is not None:
            route.leave(OP, given, (), call)
        return OP.call(*call)
    return reference(*call)


def _stacked(name: str, given: Any, dims: int) -> Tensor:
    if not isinstance(given, Tensor):
        if not isinstance(given, list | tuple) or not given:
            raise TypeError(
                f"{name} must be a torch.Tensor or a list of them, got {type(given).__name__}"
            )
        for i, part in enumerate(given):
            arguments.tensor(f"{name}[{i}]", part, dims=dims)
            if part.shape != given[0].shape or part.dtype != given[0].dtype:
                raise ArgumentError(
                    f"{name}[{i}] must have {name}[0]'s shape {tuple(given[0].shape)} and dtype "
                    f"{given[0].dtype}, got {tuple(part.shape)} and {part.dtype}"
                )
            if part.device != given[0].device:
                raise ArgumentError(
                    f"{name}[{i}] must be on {name}[0]'s device {given[0].device}, "
                    f"got {part.device}"
                )
        given = torch.stack(tuple(given))
    arguments.tensor(name, given, dims=dims + 1)
    return given


def _fake(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


def _empty_gradients(
    outs: Tensor, lses: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    return (
        outs.new_empty(outs.shape) if needs[0] else None,
        lses.new_empty(lses.shape) if needs[1] else None,
    )


def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor, outs: Tensor, lses: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    return _empty_gradients(outs, lses, needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _backward_args(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> Any:
    return (grad_out, grad_lse, *ctx.saved_tensors, ctx.needs_input_grad[:2])


def _forward_args(
    grad_out: Tensor, grad_lse: Tensor, outs: Tensor, lses: Tensor, needs: Any
) -> tuple[Any, ...]:
    return outs, lses


def _native_forward(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = _fake(outs, lses)
    native.kernels.combine_attention(outs, lses, out, lse)
    return out, lse


def _native_backward(
    grad_out: Tensor, grad_lse: Tensor, outs: Tensor, lses: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    grads = _empty_gradients(outs, lses, needs)
    native.kernels.combine_attention_backward(grad_out, grad_lse, outs, lses, *grads)
    return grads


def _native_why_not(outs: Tensor, lses: Tensor) -> str | None:
    if outs.dtype not in (*DTYPES, torch.float64):
        return f"dtype {outs.dtype}"
    return native.why_not()


OP = declare(
    Op(
        name="combine_attention",
        schema="(Tensor outs, Tensor lses) -> (Tensor, Tensor)",
        backward_schema="(Tensor grad_out, Tensor grad_lse, Tensor outs, Tensor lses, bool[] needs)"
        " -> (Tensor, Tensor)",
        function=combine_attention,
        eager=cases.eager,
        backends=(
            Backend("native", ("cpu",), _native_why_not, _native_forward, _native_backward),
            Backend.triton("bigops.kernels.combine_attention"),
        ),
        fake=_fake,
        backward_fake=_backward_fake,
        setup_context=_setup_context,
        backward_args=_backward_args,
        forward_args=_forward_args,
        samples=cases.SAMPLES,
        arbitrary=cases.arbitrary,
        illegal=cases.illegal,
        sweeps=cases.SWEEPS,
        configurations=configurations.combine_attention,
        dtypes=DTYPES,
        cost=cases.cost,
    )
)
