"""attention's random calls, legal and illegal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .declare import Call, Chooser, Sample
from .fuzz import (
    Arguments,
    Fault,
    changed,
    instead,
    layout,
    longer,
    on_meta,
    other_dtype,
    sizes,
    spoilt,
)

# Around the borders of tiles, native and Triton's.
LENGTHS = (1, 2, 3, 5, 8, 0, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
HEAD_SIZES = (1, 2, 3, 4, 7, 8, 16, 20, 24, 32, 33, 64, 80, 96, 128, 129, 192, 255, 256)
MOST_PRODUCTS = 2**20  # of query and key: milliseconds
TENSORS = ("query", "key", "value")


def arbitrary(choose: Chooser) -> Sample:
    """A small call; shapes, strides, mask and gradients of any kind."""
    batch, kv_heads = choose.choice((1, 2, 3, 0)), choose.choice((1, 2, 3))
    heads = kv_heads * choose.choice((1, 2, 3, 4))
    rows, columns = choose.choice(LENGTHS), choose.choice(LENGTHS)
    pairs = batch * heads * rows * columns
    fitting = [size for size in HEAD_SIZES if size * pairs <= MOST_PRODUCTS] or [1]
    head_size, value_size = choose.choice(fitting), choose.choice(fitting)
    shapes = {
        "query": (batch, heads, rows, head_size),
        "key": (batch, kv_heads, columns, head_size),
        "value": (batch, kv_heads, columns, value_size),
    }
    layouts = [layout(choose, 4, expanded=2) for _ in shapes]
    grads = [choose.choice((False, True)) for _ in shapes]
    more, said, constant = extras(choose, (batch, heads, rows, columns), columns == 1)
    if constant:
        grads[:2] = [False, False]

    def make(device: str, dtype: torch.dtype) -> Call:
        args = []
        for shape, lies, grad in zip(shapes.values(), layouts, grads, strict=True):
            values = torch.randn(shape, device=device, dtype=dtype)
            args.append(lies.laid(values).requires_grad_(grad))
        return tuple(args), more(device, dtype)

    words = [
        f"{name} {sizes(shape)}{lies}"
        for (name, shape), lies in zip(shapes.items(), layouts, strict=True)
    ]
    words += said
    wanted = [name for name, grad in zip(shapes, grads, strict=True) if grad]
    words += [f"gradients of {' and '.join(wanted)}"] if wanted else []
    return Sample(", ".join(words), make)


def extras(
    choose: Chooser, full: tuple[int, int, int, int], alone: bool
) -> tuple[Callable[[str, torch.dtype], dict[str, Any]], list[str], bool]:
    """Keyword arguments, what they are in words, and whether weights are constant.

    full: what a bias broadcasts to; alone: whether there are rows that see a single key. A weight
    that is always 1 has no gradient but rounding errors, which nothing judges; nor has a bias that
    all keys of a row share, unless there is a sink or lse is a result.
    """
    batch, heads, _, _ = full
    kwargs: dict[str, Any] = {}
    if choose.choice((False, True)):
        kwargs["causal"] = True
    if (window := choose.choice((None, (7, -1), (-1, 3), (20, 20), (0, 0), (70, 1)))) is not None:
        kwargs["window_size"] = window
    if (scale := choose.choice((None, 0.3, 1.0, -0.5))) is not None:
        kwargs["scale"] = scale
    if choose.choice((False, True)):
        kwargs["return_lse"] = True
    if (softcap := choose.choice((0.0, 0.0, 0.5, 5.0))) > 0.0:
        kwargs["softcap"] = softcap
    if (dropout_p := choose.choice((0.0, 0.0, 0.1, 0.7))) > 0.0:
        kwargs["dropout_p"] = dropout_p
    words = [f"{name}={value}" for name, value in kwargs.items()]
    slopes = choose.choice(((), (), (heads,), (batch, heads)))
    sinks, learned = choose.choice((False, True)), choose.choice((False, True))
    words += [f"alibi_slopes {sizes(slopes)}"] if slopes else []
    words += [f"{'learned ' if learned else ''}sinks"] if sinks else []
    bias = choose.choice(("", "", "bool", "float", "float with -inf", "float32"))
    shape = tuple(choose.choice((n, 1)) for n in full)[choose.integer(0, 4) :] if bias else ()
    lies = layout(choose, len(shape), expanded=max(0, len(shape) - 2))
    free = sinks or "return_lse" in kwargs
    constant = not free and (alone or kwargs.get("window_size") == (0, 0))
    shared = not free and (not shape or shape[-1] != full[3])
    adjusted = bias.startswith("float") and choose.choice((False, True))
    adjusted = adjusted and not constant and not shared
    words += [f"{'learned ' if adjusted else ''}{bias} bias {sizes(shape)}{lies}"] if bias else []

    def make(device: str, dtype: torch.dtype) -> dict[str, Any]:
        made = dict(kwargs)
        if slopes:
            made["alibi_slopes"] = torch.rand(slopes, device=device)
        if sinks:
            drawn = torch.randn(heads, device=device, dtype=dtype)
            made["sinks"] = drawn.requires_grad_(learned)
        if not bias:
            return made
        drawn = torch.randn(shape, device=device)
        torch.atleast_2d(drawn)[..., -1:, :2].clamp_(max=0.0)  # the last row sees two keys
        if bias == "bool":
            drawn = drawn < 0.5
        elif bias != "float32":
            drawn = drawn.to(dtype)
        if bias == "float with -inf":
            drawn = drawn.masked_fill(drawn > 1.0, float("-inf"))
        return made | {"bias": lies.laid(drawn).requires_grad_(adjusted)}

    return make, words, constant


def illegal(choose: Chooser) -> tuple[Sample, str]:
    """A legal call with one thing made wrong."""
    return spoilt(arbitrary(choose), TENSORS, choose.choice(FAULTS))


def _integers(given: Arguments) -> Arguments:
    return {name: given[name].detach().long() for name in TENSORS}


def _too_many_key_heads(given: Arguments) -> Arguments:
    heads = given["query"].shape[1] + 1
    shapes = {name: (given[name].shape[0], heads, *given[name].shape[2:]) for name in TENSORS[1:]}
    return {name: given["query"].new_zeros(shape) for name, shape in shapes.items()}


def _heads(argument: str) -> Fault:
    def change(given: Arguments) -> Arguments:
        return {argument: torch.ones(given["query"].shape[1] + 1)}

    return Fault(argument, "for another number of heads", change)


KEYWORD_FAULTS = (
    *instead("bias", 1.0, "mask"),
    Fault("bias", "of integers", lambda given: {"bias": torch.zeros(1, dtype=torch.long)}),
    Fault("bias", "on another device", lambda _: {"bias": torch.zeros(1, device="meta")}),
    Fault("bias", "unlike the scores", lambda given: {"bias": given["query"].new_zeros(1009)}),
    Fault("bias", "of 5 dimensions", lambda given: {"bias": given["query"].new_zeros((1,) * 5)}),
    *instead("scale", "1", [1.0], 1j),
    *instead("softcap", -1.0, float("nan"), "1", None),
    *instead("dropout_p", -0.1, 1.5, float("nan"), "0.1", None),
    *instead("window_size", None, 1, (1,), (1, 2, 3), (1.5, 2), "ab"),
    *(fault for name in ("alibi_slopes", "sinks") for fault in (_heads(name), *instead(name, 1.0))),
    *(fault for n in "qkv" for fault in (_heads(f"{n}_descale"), *instead(f"{n}_descale", 1.0))),
)
FAULTS = (
    *(fault for name in TENSORS for fault in instead(name, None, 1.0, [[1.0]])),
    *(changed(name, "sparse", lambda t: t.detach().to_sparse()) for name in TENSORS),
    *(changed(name, "of 3 dimensions", lambda t: t[0:1].flatten(0, 1)) for name in TENSORS),
    *(changed(name, "of another dtype", other_dtype) for name in TENSORS[1:]),
    *(changed(name, "on another device", on_meta) for name in TENSORS[1:]),
    *(changed(name, "with a batch more", longer(0)) for name in TENSORS[1:]),
    changed("key", "with another head size", longer(3)),
    Fault("key", "with more heads than query", _too_many_key_heads),
    changed("value", "with a head more", longer(1)),
    changed("value", "with a row more", longer(2)),
    Fault("query", "of integers, as key and value", _integers),
    *KEYWORD_FAULTS,
)
