"""Attention's launchers; the kernels are in attention_forward.py, attention_backward.py and
attention_extras.py, their tiles in attention_configurations.py.

Dense tensors are (B, H, S, D). Packed ones are (T, H, D) with cu_seqlens and the longest
sequences' lengths; their lse is (H, T). A dimension of bias is 1 or full.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import hardware
from .attention_backward import delta_kernel, grad_key_value_kernel, grad_query_kernel
from .attention_configurations import tf32, tiles_for
from .attention_extras import grad_bias_kernel, grad_sinks_kernel, refine_kernel
from .attention_forward import forward_kernel
from .launch import launch, made, replayed
from .philox import dropout_terms

FP8 = torch.float8_e4m3fn
DELTA = ("heads", "planes", "pitch", "total_q", "HEAD_V", "DIM_V", "PRECISION")


def _config(
    kernel: str,
    query: Tensor,
    value: Tensor,
    common: dict[str, Any],
    packed: bool,
    reads: Sequence[Tensor],
    seed: Tensor | None,
    *given: Tensor | None,
    describable: bool = True,
) -> dict[str, Any]:
    """The tiles of a kernel that walks over the rows of `reads`, and whether by descriptors.

    What takes registers counts: features of scores (dropout's generator for two), fp8 that becomes
    fp16, and, unless descriptors know them, the addresses of packed rows and of rows that start
    anywhere."""
    described = describable and _described(*reads)
    features = (seed, seed, *given)
    pressure = sum(t is not None for t in features) + common["LEFT"] + common["SOFTCAP"]
    pressure += query.dtype == torch.uint8
    if not described:
        pressure += not all(map(_regular, reads))
    if not described or kernel == "grad_key_value":  # whose rows' numbers have their addresses then
        pressure += packed
    return {**tiles_for(kernel, query, value, pressure), "DESCRIBED": described}


class Sizes(NamedTuple):
    """seq_*: of a sequence, packed of the longest one; total_*: of a tensor's line of rows."""

    batch: int
    heads: int
    heads_k: int
    seq_q: int
    seq_k: int
    total_q: int
    total_k: int

    @property
    def group(self) -> int:
        return self.heads // max(self.heads_k, 1)


def _sizes(query: Tensor, key: Tensor, cu: Tensor | None, longest_q: int, longest_k: int) -> Sizes:
    if cu is None:
        batch, heads, seq_q, _ = query.shape
        heads_k, seq_k = key.shape[1:3]
        return Sizes(batch, heads, heads_k, seq_q, seq_k, seq_q, seq_k)
    # A program at least, which sees to the rows outside of all sequences.
    longest = max(longest_q, 1), max(longest_k, 1)
    total_q, heads, _ = query.shape
    return Sizes(cu.numel() - 1, heads, key.shape[1], *longest, total_q, key.shape[0])


def _strides(tensor: Tensor, packed: bool) -> tuple[int, ...]:
    """Of batch, head, row, column."""
    if not packed:
        return tensor.stride()
    row, head, column = tensor.stride()
    return 0, head, row, column


def _common(
    query: Tensor,
    value: Tensor,
    bias: Tensor | None,
    slopes: Tensor | None,
    sizes: Sizes,
    window: tuple[int, int, bool],
    packed: bool,
    scale: float,
    softcap: float,
    dropout_p: float,
    descaled: bool = False,
) -> dict[str, Any]:
    """The arguments that all kernels share."""
    left, right, top_left = window
    reach_q, reach_k = sizes.seq_q - 1, sizes.seq_k - 1
    # Packed, the kernels add each sequence's own offset.
    offset = 0 if top_left or packed else sizes.seq_k - sizes.seq_q
    # Clamping changes nothing that exists and keeps the kernels' sums within 32 bits.
    far = sizes.seq_q + sizes.seq_k
    threshold, kept = dropout_terms(dropout_p)
    shaped = softcap > 0.0 or slopes is not None or descaled
    shaped = shaped or (bias is not None and bias.dtype != torch.bool)
    # tl.dot wants powers of two, 16 at least and 32 bytes.
    least = 32 if query.element_size() == 1 else 16
    return {
        "heads": sizes.heads,
        "group": sizes.group,
        "seq_q": sizes.seq_q,
        "seq_k": sizes.seq_k,
        "total_q": sizes.total_q,
        "total_k": sizes.total_k,
        "leftmost": offset - min(left, far),
        "rightmost": offset + min(right, far),
        "scale": scale,
        "softcap": softcap,
        "threshold": threshold,
        "kept": kept,
        "HEAD": query.shape[-1],
        "HEAD_V": value.shape[-1],
        "DIM": max(least, triton.next_power_of_2(query.shape[-1])),
        "DIM_V": max(least, triton.next_power_of_2(value.shape[-1])),
        # A bound that hides nothing is none.
        "LEFT": 0 <= left < (reach_q if top_left else reach_k),
        "RIGHT": 0 <= right < (reach_k if top_left else reach_q),
        "SOFTCAP": softcap > 0.0,
        "BIAS_ROWS": bias is not None and bias.shape[2] > 1,
        "FOLD": query.dtype != torch.float32 and scale > 0.0 and not shaped,
        "PRECISION": "tf32" if tf32(query) else "ieee",
        "enable_fp_fusion": True,
    }


def _addressable(tensor: Tensor) -> Tensor:
    """Offsets within the largest tile, 128 rows of 256, must fit 32 bits."""
    row = tensor.stride(-2) if tensor.dim() == 4 else tensor.stride(0)
    return tensor if 128 * row + 256 * tensor.stride(-1) < 2**31 else tensor.contiguous()


def _described(*tensors: Tensor) -> bool:
    """Whether kernels read the tensors by descriptors: rows start at multiples of 16 bytes and are
    one element after the other. IEEE products of fp32 take their operands from registers."""
    first = tensors[0]
    ieee = first.dtype == torch.float32 and not tf32(first)
    return hardware.of(first).descriptors and not ieee and all(map(_regular, tensors))


def _regular(tensor: Tensor) -> bool:
    *steps, last = (step * tensor.element_size() for step in tensor.stride())
    aligned = all(step > 0 and step % 16 == 0 for step in (*steps, tensor.data_ptr()))
    return aligned and last == tensor.element_size()


def _fp8_products(tensor: Tensor) -> bool:
    """Whether Triton multiplies e4m3 there; elsewhere the kernel makes fp16 of the bytes."""
    here = hardware.of(tensor)
    return here.interpreted or (here.arch.startswith("sm_") and int(here.arch[3:]) >= 89)


@replayed
def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    left: int,
    right: int,
    top_left: bool,
    scale: float,
    softcap: float,
    dropout_p: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
) -> tuple[Tensor, Tensor]:
    """out, in query's memory order of heads and rows, and lse; fp8 gives bfloat16."""
    packed = cu_seqlens_q is not None
    sizes = _sizes(query, key, cu_seqlens_q, max_seqlen_q, max_seqlen_k)
    dtype = torch.bfloat16 if query.dtype == FP8 else query.dtype
    batch, heads, rows, columns = sizes.batch, sizes.heads, sizes.total_q, value.shape[-1]
    if packed:
        out = made(query.new_empty(rows, heads, columns, dtype=dtype))
        lse = made(query.new_empty(heads, rows, dtype=torch.float32))
    else:
        if query.stride(1) < query.stride(2):
            out = made(query.new_empty(batch, rows, heads, columns, dtype=dtype).transpose(1, 2))
        else:
            out = made(query.new_empty(batch, heads, rows, columns, dtype=dtype))
        lse = made(query.new_empty(batch, heads, rows, dtype=torch.float32))
    if lse.numel() == 0:
        return out, lse
    descales = tuple(
        None if t is None else t.contiguous() for t in (q_descale, k_descale, v_descale)
    )
    common = _common(
        query, value, bias, alibi_slopes, sizes, (left, right, top_left), packed,
        scale, softcap, dropout_p, q_descale is not None or k_descale is not None,
    )  # fmt: skip
    if query.dtype == FP8 and not _fp8_products(query):
        query, key, value = (t.view(torch.uint8) for t in (query, key, value))
    query, key, value = _addressable(query), _addressable(key), _addressable(value)
    bias = None if bias is None else _addressable(bias)
    features = (seed, bias, alibi_slopes)
    config = _config("forward", query, value, common, packed, (key, value), *features)
    tiles = triton.cdiv(sizes.seq_q, config["BLOCK_M"])
    with hardware.guard(query.device):
        launch(
            forward_kernel, (tiles * batch * heads,),
            query, key, value, out, lse, _in_bytes(bias), sinks, alibi_slopes, seed, *descales,
            cu_seqlens_q, cu_seqlens_k, *(_strides(t, packed) for t in (query, key, value, out)),
            *_optional_strides(bias, alibi_slopes), **common, **config,
        )  # fmt: skip
    return out, lse


