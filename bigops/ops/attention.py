"""attention and scaled_dot_product_attention: two faces of one op.

The torch op takes the causal bound as one number: key j is seen by query i iff
j <= i + diagonal. flash_attn's bottom-right alignment is diagonal = Sk - Sq, torch's top-left one
is diagonal = 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..backends import native, triton
from ..reference.attention import attention as reference
from . import arguments, configurations, route
from . import attention_cases as cases
from . import attention_cuda as cuda
from . import attention_fuzz as fuzz
from .arguments import ArgumentError
from .declare import Backend, Op, declare
from .dispatch import is_fast

MAX_HEAD_SIZE = 256
NO_WINDOW = (-1, -1)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    deterministic: bool | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(query @ key^T * scale + bias) @ value, blocked, without the quadratic score tensor.

    Args:
        query: (B, H, Sq, D), float32, bfloat16, float16 or float64; any strides.
        key: (B, Hk, Sk, D); H must be a multiple of Hk (grouped-query attention): query head h
            reads key head h // (H // Hk).
        value: (B, Hk, Sk, Dv); Dv may differ from D.
        causal: query i sees key j iff j <= i + Sk - Sq: aligned bottom-right, as in flash_attn.
            (`scaled_dot_product_attention` aligns top-left, as in torch.)
        window_size: (left, right): keys from i + Sk - Sq - left to i + Sk - Sq + right are seen;
            -1 is no bound.
        scale: factor of the scores; None is 1/sqrt(D).
        softcap: c > 0 replaces the scores s by c * tanh(s / c).
        alibi_slopes: (H,) or (B, H): minus slope * |i + Sk - Sq - j| is added to the scores.
        bias: broadcastable to (B, H, Sq, Sk); floating: added to the scores, bool: True attends.
        sinks: (H,): one more score per head in the softmax' denominator.
        dropout_p: probability of dropping a weight.
        deterministic: True asks for gradients of the same bits in every run, which only the CUDA
            C++ kernels do not give anyway; else `torch.use_deterministic_algorithms` decides.
        q_descale, k_descale, v_descale: (B, Hk): factors of query, key, value.
        return_lse: also return the log-sum-exp of each row's scores, (B, H, Sq), float32 (float64
            for float64), natural logarithm, differentiable.

    Returns:
        (B, H, Sq, Dv), or (out, lse). A row that sees no key gives 0 and lse -inf.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.

    Served fast: head sizes up to 256, causal, scale, GQA; on the CPU also `bias` without gradient.
    The rest runs the reference with a FallbackWarning.

    Source: Dao 2023, "FlashAttention-2"; Rabe and Staats 2021, "Self-attention does not need
    O(n^2) memory".

    Example:
        >>> q, k, v = torch.randn(3, 2, 8, 128, 64).unbind()
        >>> bigops.attention(q, k, v, causal=True).shape
        torch.Size([2, 8, 128, 64])
    """
    tensors = (query, key, value)
    # What no fast backend serves is no option of a route: such a call is checked each time.
    options = (causal, window_size, scale, softcap, dropout_p, deterministic)
    short = (
        bias is None
        and alibi_slopes is None
        and sinks is None
        and q_descale is None
        and k_descale is None
        and v_descale is None
    )
    if short and (known := route.find(OP, tensors, options)) is not None:
        out, lse = known(*tensors)
        return (out, lse) if return_lse else out
    for name, given in (("query", query), ("key", key), ("value", value)):
        arguments.tensor(name, given, dims=4)
    query, key, value = arguments.autocast(query, key, value)  # type: ignore[assignment]
    arguments.alike(query=query, key=key, value=value)
    _check_shapes(query, key, value)
    arguments.probability("dropout_p", dropout_p)
    arguments.number("softcap", softcap)
    if softcap < 0.0 or math.isnan(softcap):
        raise ArgumentError(f"softcap must be 0 (off) or positive, got {softcap}")
    left, right = _two_ints("window_size", window_size)
    batch, heads, _, head_size = query.shape
    _check_per_head("alibi_slopes", alibi_slopes, query, (heads,), (batch, heads))
    _check_per_head("sinks", sinks, query, (heads,))
    for name, descale in (("q", q_descale), ("k", k_descale), ("v", v_descale)):
        _check_per_head(f"{name}_descale", descale, query, (batch, key.shape[1]))
    group = heads // max(key.shape[1], 1)
    if q_descale is not None:
        query = query * q_descale.repeat_interleave(group, dim=1)[..., None, None].to(query.dtype)
    if k_descale is not None:
        key = key * k_descale[..., None, None].to(key.dtype)
    if v_descale is not None:
        value = value * v_descale[..., None, None].to(value.dtype)
    mask = _expanded("bias", bias, query, key)
    diagonal = key.shape[2] - query.shape[2] if causal else None
    if scale is None:
        scale = _default_scale(head_size)
    arguments.number("scale", scale)
    beyond = None
    if (left, right) != NO_WINDOW:
        beyond = "window_size is not served yet"
    elif softcap or alibi_slopes is not None or sinks is not None:
        beyond = "softcap, alibi_slopes and sinks are not served yet"
    elif dropout_p > 0.0:
        beyond = "dropout_p is not served yet"
    call = (query, key, value, mask, diagonal, float(scale), bool(deterministic))
    if is_fast(OP, call, beyond):
        if short:
            route.leave(OP, tensors, options, call)
        out, lse = OP.call(*call)
    else:
        out, lse = reference(
            *call[:6],
            window=(left, right),
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            dropout_p=dropout_p,
        )
    return (out, lse) if return_lse else out


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
    tensors, options = (query, key, value), ("top-left", is_causal, dropout_p, scale, enable_gqa)
    if attn_mask is None and (known := route.find(OP, tensors, options)) is not None:
        return known(*tensors)[0]
    for name, given in (("query", query), ("key", key), ("value", value)):
        arguments.tensor(name, given)
        if given.dim() < 2:
            raise ArgumentError(f"{name} must have 2 dimensions or more, got {tuple(given.shape)}")
    query, key, value, attn_mask = arguments.autocast(query, key, value, attn_mask)  # type: ignore[assignment]
    arguments.alike(query=query, key=key, value=value)
    if is_causal and attn_mask is not None:
        raise ArgumentError("attn_mask must be None when is_causal=True")
    arguments.probability("dropout_p", dropout_p)
    lead = query.shape[:-2]
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        query, key, value, attn_mask = _to_four(query, key, value, attn_mask)
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ArgumentError(
            f"key must have query's {query.shape[1]} heads (or set enable_gqa=True), "
            f"got {key.shape[1]}"
        )
    _check_shapes(query, key, value)
    mask = _expanded("attn_mask", attn_mask, query, key)
    if scale is None:
        scale = _default_scale(query.shape[3])
    arguments.number("scale", scale)
    call = (query, key, value, mask, 0 if is_causal else None, float(scale), False)
    beyond = "dropout_p is not served yet" if dropout_p > 0.0 else None
    if is_fast(OP, call, beyond):
        if attn_mask is None:
            route.leave(OP, tensors, options, call)
        out = OP.call(*call)[0]
    else:
        out = reference(*call[:6], dropout_p=dropout_p)[0]
    return out if len(lead) == 2 else out.reshape(*lead, *out.shape[-2:])


