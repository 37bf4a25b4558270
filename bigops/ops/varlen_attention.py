"""varlen_attention: attention of packed sequences, on the kernels of attention.

Packed tensors lie as (T, H, D); the native kernels see them as (1, H, T, D), which is a view.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..backends import native
from ..reference.varlen_attention import varlen_attention as reference
from . import arguments, attention_cases, configurations, route
from . import attention_arguments as given
from . import attention_cuda as cuda
from . import varlen_attention_cases as cases
from . import varlen_attention_fuzz as fuzz
from .arguments import ArgumentError
from .attention import TRITON_DTYPES, empty_gradients, native_why_not, triton_why_not
from .attention_arguments import FP8, NO_WINDOW
from .declare import Backend, Op, declare
from .dispatch import is_fast
from .registration import watched


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
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
    """`attention` of B sequences of different lengths, packed one after another.

    Args:
        query: (T, H, D). key: (Tk, Hk, D). value: (Tk, Hk, Dv); dtypes as in `attention`.
        cu_seqlens_q: (B + 1,), int32: sequence b has the rows from cu_seqlens_q[b] up to
            cu_seqlens_q[b + 1] of query. cu_seqlens_k: of key and value. A sequence may be empty.
        max_seqlen_q, max_seqlen_k: the longest sequences' lengths, or more.
        bias: broadcastable to (B, H, max_seqlen_q, max_seqlen_k), read at the places within the
            sequence.
        alibi_slopes: (H,) or (B, H). q_descale, k_descale, v_descale: (B, Hk).
        causal, window_size, scale, softcap, sinks, dropout_p, deterministic: as in `attention`,
            within each sequence; dropout drops what it drops of the sequences in a padded batch.
        return_lse: also return the log-sum-exp of each row's scores, (H, T).

    Returns:
        (T, H, Dv), or (out, lse). Rows of no sequence give 0 and lse -inf.

    Raises:
        TypeError, ValueError: naming the argument that is wrong. Only the CPU's kernels look at
            the values of cu_seqlens.

    Source: Dao 2023, "FlashAttention-2".

    Example:
        >>> q, k, v = torch.randn(3, 10, 8, 64).unbind()
        >>> starts = torch.tensor([0, 4, 10], dtype=torch.int32)
        >>> bigops.varlen_attention(q, k, v, starts, starts, 6, 6, causal=True).shape
        torch.Size([10, 8, 64])
    """
    lengths = (max_seqlen_q, max_seqlen_k)
    options = (*lengths, causal, window_size, scale, softcap, dropout_p, deterministic)
    seed = given.seed(query, dropout_p)
    none = (None, None, None)
    scores = (bias, sinks, alibi_slopes, seed)
    tensors = (query, key, value, *scores, *none, cu_seqlens_q, cu_seqlens_k)
    plain = q_descale is None and k_descale is None and v_descale is None
    if plain and (known := route.find(OP, tensors, options)) is not None:
        out, lse = known(*tensors)
        return (out, lse) if return_lse else out
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        arguments.tensor(name, tensor, dims=3)
    query, key, value = given.autocast(query, key, value)
    arguments.alike(query=query, key=key, value=value)
    _check_shapes(query, key, value)
    batch = _check_sequences(query, cu_seqlens_q, cu_seqlens_k, *lengths)
    heads, head_size = query.shape[1:]
    group = given.groups(heads, key, value, 1)
    scale = given.numbers(scale, softcap, head_size)
    left, right = given.bounds(window_size, causal)

    def of_rows(descale: Tensor, of_query: bool) -> Tensor:
        starts = cu_seqlens_q if of_query else cu_seqlens_k
        rows = torch.arange((query if of_query else key).shape[0], device=query.device)
        found = torch.searchsorted(starts[1:].contiguous(), rows, right=True)
        return descale[found.clamp(max=batch - 1)][..., None]

    (query, key, value), descales = given.descales(
        (query, key, value), (q_descale, k_descale, v_descale), batch, group, of_rows
    )
    scores = (
        given.bias("bias", bias, query, (batch, heads, *lengths)),
        given.sinks(sinks, query, heads),
        given.slopes(alibi_slopes, query, batch, heads),
        seed,
    )
    packing = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), *lengths)
    bounds = (left, right, scale, float(softcap), float(dropout_p))
    call = (query, key, value, *scores, *descales, *packing, *bounds, bool(deterministic))
    if query.device.type == "cpu" and not watched():
        _check_values(query, key, *packing)
    if is_fast(OP, call):
        if plain:
            route.leave(OP, tensors, options, call)
        out, lse = OP.call(*call)
    else:
        out, lse = reference(*call[:-1])
    return (out, lse) if return_lse else out


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    if key.shape[2] != query.shape[2]:
        raise ArgumentError(f"key must have query's head size {query.shape[2]}, got {key.shape[2]}")
    if value.shape[0] != key.shape[0]:
        raise ArgumentError(f"value must have key's {key.shape[0]} rows, got {value.shape[0]}")


def _check_sequences(
    query: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_q: int, max_k: int
) -> int:
    """Returns how many there are."""
    for name, starts in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        arguments.tensor(name, starts, dims=1)
        given.on_device(name, starts, query)
        if starts.dtype != torch.int32:
            raise ArgumentError(f"{name} must be int32, got {starts.dtype}")
    for name, longest in (("max_seqlen_q", max_q), ("max_seqlen_k", max_k)):
        if not isinstance(longest, int | torch.SymInt) or isinstance(longest, bool):
            raise TypeError(f"{name} must be an int, got {longest!r}")
        if longest < 0:
            raise ArgumentError(f"{name} must not be negative, got {longest}")
    if cu_seqlens_q.shape[0] == 0:
        raise ArgumentError("cu_seqlens_q must have an element more than there are sequences")
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ArgumentError(
            f"cu_seqlens_k must be as long as cu_seqlens_q, {cu_seqlens_q.shape[0]}, "
            f"got {cu_seqlens_k.shape[0]}"
        )
    return cu_seqlens_q.shape[0] - 1


def _check_values(
    query: Tensor, key: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_q: int, max_k: int
) -> None:
    """Of tensors on the CPU, where it costs nothing. The native kernels do so in any case."""
    for side, starts, rows, most in (
        ("q", cu_seqlens_q, query.shape[0], max_q),
        ("k", cu_seqlens_k, key.shape[0], max_k),
    ):
        values = starts.tolist()
        if values[0] < 0 or values[-1] > rows or values != sorted(values):
            raise ArgumentError(f"cu_seqlens_{side} must rise from 0 or more to {rows} at most")
        if any(end - start > most for start, end in pairwise(values)):
            raise ArgumentError(
                f"max_seqlen_{side} must not be below the longest sequence's length"
            )


def _empty_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    rows, heads, _ = query.shape
    dtype = torch.bfloat16 if query.dtype == FP8 else query.dtype
    out = query.new_empty((rows, heads, value.shape[2]), dtype=dtype)
    return out, query.new_empty((heads, rows), dtype=given.lse_dtype(query))


def _fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(query, value)


def _backward_fake(*args: Any) -> tuple[Tensor | None, ...]:
    return empty_gradients(args[2:7], args[20])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.options = inputs[12:19]
    ctx.deterministic = bool(inputs[19:] and inputs[19])
    ctx.save_for_backward(*inputs[:7], *output, *inputs[10:12])
    ctx.set_materialize_grads(False)


def _backward_args(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
    saved = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(saved[7])
    needs = ctx.needs_input_grad[:5]
    return (grad_out, grad_lse, *saved, *ctx.options, needs, ctx.deterministic)


def _forward_args(grad_out: Tensor, grad_lse: Any, *rest: Any) -> tuple[Any, ...]:
    return (*rest[:7], None, None, None, *rest[9:18])


def _heads_first(t: Tensor) -> Tensor:
    return t.transpose(0, 1).unsqueeze(0)


def _padded_call(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of attention's torch op that come nearest."""
    left, right, *rest = args[14:19]
    tensors = (None if t is None else _heads_first(t) for t in args[:3])
    return (*tensors, *args[3:10], left, right, False, *rest)