def _in_bytes(bias: Tensor | None) -> Tensor | None:
    """A boolean bias as the bytes that torch holds, which the kernels compare with 0."""
    return bias.view(torch.uint8) if bias is not None and bias.dtype == torch.bool else bias


def _optional_strides(bias: Tensor | None, slopes: Tensor | None) -> tuple[tuple[int, ...], ...]:
    return (
        (0, 0, 0, 0) if bias is None else _spread(bias),
        (0, 0) if slopes is None else slopes.stride(),
    )


def _spread(bias: Tensor) -> tuple[int, ...]:
    """Strides of bias, broadcast."""
    return tuple(
        0 if size == 1 else step for size, step in zip(bias.shape, bias.stride(), strict=True)
    )


@replayed
def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    left: int,
    right: int,
    top_left: bool,
    scale: float,
    softcap: float,
    dropout_p: float,
    needs: Sequence[bool],
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
) -> tuple[Tensor | None, ...]:
    """The gradients of query, key, value, bias and sinks that needs asks for, laid out as
    torch.empty_like lays them out."""
    packed = cu_seqlens_q is not None
    grads = tuple(
        made(torch.empty_like(t)) if needed and t is not None else None
        for t, needed in zip((query, key, value, bias, sinks), needs, strict=True)
    )
    grad_query, grad_key, grad_value, grad_bias, grad_sinks = grads
    query, key, value = _addressable(query), _addressable(key), _addressable(value)
    grad_out, out, lse = _addressable(grad_out), _addressable(out), lse.contiguous()
    bias = None if bias is None else _addressable(bias)
    sizes = _sizes(query, key, cu_seqlens_q, max_seqlen_q, max_seqlen_k)
    # Where gradients show the roundings of a row.
    refined = grad_bias is not None or sinks is not None
    planes = sizes.heads * (1 if packed else sizes.batch)
    pitch = triton.cdiv(sizes.total_q, 4) * 4  # what descriptors of fp32 start at
    lines = made(lse.new_empty((3 if refined else 2) * planes, pitch))
    common = _common(
        query, value, bias, alibi_slopes, sizes, (left, right, top_left), packed,
        scale, softcap, dropout_p,
    )  # fmt: skip
    common.update(planes=planes, pitch=pitch)
    inputs = (query, key, value, grad_out, lines)
    bias_now = _in_bytes(bias)
    optional = (bias_now, alibi_slopes, seed, cu_seqlens_q, cu_seqlens_k)
    strides = tuple(_strides(t, packed) for t in (query, key, value, grad_out))
    optional_strides = _optional_strides(bias, alibi_slopes)
    features = (seed, bias, alibi_slopes)
    with hardware.guard(query.device):
        if lines.numel():
            _delta(grad_out, grad_lse, out, lse, lines, sizes, packed, common)
        reads = (key, value)
        config = _config("grad_query", query, value, common, packed, reads, *features)
        programs = triton.cdiv(sizes.seq_q, config["BLOCK_M"]) * sizes.batch * sizes.heads
        if refined and lines.numel():
            launch(
                refine_kernel, (programs,),
                *inputs, bias_now, sinks, *optional[1:], grad_lse, *strides, *optional_strides,
                _line_strides(grad_lse), **common, **config,
            )  # fmt: skip
        if grad_query is not None and lines.numel():
            launch(
                grad_query_kernel, (programs,),
                *inputs, grad_query, *optional, *strides, _strides(grad_query, packed),
                *optional_strides, **common, **config,
            )  # fmt: skip
        reads = (query, grad_out)
        config = _config("grad_key_value", query, value, common, packed, reads, *features)
        programs = triton.cdiv(sizes.seq_k, config["BLOCK_N"]) * sizes.batch * sizes.heads_k
        passes = _passes(query, value, grad_key is not None, grad_value is not None)
        for key_now, value_now in passes if programs and sizes.total_k else ():
            dk = grad_key if key_now and grad_key is not None else key
            dv = grad_value if value_now and grad_value is not None else value
            launch(
                grad_key_value_kernel, (programs,),
                *inputs, dk, dv, *optional, *strides, _strides(dk, packed),
                _strides(dv, packed), *optional_strides, NEEDS_KEY=key_now, NEEDS_VALUE=value_now,
                **common, **config,
            )  # fmt: skip
        if grad_bias is not None and grad_bias.numel():
            # That there is a bias goes without saying. Packed, a descriptor of all sequences would
            # run into the next one's rows.
            config = _config(
                "grad_bias", query, value, common, packed, (query, key, value, grad_out),
                seed, alibi_slopes, describable=not packed,
            )  # fmt: skip
            batches, heads, *size = grad_bias.shape
            tiles_m, tiles_n = map(triton.cdiv, size, (config["BLOCK_M"], config["BLOCK_N"]))
            launch(
                grad_bias_kernel, (tiles_m * tiles_n * batches * heads,),
                *inputs, grad_bias, *optional, *strides, grad_bias.stride(),
                *optional_strides, sizes.batch, BIAS_BATCHES=batches > 1, BIAS_HEADS=heads > 1,
                BIAS_KEYS=size[1] > 1, **common, **config,
            )  # fmt: skip
        if grad_sinks is not None and sizes.heads:
            launch(
                grad_sinks_kernel, (sizes.heads,),
                lines, sinks, grad_sinks, planes // sizes.heads, sizes.heads, planes, pitch,
                sizes.total_q, BLOCK_M=1024,
            )  # fmt: skip
    return grads


