"""scaled_dot_product_attention: torch's face of the op attention."""

from __future__ import annotations

from torch import Tensor

from . import arguments, route
from . import attention_arguments as given
from .arguments import ArgumentError
from .attention import OP, check_shapes, reference
from .dispatch import is_fast


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, exactly.

    Args:
        query: (..., H, Sq, D). key: (..., Hk, Sk, D). value: (..., Hk, Sk, Dv).
        attn_mask: broadcastable to (..., H, Sq, Sk); floating: added, bool: True attends.
        dropout_p: probability of dropping a weight.
        is_causal: query i sees key j iff j <= i: aligned top-left. (`attention` aligns
            bottom-right.)
        scale: factor of the scores; None is 1/sqrt(D).
        enable_gqa: allow H to be a multiple of Hk.

    Returns:
        (..., H, Sq, Dv).

    Raises:
        RuntimeError (and ValueError): naming the argument that is wrong.

    Example:
        >>> q, k, v = torch.randn(3, 2, 8, 128, 64).unbind()
        >>> bigops.scaled_dot_product_attention(q, k, v, is_causal=True).shape
        torch.Size([2, 8, 128, 64])
    """
    options = ("top-left", is_causal, dropout_p, scale, enable_gqa)
    seed = given.seed(query, dropout_p)
    tensors = (query, key, value, attn_mask, None, None, seed)
    if (known := route.find(OP, tensors, options)) is not None:
        return known(*tensors)[0]
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        arguments.tensor(name, tensor)
        if tensor.dim() < 2:
            raise ArgumentError(f"{name} must have 2 dimensions or more, got {tuple(tensor.shape)}")
    # None is given for None only, which no type says.
    query, key, value, attn_mask = arguments.autocast(query, key, value, attn_mask)  # type: ignore[assignment]
    arguments.alike(query=query, key=key, value=value)
    if is_causal and attn_mask is not None:
        raise ArgumentError("attn_mask must be None when is_causal=True")
    lead = query.shape[:-2]
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        query, key, value, attn_mask = _to_four(query, key, value, attn_mask)
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ArgumentError(
            f"key must have query's {query.shape[1]} heads (or set enable_gqa=True), "
            f"got {key.shape[1]}"
        )
    check_shapes(query, key, value)
    mask = given.bias("attn_mask", attn_mask, query, (*query.shape[:3], key.shape[2]))
    scale = given.numbers(scale, 0.0, query.shape[3])
    right = 0 if is_causal else -1
    scores = (mask, None, None, seed, None, None, None)
    call = (query, key, value, *scores, -1, right, True, scale, 0.0, float(dropout_p), False)
    if is_fast(OP, call):
        route.leave(OP, tensors, options, call)
        out = OP.call(*call)[0]
    else:
        out = reference(*call[:-1])[0]
    return out if len(lead) == 2 else out.reshape(*lead, *out.shape[-2:])


def _to_four(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Fold or add leading dimensions until there are (B, H)."""
    dims = query.dim()
    if key.dim() != dims or value.dim() != dims:
        wrong = "key" if key.dim() != dims else "value"
        raise ArgumentError(f"{wrong} must have query's {dims} dimensions")
    if mask is not None and dims > 4:
        mask = mask.expand(*query.shape[:-1], key.shape[-2]).flatten(0, -4)
    if mask is not None and dims == 3 and mask.dim() == 3:
        mask = mask.unsqueeze(1)
    if dims > 4:
        return query.flatten(0, -4), key.flatten(0, -4), value.flatten(0, -4), mask
    if dims == 3:
        return query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), mask
    return query[None, None], key[None, None], value[None, None], mask