def _native_why_not(*args: Any) -> str | None:
    return native_why_not(*_padded_call(args), op="varlen_attention")


def _triton_why_not(*args: Any) -> str | None:
    if args[10].shape[0] == 1 and args[0].shape[0] + args[1].shape[0]:
        return "rows without a sequence"  # the last sequence clears what is outside of all
    return triton_why_not(*_padded_call(args))


def _native_forward(*args: Any) -> tuple[Tensor, Tensor]:
    out, lse = _empty_outputs(args[0], args[2])
    query, key, value, written = (_heads_first(t) for t in (*args[:3], out))
    bias, sinks, slopes, seed = args[3:7]
    starts, lengths, (left, right, *rest) = args[10:12], args[12:14], args[14:19]
    rows = lse.unsqueeze(0)
    if query.is_cuda:
        out.zero_()
        lse.fill_(float("-inf"))
        packed, (scale, softcap, _) = (*starts, *lengths), rest
        cuda.forward(query, key, value, written, rows, left, right, False, scale, softcap, packed)
        return out, lse
    native.kernels.attention_forward(
        query, key, value, _expanded(bias, query, starts, lengths), sinks, slopes, seed, *starts,
        written, rows, left, right, False, *rest,
    )  # fmt: skip
    return out, lse


def _native_backward(
    grad_out: Tensor, grad_lse: Tensor | None, *args: Any
) -> tuple[Tensor | None, ...]:
    query, key, value, bias, sinks, slopes, seed, out, lse = args[:9]
    starts, lengths, (left, right, *rest) = args[9:11], args[11:13], args[13:18]
    needs, deterministic = args[18], bool(args[19:] and args[19])
    d_out, d_lse = _heads_first(grad_out), None if grad_lse is None else grad_lse.unsqueeze(0)
    q, k, v, o = (_heads_first(t) for t in (query, key, value, out))
    rows = lse.unsqueeze(0)
    if query.is_cuda:
        packed = (*starts, *lengths)
        found = cuda.backward(
            d_out, d_lse, q, k, v, o, rows, left, right, False, rest[0], rest[1], needs,
            deterministic, packed,
        )  # fmt: skip
        return tuple(None if g is None else g[0].transpose(0, 1) for g in found)
    grads = empty_gradients((query, key, value, bias, sinks), needs)
    written = [None if g is None else _heads_first(g) for g in grads[:3]]
    native.kernels.attention_backward(
        d_out, d_lse, q, k, v, _expanded(bias, q, starts, lengths), sinks, slopes, seed, *starts,
        o, rows, left, right, False, *rest, *written, *grads[3:],
    )  # fmt: skip
    return grads


