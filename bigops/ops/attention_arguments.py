"""What the functions of attention ask of their arguments, padded and packed alike."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import arguments
from .arguments import ArgumentError

FP8 = torch.float8_e4m3fn
NO_WINDOW = (-1, -1)


def numbers(scale: float | None, softcap: float, head_size: int) -> float:
    """Check them; returns the scale."""
    arguments.number("softcap", softcap)
    if not softcap >= 0.0:  # nor NaN
        raise ArgumentError(f"softcap must be 0 (off) or positive, got {softcap}")
    if scale is None:
        return 1.0 / math.sqrt(head_size) if head_size else 1.0
    arguments.number("scale", scale)
    return float(scale)


def bounds(window_size: tuple[int, int], causal: bool) -> tuple[int, int]:
    """(left, right) of the window, -1 for no bound; causal bounds the right by 0."""
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise ArgumentError(f"window_size must be two ints, got {window_size!r}")
    left, right = window_size
    if not isinstance(left, int) or not isinstance(right, int):
        raise ArgumentError(f"window_size must be two ints, got {window_size!r}")
    return max(left, -1), 0 if causal else max(right, -1)


def seed(query: Tensor, dropout_p: float) -> Tensor | None:
    """What dropout draws its bits by, one int64 of torch's generator; None without dropout."""
    if dropout_p.__class__ is float and dropout_p == 0.0:
        return None
    arguments.probability("dropout_p", dropout_p)
    arguments.tensor("query", query)
    if dropout_p == 0.0:
        return None
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=query.device)


def autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As torch's matrix products; float8 is low enough."""
    if query.dtype == FP8:
        return query, key, value
    # None is given for None only, which no type says.
    return arguments.autocast(query, key, value)  # type: ignore[return-value]


def groups(query_heads: int, key: Tensor, value: Tensor, dim: int) -> int:
    """How many query heads read a key head; heads are dimension `dim`."""
    heads = key.shape[dim]
    if value.shape[dim] != heads:
        raise ArgumentError(f"value must have key's {heads} heads, got {value.shape[dim]}")
    if (query_heads % heads) if heads else query_heads:
        raise ArgumentError(
            f"key must have a number of heads that divides query's {query_heads}, got {heads}"
        )
    return query_heads // max(heads, 1)


def per_head(name: str, given: Tensor | None, query: Tensor, *shapes: tuple[int, ...]) -> None:
    """`given` is None or of one of the shapes, on query's device."""
    if given is None:
        return
    arguments.tensor(name, given)
    if not any(tuple(given.shape) == shape for shape in shapes):
        wanted = " or ".join(map(str, shapes))
        raise ArgumentError(f"{name} must have shape {wanted}, got {tuple(given.shape)}")
    on_device(name, given, query)


def on_device(name: str, given: Tensor, query: Tensor) -> None:
    """`given` is where query is."""
    if given.device != query.device:
        raise ArgumentError(f"{name} must be on query's device {query.device}, got {given.device}")


def slopes(given: Tensor | None, query: Tensor, batch: int, heads: int) -> Tensor | None:
    """alibi_slopes as (B, H) in lse's dtype."""
    per_head("alibi_slopes", given, query, (heads,), (batch, heads))
    return None if given is None else given.to(lse_dtype(query)).expand(batch, heads)


def sinks(given: Tensor | None, query: Tensor, heads: int) -> Tensor | None:
    """sinks in lse's dtype."""
    per_head("sinks", given, query, (heads,))
    return None if given is None else given.to(lse_dtype(query)).contiguous()


def bias(name: str, given: Tensor | None, query: Tensor, full: tuple[int, ...]) -> Tensor | None:
    """A bias of four dimensions, each 1 or as in `full`."""
    if given is None:
        return None
    arguments.tensor(name, given)
    on_device(name, given, query)
    if given.dtype not in (torch.bool, query.dtype, torch.float32):
        raise ArgumentError(f"{name} must be bool, float32 or {query.dtype}, got {given.dtype}")
    try:
        given.expand(full)
    except RuntimeError:
        raise ArgumentError(
            f"{name} must be broadcastable to {full}, got {tuple(given.shape)}"
        ) from None
    return given if given.dim() == 4 else given[(None,) * (4 - given.dim())]


def descales(
    tensors: tuple[Tensor, Tensor, Tensor],
    given: tuple[Tensor | None, Tensor | None, Tensor | None],
    batch: int,
    group: int,
    factors: Any,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Tensors and descales as the op takes them: it multiplies float8's, all others are multiplied
    here. factors(descale, of_query) is broadcastable to the tensor."""
    query, key, value = tensors
    heads = key.shape[1]
    for name, one in zip(("q_descale", "k_descale", "v_descale"), given, strict=True):
        per_head(name, one, query, (batch, heads))
    if query.dtype == FP8:
        q, k, v = (None if one is None else one.float().contiguous() for one in given)
        return tensors, (q, k, v)
    if given[0] is not None:
        repeated = given[0].repeat_interleave(group, dim=1)
        query = query * factors(repeated, True).to(query.dtype)
    if given[1] is not None:
        key = key * factors(given[1], False).to(key.dtype)
    if given[2] is not None:
        value = value * factors(given[2], False).to(value.dtype)
    return (query, key, value), (None, None, None)


def lse_dtype(query: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32
