"""sgd's random calls, legal and illegal."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .adam_fuzz import (
    LOW,
    NEGATIVE,
    NOT_NUMBERS,
    NOT_SCALARS,
    ODD,
    UNLIKE,
    WRITTEN,
    WRONG_SCALES,
    described,
    in_list,
    last_of,
    layouts_of,
    option,
    some_shapes,
    wrong_scales,
)
from .declare import Call, Chooser, Sample
from .fuzz import Arguments, layout, spoilt
from .step_arguments import DTYPES

LISTS = ("params", "grads", "momentum_buffers")
DEFAULTS: dict[str, Any] = {
    "momentum": 0.0,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "nesterov": False,
    "maximize": False,
    "is_first_step": False,
    "max_grad_norm": None,
}


def arbitrary(choose: Chooser) -> Sample:
    """A small step; lists, shapes, strides, dtypes and options of any kind."""
    shapes = some_shapes(choose)
    mixed = choose.choice((False, True))
    dtypes = [choose.choice((None, *DTYPES)) if mixed else None for _ in shapes]
    alike = choose.choice((True, False))
    layouts = [layouts_of(choose, len(shape), alike) for shape in shapes]
    given = {
        "momentum": choose.choice((0.0, 0.9, 0.5)),
        "dampening": choose.choice((0.0, 0.1, 1.0)),
        "weight_decay": choose.choice((0.0, 0.01, 0.5)),
        "nesterov": choose.choice((False, True)),
        "maximize": choose.choice((False, True)),
        "is_first_step": choose.choice((False, True)),
        "max_grad_norm": choose.choice((None, 1.0, 0.0, 1e6)),
    }
    kwargs = {name: value for name, value in given.items() if value != DEFAULTS[name]}
    numbers = {
        "lr": choose.choice((None, 1e-3, 0.0, 1.0)),
        "total_norm": choose.choice((None, 3.0)),
        "grad_scale": choose.choice((None, 2.0)),
        "found_inf": choose.choice((None, 0.0, 1.0)),
    }
    scalars = {name: value for name, value in numbers.items() if value is not None}
    narrow = choose.choice((False, True))
    low = choose.choice((None, torch.bfloat16, torch.float16, torch.float32))
    low_layouts = [layout(choose, len(shape)) for shape in shapes] if low else []
    if "lr" not in scalars:
        kwargs["lr"] = choose.choice((1e-3, 0.0, 1))

    def make(device: str, dtype: torch.dtype) -> Call:
        def draw(role: int, narrow: bool = False) -> list[Tensor]:
            tensors = []
            for shape, own, lies in zip(shapes, dtypes, layouts, strict=True):
                of = own or dtype
                of = torch.bfloat16 if narrow and of != torch.float64 else of
                tensors.append(lies[role].laid(torch.randn(shape, device=device).to(of)))
            return tensors

        lists = (draw(0), draw(1), draw(2, narrow) if given["momentum"] else [])
        drawn: dict[str, Any] = {
            name: torch.tensor(value, device=device) for name, value in scalars.items()
        }
        if low is not None:
            # What overflows float16 is infinite in any copy, so such parameters' are float16 too.
            drawn[LOW] = [
                lies.laid(param if param.dtype == torch.float16 else param.to(low))
                for param, lies in zip(lists[0], low_layouts, strict=True)
            ]
        return lists, kwargs | drawn

    words = [described(shapes, dtypes, layouts)]
    words += ["bfloat16 buffers"] if narrow else []
    words += [f"{name}={value}" for name, value in kwargs.items()]
    words += [f"{name}=tensor({value})" for name, value in scalars.items()]
    if low is not None:
        words.append(f"{LOW}={str(low)[6:]}{''.join(map(str, dict.fromkeys(low_layouts)))}")
    return Sample(", ".join(words), make)


def illegal(choose: Chooser) -> tuple[Sample, str]:
    """A legal step with one thing made wrong."""
    return spoilt(arbitrary(choose), LISTS, choose.choice(FAULTS))


def _longer(given: Arguments) -> Arguments:
    """The lists with two tensors more, momentum, and nothing to skip the step."""
    lists = {n: [*given[n], torch.ones(3), torch.ones(3)] for n in LISTS[:2]}
    lists["momentum_buffers"] = [torch.ones_like(param) for param in lists["params"]]
    lists[LOW] = [param.half() for param in lists["params"]]
    return {**lists, "momentum": 0.9, "max_grad_norm": 1.0, "found_inf": None}


_last = partial(last_of, longer=_longer)
_option = partial(option, longer=_longer)
_list = partial(in_list, longer=_longer)


FAULTS = (
    *_last("params", ODD | WRITTEN | NEGATIVE),
    *_last("grads", ODD | UNLIKE | NEGATIVE),
    *_last("momentum_buffers", ODD | UNLIKE | WRITTEN),
    *_last(LOW, ODD | WRITTEN | NEGATIVE | {"of another shape": UNLIKE["of another shape"]}),
    *(_list(name, "with a tensor less", lambda ts: ts[1:]) for name in (*LISTS[1:], LOW)),
    *(_list(name, "a tuple", tuple) for name in (*LISTS, LOW)),
    *_option(LOW, 1.0, [1.0]),
    *(fault for name in LISTS for fault in _option(name, None, 1.0)),
    *(
        fault
        for name in ("lr", "momentum", "dampening", "weight_decay")
        for fault in _option(name, *NOT_NUMBERS)
    ),
    *_option("max_grad_norm", *NOT_NUMBERS[1:]),
    *(f for n in ("total_norm", "grad_scale", "found_inf") for f in _option(n, *NOT_SCALARS)),
    *_option("rounding_seed", *NOT_SCALARS, torch.ones(())),
    *(wrong_scales(LISTS[2:], {"momentum": 0.9}, *wrong) for wrong in WRONG_SCALES),
)
