"""varlen_attention's random calls, legal and illegal."""

from __future__ import annotations

from typing import Any

import torch

from .attention_fuzz import HEAD_SIZES, KEYWORD_FAULTS, MOST_PRODUCTS, extras
from .declare import Call, Chooser, Sample
from .fuzz import Arguments, Fault, changed, instead, layout, longer, on_meta, other_dtype, spoilt
from .varlen_attention_cases import starts

LENGTHS = (1, 2, 3, 0, 8, 16, 17, 33, 64, 65, 129)
NAMES = (
    "query", "key", "value", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k",
)  # fmt: skip
TENSORS = NAMES[:3]


def arbitrary(choose: Chooser) -> Sample:
    """A small call; lengths, strides, options and gradients of any kind."""
    batch, kv_heads = choose.choice((1, 2, 3, 0)), choose.choice((1, 2))
    heads = kv_heads * choose.choice((1, 2, 3))
    lengths = [(choose.choice(LENGTHS), choose.choice(LENGTHS)) for _ in range(batch)]
    pairs = heads * sum(n * m for n, m in lengths)
    fitting = [size for size in HEAD_SIZES if size * pairs <= MOST_PRODUCTS] or [1]
    head_size, value_size = choose.choice(fitting), choose.choice(fitting)
    before, after = choose.choice((0, 1, 5)), choose.choice((0, 1, 5))
    rows, columns = (before + sum(pair[i] for pair in lengths) + after for i in (0, 1))
    most_q, most_k = (max((pair[i] for pair in lengths), default=0) for i in (0, 1))
    shapes = {
        "query": (rows, heads, head_size),
        "key": (columns, kv_heads, head_size),
        "value": (columns, kv_heads, value_size),
    }
    # Keys or values that are all alike leave weights no gradient but rounding errors.
    layouts = [layout(choose, 3, expanded=2 if name == "query" else 0) for name in shapes]
    grads = [choose.choice((False, True)) for _ in shapes]
    alone = any(m == 1 for _, m in lengths)
    more, words, constant = extras(choose, (batch, heads, most_q, most_k), alone)
    if constant:
        grads[:2] = [False, False]

    def make(device: str, dtype: torch.dtype) -> Call:
        args: list[Any] = []
        for shape, lies, grad in zip(shapes.values(), layouts, grads, strict=True):
            values = torch.randn(shape, device=device, dtype=dtype)
            args.append(lies.laid(values).requires_grad_(grad))
        args += [starts([pair[i] for pair in lengths], before, device) for i in (0, 1)]
        return (*args, most_q, most_k), more(device, dtype)

    said = [f"sequences {lengths} from {before}, {after} rows after them"]
    for (name, shape), lies in zip(shapes.items(), layouts, strict=True):
        said.append(f"{name} {'x'.join(map(str, shape))}{lies}")
    wanted = [name for name, grad in zip(shapes, grads, strict=True) if grad]
    said += [*words, *([f"gradients of {' and '.join(wanted)}"] if wanted else [])]
    return Sample(", ".join(said), make)


def illegal(choose: Chooser) -> tuple[Sample, str]:
    """A legal call with one thing made wrong."""
    return spoilt(arbitrary(choose), NAMES, choose.choice(FAULTS))


def _too_many_key_heads(given: Arguments) -> Arguments:
    heads = given["query"].shape[1] + 1
    shapes = {name: (given[name].shape[0], heads, given[name].shape[2]) for name in TENSORS[1:]}
    return {name: given["query"].new_zeros(shape) for name, shape in shapes.items()}


STARTS = NAMES[3:5]
FAULTS = (
    *(fault for name in TENSORS for fault in instead(name, None, 1.0, [[1.0]])),
    *(changed(name, "of 4 dimensions", lambda t: t[None].detach()) for name in TENSORS),
    *(changed(name, "of another dtype", other_dtype) for name in TENSORS[1:]),
    *(changed(name, "on another device", on_meta) for name in TENSORS[1:]),
    changed("key", "with another head size", longer(2)),
    Fault("key", "with more heads than query", _too_many_key_heads),
    changed("value", "with a head more", longer(1)),
    changed("value", "with a row more", longer(0)),
    *(fault for name in STARTS for fault in instead(name, None, [0, 1])),
    *(changed(name, "of int64", lambda t: t.long()) for name in STARTS),
    *(changed(name, "of 2 dimensions", lambda t: t[None]) for name in STARTS),
    *(changed(name, "on another device", on_meta) for name in STARTS),
    changed("cu_seqlens_k", "of a sequence more", lambda t: torch.cat((t, t[-1:]))),
    changed("cu_seqlens_q", "beyond the rows", lambda t: t + 1000),
    changed("cu_seqlens_k", "beyond the rows", lambda t: t + 1000),
    changed("cu_seqlens_q", "from below 0", lambda t: t - 1000),
    changed("cu_seqlens_k", "from below 0", lambda t: t - 1000),
    *(fault for name in NAMES[5:] for fault in instead(name, None, 1.5, "1", -1)),
    *KEYWORD_FAULTS,
)
