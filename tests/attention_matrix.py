"""The matrix of attention's cases: its factors, and calls that cover every pair of values."""

from __future__ import annotations

import itertools
import os
import random
from typing import Any, NamedTuple

import covering as cover
import torch
from torch import Tensor

from bigops.ops import Sample, attention_cases
from bigops.ops.declare import Call


class Case(NamedTuple):
    """One call; sizes of value "same" as query's head size or "other"."""

    head_size: int
    lengths: tuple[int, int]
    causal: bool
    window: tuple[int, int]
    heads: tuple[int, int]
    dtype: torch.dtype
    value: str = "same"
    softcap: float = 0.0
    slopes: str = "none"
    bias: str = "none"
    sinks: bool = False
    dropout_p: float = 0.0
    lse: bool = False


FACTORS: dict[str, tuple[Any, ...]] = {
    "head_size": (16, 33, 64, 96, 128, 256),
    "lengths": (
        (1, 1), (7, 7), (63, 63), (64, 64), (113, 203), (128, 217), (1023, 1024), (2048, 2048),
    ),
    "causal": (False, True),
    "window": ((-1, -1), (50, 9), (130, -1)),
    "heads": ((2, 2), (2, 1), (3, 1)),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "value": ("same", "other"),
    "softcap": (0.0, 3.0),
    "slopes": ("none", "head", "batch"),
    "bias": ("none", "bool", "b11j", "1hij", "bhij"),
    "sinks": (False, True),
    "dropout_p": (0.0, 0.2),
    "lse": (False, True),
}  # fmt: skip
NAMED = ("head_size", "lengths", "causal", "window", "heads", "dtype")  # by the issue
LONG = 500
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def long(case: Case) -> bool:
    """Whether a pass over it takes seconds where kernels are interpreted."""
    return max(case.lengths) > LONG


def work(case: Case) -> float:
    """How much a pass over it computes, of which an interpreter makes seconds."""
    left, right = case.window
    batch, heads, _ = size(case)
    seen = attention_cases.pairs(*case.lengths, left, 0 if case.causal else right)
    return batch * heads * seen


def covering(at_least: int) -> list[Case]:
    """Cases that cover every pair of values with little work, `at_least` in all."""
    wanted = set(cover.every_pair(FACTORS))
    return cover.covering(wanted, _drawn, lambda case: 2e5 + work(case), at_least)


def whole(seed: int = 0) -> list[Case]:
    """Every combination of the named factors, the others drawn."""
    draw = random.Random(seed)
    named = itertools.product(*(FACTORS[name] for name in NAMED))
    return [_drawn(draw)._replace(**dict(zip(NAMED, values, strict=True))) for values in named]


def _drawn(draw: random.Random, short: bool = False) -> Case:
    case = Case(**{name: draw.choice(values) for name, values in FACTORS.items()})
    while short and long(case):
        case = case._replace(lengths=draw.choice(FACTORS["lengths"]))
    return case


def named(case: Case) -> str:
    """What differs from the defaults, in words."""
    head, (rows, columns), causal, window, heads, dtype, *more = case
    words = [str(dtype)[6:], f"{rows}x{columns}", f"D{head}", f"H{heads[0]}:{heads[1]}"]
    words += ["causal"] if causal else []
    words += [f"window {window[0]},{window[1]}"] if window != (-1, -1) else []
    for name, value, default in zip(
        Case._fields[6:], more, Case._field_defaults.values(), strict=True
    ):
        words += [f"{name} {value}"] if value != default else []
    return " ".join(words)


def size(case: Case) -> tuple[int, int, int]:
    """Two sequences, heads and key heads; one sequence and one key head where it is long."""
    heads, kv_heads = case.heads
    return (1, heads // kv_heads, 1) if long(case) else (2, heads, kv_heads)


def sample(case: Case) -> Sample:
    """The call."""
    batch, heads, kv_heads = size(case)
    rows, columns = case.lengths
    value_size = case.head_size if case.value == "same" else max(1, case.head_size * 2 // 3)

    def make(device: str, dtype: torch.dtype) -> Call:
        def draw(*shape: int, grad: bool = True) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype).requires_grad_(grad)

        # A weight that is always 1 has no gradient but rounding errors, which nothing judges.
        grad = columns > 1 or case.sinks
        args = (
            draw(batch, heads, rows, case.head_size, grad=grad),
            draw(batch, kv_heads, columns, case.head_size, grad=grad),
            draw(batch, kv_heads, columns, value_size),
        )
        kwargs: dict[str, Any] = {
            "causal": case.causal,
            "window_size": case.window,
            "softcap": case.softcap,
            "dropout_p": case.dropout_p,
            "return_lse": case.lse,
        }
        if case.slopes != "none":
            shape = (heads,) if case.slopes == "head" else (batch, heads)
            kwargs["alibi_slopes"] = 0.1 * torch.rand(shape, device=device)
        full = (batch, heads, rows, columns)
        if case.bias == "bool":
            kwargs["bias"] = torch.rand(batch, 1, rows, columns, device=device) < 0.7
        elif case.bias != "none":
            kept = zip(full, case.bias, strict=True)
            kwargs["bias"] = draw(*(n if c != "1" else 1 for n, c in kept), grad=grad)
        if case.sinks:
            kwargs["sinks"] = draw(heads)
        return args, kwargs

    # One draw of a call whose tensors are large enough to be judged by their RMS too, and of all
    # where a call takes its time.
    large = batch * min(case.lengths) * case.head_size > 4096
    return Sample(named(case), make, bench=large or INTERPRETED)