def _default_scale(head_size: int) -> float:
    return 1.0 / math.sqrt(head_size) if head_size else 1.0


def _two_ints(name: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ArgumentError(f"{name} must be two ints, got {value!r}")
    first, second = value
    if not isinstance(first, int) or not isinstance(second, int):
        raise ArgumentError(f"{name} must be two ints, got {value!r}")
    return first, second


def _check_per_head(
    name: str, given: Tensor | None, query: Tensor, *shapes: tuple[int, ...]
) -> None:
    if given is None:
        return
    arguments.tensor(name, given)
    if given.shape not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise ArgumentError(f"{name} must have shape {wanted}, got {tuple(given.shape)}")
    _check_device(name, given, query)


def _check_device(name: str, given: Tensor, query: Tensor) -> None:
    if given.device != query.device:
        raise ArgumentError(f"{name} must be on query's device {query.device}, got {given.device}")


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    batch, heads, _, head_size = query.shape
    if key.shape[0] != batch or value.shape[0] != batch:
        wrong = "key" if key.shape[0] != batch else "value"
        got = (key if wrong == "key" else value).shape[0]
        raise ArgumentError(f"{wrong} must have query's batch size {batch}, got {got}")
    if key.shape[3] != head_size:
        raise ArgumentError(f"key must have query's head size {head_size}, got {key.shape[3]}")
    if value.shape[1] != key.shape[1] or value.shape[2] != key.shape[2]:
        raise ArgumentError(
            f"value must have key's heads and length {tuple(key.shape[1:3])}, "
            f"got {tuple(value.shape[1:3])}"
        )
    if (heads % key.shape[1]) if key.shape[1] else heads:
        raise ArgumentError(
            f"key must have a number of heads that divides query's {heads}, got {key.shape[1]}"
        )


def _expanded(name: str, mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    if mask is None:
        return None
    arguments.tensor(name, mask)
    _check_device(name, mask, query)
    if mask.dtype not in (torch.bool, query.dtype, torch.float32):
        raise ArgumentError(f"{name} must be bool, float32 or {query.dtype}, got {mask.dtype}")
    full = (*query.shape[:3], key.shape[2])
    try:
        return mask.expand(full)
    except RuntimeError:
        raise ArgumentError(
            f"{name} must be broadcastable to {full}, got {tuple(mask.shape)}"
        ) from None


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


def _empty_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """out in query's memory order of heads and rows, and lse."""
    batch, heads, rows, head_size = query.shape
    columns = value.shape[3]
    if columns == head_size and query.is_contiguous():
        out = torch.empty_like(query)
    elif query.stride(1) < query.stride(2):
        out = query.new_empty((batch, rows, heads, columns)).transpose(1, 2)
    else:
        out = query.new_empty((batch, heads, rows, columns))
    if query.dtype in (torch.float32, torch.float64):
        return out, query.new_empty((batch, heads, rows))
    return out, query.new_empty((batch, heads, rows), dtype=torch.float32)


def _fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(query, value)


def _empty_gradients(
    query: Tensor, key: Tensor, value: Tensor, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    return (
        torch.empty_like(query) if needs[0] else None,
        torch.empty_like(key) if needs[1] else None,
        torch.empty_like(value) if needs[2] else None,
    )


def _backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    diagonal: Any,
    scale: float,
    needs: list[bool],
    deterministic: bool = False,
) -> tuple[Tensor | None, ...]:
    return _empty_gradients(query, key, value, needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, ctx.diagonal, ctx.scale, *last = inputs
    ctx.deterministic = bool(last and last[0])
    ctx.save_for_backward(query, key, value, mask, *output)
    ctx.set_materialize_grads(False)


def _backward_args(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
    query, key, value, mask, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    saved = (grad_out, grad_lse, query, key, value, mask, out, lse)
    return (*saved, ctx.diagonal, ctx.scale, ctx.needs_input_grad[:3], ctx.deterministic)


def _forward_args(grad_out: Tensor, grad_lse: Any, *rest: Any) -> tuple[Any, ...]:
    query, key, value, mask, _, _, diagonal, scale, *_ = rest
    return query, key, value, mask, diagonal, scale


def _native_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, diagonal: Any, scale: float, *_: Any
) -> tuple[Tensor, Tensor]:
    out, lse = _empty_outputs(query, value)
    if query.is_cuda:
        cuda.forward(query, key, value, out, lse, diagonal, scale)
        return out, lse
    none = (None,) * 5
    native.kernels.attention_forward(
        query, key, value, mask, *none, out, lse, *_window(diagonal), scale, 0.0, 0.0
    )
    return out, lse


def _window(diagonal: int | None) -> tuple[int, int, bool]:
    """left, right, top_left of a diagonal that is 0 or Sk - Sq."""
    return -1, -1 if diagonal is None else 0, diagonal == 0


def _native_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    diagonal: int | None,
    scale: float,
    needs: list[bool],
    deterministic: bool = False,
) -> tuple[Tensor | None, ...]:
    if query.is_cuda:
        return cuda.backward(
            grad_out, grad_lse, query, key, value, out, lse, diagonal, scale, needs, deterministic
        )
    grads = _empty_gradients(query, key, value, needs)
    none = (None,) * 5
    window = _window(diagonal)
    native.kernels.attention_backward(
        grad_out,
        grad_lse,
        query,
        key,
        value,
        mask,
        *none,
        out,
        lse,
        *window,
        scale,
        0.0,
        0.0,
        *grads,
        None,
        None,
    )
    return grads


def _head_sizes(query: Tensor, value: Tensor) -> str | None:
    if query.shape[3] > MAX_HEAD_SIZE or value.shape[3] > MAX_HEAD_SIZE:
        return f"head sizes above {MAX_HEAD_SIZE}"
    return None


def _native_why_not(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, diagonal: Any, scale: float, *_: Any
) -> str | None:
    if query.is_cuda:
        return cuda.why_not(query, key, value, mask, scale)
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        return "the mask's gradient is not served yet"
    return native.why_not() or _dtype(query, NATIVE_DTYPES) or _head_sizes(query, value)


def _triton_why_not(query: Tensor, key: Tensor, value: Tensor, mask: Any, *_: Any) -> str | None:
    if mask is not None:
        return "masks are not served yet"
    return (
        triton.why_not(query.device.type)
        or _dtype(query, TRITON_DTYPES)
        or _head_sizes(query, value)
    )


def _dtype(query: Tensor, served: tuple[torch.dtype, ...]) -> str | None:
    return None if query.dtype in served else f"dtype {query.dtype}"


def _triton_forward(*args: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import attention as kernels

    return kernels.forward(*args[:6])


def _triton_backward(*args: Any) -> tuple[Tensor | None, ...]:
    from ..kernels import attention as kernels

    return kernels.backward(*args[:11])


TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NATIVE_DTYPES = (*TRITON_DTYPES, torch.float64)


def _reference_bytes(query: Tensor, key: Tensor, *_: Any) -> int:
    return 2 * query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] * 4


OP = declare(
    Op(
        name="attention",
        schema="(Tensor query, Tensor key, Tensor value, Tensor? mask, SymInt? diagonal, "
        "float scale, bool deterministic=False) -> (Tensor, Tensor)",
        backward_schema="(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, "
        "Tensor value, Tensor? mask, Tensor out, Tensor lse, SymInt? diagonal, float scale, "
        "bool[] needs, bool deterministic=False) -> (Tensor, Tensor, Tensor)",
        function=attention,
        eager=cases.eager,
        backends=(
            Backend("native", ("cpu", "cuda"), _native_why_not, _native_forward, _native_backward),
            Backend("triton", ("cuda", "cpu"), _triton_why_not, _triton_forward, _triton_backward),
        ),
        fake=_fake,
        backward_fake=_backward_fake,
        setup_context=_setup_context,
        backward_args=_backward_args,
        forward_args=_forward_args,
        samples=cases.SAMPLES,
        arbitrary=fuzz.arbitrary,
        illegal=fuzz.illegal,
        sweeps=cases.SWEEPS,
        configurations=configurations.attention,
        dtypes=TRITON_DTYPES,
        cost=cases.cost,
        reference_bytes=_reference_bytes,
    )
)
