"""attention: the op behind attention, scaled_dot_product_attention and all that is built of them.

The torch op takes what is seen as bounds: query i sees key j iff -left <= j - i - offset <= right,
where a negative bound is none and offset is Sk - Sq (flash_attn's bottom-right alignment), or 0 if
top_left (torch's). Dropout is given its seed, so that it draws the same bits again in backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import native, triton
from ..reference.attention import attention as reference
from . import arguments, configurations, route
from . import attention_arguments as given
from . import attention_cases as cases
from . import attention_cuda as cuda
from . import attention_fuzz as fuzz
from .arguments import ArgumentError
from .attention_arguments import FP8, NO_WINDOW
from .declare import Backend, Op, declare
from .dispatch import is_fast

MAX_HEAD_SIZE = 256


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
        query: (B, H, Sq, D), float32, bfloat16, float16, float64 or float8_e4m3fn; any strides.
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
        dropout_p: probability of dropping a weight, in units of 1/65536. The bits come from a seed
            that torch's generator of the device gives, the same on every backend (Philox4x32-10).
        deterministic: True asks for gradients of the same bits in every run, which only the CUDA
            C++ kernels do not give anyway; else `torch.use_deterministic_algorithms` decides.
        q_descale, k_descale, v_descale: (B, Hk): factors of query, key, value.
        return_lse: also return the log-sum-exp of each row's scores, (B, H, Sq), float32 (float64
            for float64), natural logarithm, differentiable.

    Returns:
        (B, H, Sq, Dv), of float8 in bfloat16, or (out, lse). A row that sees no key gives 0 and
        lse -inf.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.

    Served fast: head sizes up to 256. Gradients of alibi_slopes and of what is float8 run the
    reference, with a FallbackWarning.

    Source: Dao 2023, "FlashAttention-2"; Rabe and Staats 2021, "Self-attention does not need
    O(n^2) memory".

    Example:
        >>> q, k, v = torch.randn(3, 2, 8, 128, 64).unbind()
        >>> bigops.attention(q, k, v, causal=True).shape
        torch.Size([2, 8, 128, 64])
    """
    options = (causal, window_size, scale, softcap, dropout_p, deterministic)
    seed = given.seed(query, dropout_p)
    tensors = (query, key, value, bias, sinks, alibi_slopes, seed)
    plain = q_descale is None and k_descale is None and v_descale is None
    if plain and (known := route.find(OP, tensors, options)) is not None:
        out, lse = known(*tensors)
        return (out, lse) if return_lse else out
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        arguments.tensor(name, tensor, dims=4)
    query, key, value = given.autocast(query, key, value)
    arguments.alike(query=query, key=key, value=value)
    group = check_shapes(query, key, value)
    batch, heads, rows, head_size = query.shape
    scale = given.numbers(scale, softcap, head_size)
    left, right = given.bounds(window_size, causal)
    (query, key, value), descales = given.descales(
        (query, key, value),
        (q_descale, k_descale, v_descale),
        batch,
        group,
        lambda descale, _: descale[..., None, None],
    )
    scores = (
        given.bias("bias", bias, query, (batch, heads, rows, key.shape[2])),
        given.sinks(sinks, query, heads),
        given.slopes(alibi_slopes, query, batch, heads),
        seed,
        *descales,
    )
    bounds = (left, right, False, scale, float(softcap), float(dropout_p))
    call = (query, key, value, *scores, *bounds, bool(deterministic))
    if is_fast(OP, call):
        if plain:
            route.leave(OP, tensors, options, call)
        out, lse = OP.call(*call)
    else:
        out, lse = reference(*call[:-1])
    return (out, lse) if return_lse else out