def _expanded(
    bias: Tensor | None, query: Tensor, starts: tuple[Tensor, Tensor], lengths: tuple[int, int]
) -> Tensor | None:
    if bias is None:
        return None
    return bias.expand(starts[0].shape[0] - 1, query.shape[1], *lengths)


def _triton_forward(*args: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import attention as kernels

    packing, (left, right, *rest) = args[10:14], args[14:19]
    return kernels.forward(*args[:10], left, right, False, *rest, *packing)


def _triton_backward(*args: Any) -> tuple[Tensor | None, ...]:
    from ..kernels import attention as kernels

    packing, (left, right, *rest), needs = args[11:15], args[15:20], args[20]
    return kernels.backward(*args[:11], left, right, False, *rest, needs, *packing)


def _reference_bytes(query: Tensor, *args: Any) -> int:
    batch, (longest_q, longest_k) = args[9].shape[0] - 1, args[11:13]
    return 2 * batch * query.shape[1] * longest_q * longest_k * 4


OP = declare(
    Op(
        name="varlen_attention",
        schema="(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? sinks, "
        "Tensor? alibi_slopes, Tensor? seed, Tensor? q_descale, Tensor? k_descale, "
        "Tensor? v_descale, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
        "SymInt max_seqlen_k, SymInt left, SymInt right, float scale, float softcap, "
        "float dropout_p, bool deterministic=False) -> (Tensor, Tensor)",
        backward_schema="(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, "
        "Tensor value, Tensor? bias, Tensor? sinks, Tensor? alibi_slopes, Tensor? seed, "
        "Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
        "SymInt max_seqlen_k, SymInt left, SymInt right, float scale, float softcap, "
        "float dropout_p, bool[] needs, bool deterministic=False) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor)",
        function=varlen_attention,
        eager=cases.eager,
        same_draws=attention_cases.same_draws(varlen_attention, cases.eager),
        backends=(
            Backend(
                "native",
                ("cpu", "cuda"),
                _native_why_not,
                _native_forward,
                _native_backward,
                dict.fromkeys(("aten::zero_", "aten::fill_"), "on CUDA: rows of no sequence"),
            ),
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
        configurations=configurations.varlen_attention,
        dtypes=TRITON_DTYPES,
        cost=cases.cost,
        reference_bytes=_reference_bytes,
    )
)