def _delta(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lines: Tensor,
    sizes: Sizes,
    packed: bool,
    common: dict[str, Any],
) -> None:
    """Of every row, whatever its sequence: packed they are one."""
    rows = 16 if out.dtype == torch.float32 else 64
    launch(
        delta_kernel, (triton.cdiv(sizes.total_q, rows) * common["planes"],),
        out, grad_out, lse, grad_lse, lines, _strides(out, packed), _strides(grad_out, packed),
        _line_strides(grad_lse), BLOCK_M=rows, enable_fp_fusion=True,
        **{name: common[name] for name in DELTA},
    )  # fmt: skip


def _line_strides(grad_lse: Tensor | None) -> tuple[int, ...]:
    """Of batch, head, row."""
    return (0, 0, 0) if grad_lse is None else (0, *grad_lse.stride())[-3:]


def _passes(
    query: Tensor, value: Tensor, needs_key: bool, needs_value: bool
) -> list[tuple[bool, bool]]:
    """dK and dV at once, unless their two accumulators are more than the registers hold."""
    wide = max(query.shape[-1], value.shape[-1]) > 128 and query.dtype != torch.float32
    if wide and needs_key and needs_value:
        return [(True, False), (False, True)]
    return [(needs_key, needs_value)] if needs_key or needs_value else []