def check_shapes(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Of (B, H, S, D) tensors; returns how many query heads read a key head."""
    batch, heads, _, head_size = query.shape
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[0] != batch:
            raise ArgumentError(
                f"{name} must have query's batch size {batch}, got {tensor.shape[0]}"
            )
    if key.shape[3] != head_size:
        raise ArgumentError(f"key must have query's head size {head_size}, got {key.shape[3]}")
    if value.shape[2] != key.shape[2]:
        raise ArgumentError(f"value must have key's length {key.shape[2]}, got {value.shape[2]}")
    return given.groups(heads, key, value, 1)


def empty_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """out in query's memory order of heads and rows, and lse."""
    batch, heads, rows, head_size = query.shape
    columns = value.shape[3]
    dtype = torch.bfloat16 if query.dtype == FP8 else query.dtype
    if columns == head_size and query.is_contiguous():
        out = torch.empty_like(query, dtype=dtype)
    elif query.stride(1) < query.stride(2):
        out = query.new_empty((batch, rows, heads, columns), dtype=dtype).transpose(1, 2)
    else:
        out = query.new_empty((batch, heads, rows, columns), dtype=dtype)
    if query.dtype in (torch.float32, torch.float64):
        return out, query.new_empty((batch, heads, rows))
    return out, query.new_empty((batch, heads, rows), dtype=torch.float32)


def _fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_outputs(query, value)


def empty_gradients(of: tuple[Tensor | None, ...], needs: list[bool]) -> tuple[Tensor | None, ...]:
    """Those that are needed, laid out as empty_like lays them out."""
    pairs = zip(of, needs, strict=True)
    return tuple(torch.empty_like(t) if t is not None and need else None for t, need in pairs)


def _backward_fake(*args: Any) -> tuple[Tensor | None, ...]:
    return empty_gradients(args[2:7], args[17])


DIFFERENTIABLE = 5  # query, key, value, bias, sinks


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.options = inputs[10:16]
    ctx.deterministic = bool(inputs[16:] and inputs[16])
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.set_materialize_grads(False)


def _backward_args(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
    saved = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(saved[7])
    needs = ctx.needs_input_grad[:DIFFERENTIABLE]
    return (grad_out, grad_lse, *saved, *ctx.options, needs, ctx.deterministic)


def _forward_args(grad_out: Tensor, grad_lse: Any, *rest: Any) -> tuple[Any, ...]:
    return (*rest[:7], None, None, None, *rest[9:15])


def _native_forward(*args: Any) -> tuple[Tensor, Tensor]:
    query, key, value, bias, *extras = args[:7]
    bounds = args[10:16]
    out, lse = empty_outputs(query, value)
    if query.is_cuda:
        cuda.forward(query, key, value, out, lse, *bounds[:5])
        return out, lse
    native.kernels.attention_forward(
        query, key, value, _expanded(bias, query, key), *extras, None, None, out, lse, *bounds
    )
    return out, lse


def _native_backward(
    grad_out: Tensor, grad_lse: Tensor | None, *args: Any
) -> tuple[Tensor | None, ...]:
    (query, key, value, bias, *extras), (out, lse), bounds = args[:7], args[7:9], args[9:15]
    needs, deterministic = args[15], bool(args[16:] and args[16])
    if query.is_cuda:
        left, right, top_left, scale, softcap, _ = bounds
        return cuda.backward(
            grad_out, grad_lse, query, key, value, out, lse, left, right, top_left, scale, softcap,
            needs, deterministic,
        )  # fmt: skip
    grads = empty_gradients((query, key, value, bias, extras[0]), needs)
    native.kernels.attention_backward(
        grad_out, grad_lse, query, key, value, _expanded(bias, query, key), *extras, None, None,
        out, lse, *bounds, *grads,
    )  # fmt: skip
    return grads


def _expanded(bias: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    return None if bias is None else bias.expand(*query.shape[:3], key.shape[2])


def _why_not(query: Tensor, value: Tensor, slopes: Tensor | None) -> str | None:
    """What no backend serves."""
    if query.shape[-1] > MAX_HEAD_SIZE or value.shape[-1] > MAX_HEAD_SIZE:
        return f"head sizes above {MAX_HEAD_SIZE}"
    if slopes is not None and slopes.requires_grad and torch.is_grad_enabled():
        return "the gradient of alibi_slopes"
    return None


def native_why_not(*args: Any, op: str = "attention") -> str | None:
    """Why the native kernels do not serve a call of the torch op; None if they do."""
    query, key, value, bias, sinks, slopes, seed = args[:7]
    if query.is_cuda:
        scale = args[13]
        return cuda.why_not(op, query, key, value, (bias, sinks, slopes, seed), scale)
    return native.why_not() or _dtype(query, NATIVE_DTYPES) or _why_not(query, value, slopes)


def triton_why_not(*args: Any) -> str | None:
    """Why the Triton kernels do not serve a call of the torch op; None if they do."""
    query, _, value, _, _, slopes = args[:6]
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in args[:3])
    if query.dtype == FP8 and differentiated:
        return "gradients of float8"
    reason = triton.why_not(query.device.type)
    reason = reason or _dtype(query, (*TRITON_DTYPES, FP8)) or _why_not(query, value, slopes)
    if reason is None and query.dtype == FP8:
        from ..kernels import hardware

        if hardware.of(query).arch.startswith("gfx"):
            return "float8 on AMD"
        return "a float8 bias" if args[3] is not None and args[3].dtype == FP8 else None
    return reason


def _dtype(query: Tensor, served: tuple[torch.dtype, ...]) -> str | None:
    return None if query.dtype in served else f"dtype {query.dtype}"


def _triton_forward(*args: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import attention as kernels

    return kernels.forward(*args[:16])


def _triton_backward(*args: Any) -> tuple[Tensor | None, ...]:
    from ..kernels import attention as kernels

    return kernels.backward(*args[:18])


TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NATIVE_DTYPES = (*TRITON_DTYPES, torch.float64)


def _reference_bytes(query: Tensor, key: Tensor, *_: Any) -> int:
    return 2 * query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] * 4


OP = declare(
    Op(
        name="attention",
        schema="(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? sinks, "
        "Tensor? alibi_slopes, Tensor? seed, Tensor? q_descale, Tensor? k_descale, "
        "Tensor? v_descale, SymInt left, SymInt right, bool top_left, float scale, "
        "float softcap, float dropout_p, bool deterministic=False) -> (Tensor, Tensor)",
        backward_schema="(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, "
        "Tensor value, Tensor? bias, Tensor? sinks, Tensor? alibi_slopes, Tensor? seed, "
        "Tensor out, Tensor lse, SymInt left, SymInt right, bool top_left, float scale, "
        "float softcap, float dropout_p, bool[] needs, bool deterministic=False) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor)",
        function=attention,
        eager=cases.eager,
        same_draws=cases.same_draws(attention, cases.eager),
        backends=(
            Backend("native", ("cpu", "cuda"), native_why_not, _native_forward, _native_backward),
            Backend("triton", ("cuda", "cpu"), triton_why_not, _triton_forward, _triton_backward),
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
