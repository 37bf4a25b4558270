"""adam's and grad_norm's random calls, legal and illegal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .declare import Call, Chooser, Sample
from .fuzz import Arguments, Fault, Layout, layout, on_meta, other_dtype, sizes, spoilt
from .step_arguments import DTYPES

SHAPES = ((3,), (), (1,), (0,), (5, 7), (2, 0, 3), (1, 1), (4, 1, 6), (64,), (65,), (3, 2, 2, 2, 2))
LENGTHS = (1, 2, 3, 0, 5, 9)
Longer = Callable[[Arguments], Arguments]
LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps")
LOW = "low_precision_params"
DEFAULTS: dict[str, Any] = {
    "amsgrad": False,
    "maximize": False,
    "decoupled_weight_decay": False,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "max_grad_norm": None,
}


def arbitrary(choose: Chooser) -> Sample:
    """A small step; lists, shapes, strides, dtypes and options of any kind."""
    shapes = some_shapes(choose)
    mixed = choose.choice((False, True))
    dtypes = [choose.choice((None, *DTYPES)) if mixed else None for _ in shapes]
    alike = choose.choice((True, False))
    # Per tensor: where the parameter, its gradient and its states lie.
    layouts = [layouts_of(choose, len(shape), alike) for shape in shapes]
    steps = [choose.choice((0, 1, 5, 1000)) for _ in shapes]
    step_dtype = choose.choice((torch.float32, torch.float64))
    given = {
        "amsgrad": choose.choice((False, True)),
        "maximize": choose.choice((False, True)),
        "decoupled_weight_decay": choose.choice((False, True)),
        "beta1": choose.choice((0.9, 0.0, 0.5, 0.99)),
        "beta2": choose.choice((0.999, 0.0, 0.5, 0.99)),
        "eps": choose.choice((1e-8, 1e-3, 1.0)),
        "weight_decay": choose.choice((0.0, 0.01, 0.5)),
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
        def draw(role: int, positive: bool = False) -> list[Tensor]:
            tensors = []
            for shape, own, lies in zip(shapes, dtypes, layouts, strict=True):
                values = torch.randn(shape, device=device)
                values = values.square() if positive else values
                of = own or dtype
                if narrow and role > 1 and of != torch.float64:
                    of = torch.bfloat16
                tensors.append(lies[role].laid(values.to(of)))
            return tensors

        maxima = draw(4, positive=True) if given["amsgrad"] else []
        counts = [torch.tensor(float(step), dtype=step_dtype) for step in steps]
        lists = (draw(0), draw(1), draw(2), draw(3, positive=True), maxima, counts)
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

    words = [described(shapes, dtypes, layouts), f"steps {steps} {str(step_dtype)[6:]}"]
    words += ["bfloat16 averages"] if narrow else []
    words += [f"{name}={value}" for name, value in kwargs.items()]
    words += [f"{name}=tensor({value})" for name, value in scalars.items()]
    if low is not None:
        words.append(f"{LOW}={str(low)[6:]}{''.join(map(str, dict.fromkeys(low_layouts)))}")
    return Sample(", ".join(words), make)


def arbitrary_norm(choose: Chooser) -> Sample:
    """A small norm; shapes, strides and dtypes of any kind."""
    shapes = some_shapes(choose)
    mixed = choose.choice((False, True))
    dtypes = [choose.choice((None, *DTYPES)) if mixed else None for _ in shapes]
    layouts = [[layout(choose, len(shape), expanded=len(shape))] for shape in shapes]

    def make(device: str, dtype: torch.dtype) -> Call:
        grads = [
            lies[0].laid(torch.randn(shape, device=device).to(own or dtype))
            for shape, own, lies in zip(shapes, dtypes, layouts, strict=True)
        ]
        return (grads,), {}

    return Sample(described(shapes, dtypes, layouts), make)


def some_shapes(choose: Chooser) -> list[tuple[int, ...]]:
    """Of the parameters of a call."""
    return [choose.choice(SHAPES) for _ in range(choose.choice(LENGTHS))]


def layouts_of(choose: Chooser, dims: int, alike: bool) -> list[Layout]:
    """Of a parameter, its gradient and its states."""
    if alike:
        return [layout(choose, dims)] * 5
    return [layout(choose, dims, expanded=dims if role == 1 else 0) for role in range(5)]


def described(
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[torch.dtype | None],
    layouts: Sequence[Sequence[Layout]],
) -> str:
    """The tensors of a call in words."""
    words = []
    for shape, dtype, lies in zip(shapes, dtypes, layouts, strict=True):
        own = f" {str(dtype)[6:]}" if dtype else ""
        words.append(sizes(shape) + own + "".join(map(str, dict.fromkeys(lies))))
    return f"[{', '.join(words)}]"


def illegal(choose: Chooser) -> tuple[Sample, str]:
    """A legal step with one thing made wrong."""
    return spoilt(arbitrary(choose), LISTS, choose.choice(FAULTS))


def illegal_norm(choose: Chooser) -> tuple[Sample, str]:
    """A legal norm with one thing made wrong."""
    return spoilt(arbitrary_norm(choose), ("grads",), choose.choice(NORM_FAULTS))


def _longer(given: Arguments) -> Arguments:
    """The lists with two tensors more, all that a step may read among them, and nothing to skip it.

    Whoever writes before all is checked has then something to write.
    """
    if "params" not in given:
        return {"grads": [*given["grads"], torch.ones(3), torch.ones(3)]}
    lists = {n: [*given[n], torch.ones(3), torch.ones(3)] for n in LISTS[:2]}
    lists |= {n: [torch.ones_like(param) for param in lists["params"]] for n in LISTS[2:5]}
    lists["state_steps"] = [*given["state_steps"], torch.ones(()), torch.ones(())]
    lists[LOW] = [param.half() for param in lists["params"]]
    return {**lists, "amsgrad": True, "max_grad_norm": 1.0, "found_inf": None}


def in_list(
    name: str, what: str, change: Callable[[list[Tensor]], Any], longer: Longer = _longer
) -> Fault:
    """A list is changed."""

    def changed(given: Arguments) -> Arguments:
        lists = longer(given)
        return lists | {name: change(lists[name])}

    return Fault(name, what, changed)


def last_of(
    name: str, odd: dict[str, Callable[[Tensor], Any]], longer: Longer = _longer
) -> list[Fault]:
    """The last tensor of a list is odd."""

    def last(one: Callable[[Tensor], Any]) -> Callable[[list[Tensor]], Any]:
        return lambda tensors: [*tensors[:-1], one(tensors[-1])]

    return [in_list(name, f"[-1] {what}", last(one), longer) for what, one in odd.items()]


def option(name: str, *values: Any, longer: Longer = _longer) -> list[Fault]:
    """An option has one of the values."""
    # mypy infers no type for a lambda's default.
    return [Fault(name, repr(v), lambda given, v=v: longer(given) | {name: v}) for v in values]  # type: ignore[misc]


def wrong_scales(states: Sequence[str], others: Arguments, *scales: Any) -> Fault:
    """Codes for states, and scales of the first that do not go with them."""
    names = [f"{state.removesuffix('s')}_scales" for state in states]

    def changed(given: Arguments) -> Arguments:
        lists = {n: [torch.ones(300), torch.ones(3)] for n in LISTS[:2]}
        codes = {n: [torch.ones(300).byte(), torch.ones(3).byte()] for n in states}
        right = {n: [torch.ones(2), torch.ones(1)] for n in names}
        rest = {LOW: None, "found_inf": None, names[0]: list(scales), **others}
        return {**lists, **codes, **right, **rest}

    return Fault(names[0], repr(scales), changed)


NOT_TENSORS: tuple[Any, ...] = (None, 1.0, [1.0])
ODD: dict[str, Callable[[Tensor], Any]] = {
    **{repr(value): lambda _, value=value: value for value in NOT_TENSORS},  # type: ignore[misc]
    "of integers": Tensor.long,
    "of complex numbers": lambda t: t.to(torch.complex64),
    "sparse": Tensor.to_sparse,
    "of 9 dimensions": lambda t: t.reshape(*(1,) * 8, 3),
    "on another device": on_meta,
}
UNLIKE: dict[str, Callable[[Tensor], Any]] = {
    "of another dtype": other_dtype,
    "of another shape": lambda t: t.reshape(3, 1),
}
NEGATIVE: dict[str, Callable[[Tensor], Any]] = {
    "a negative view": lambda t: torch.view_as_complex(torch.stack((t, t), -1)).conj().imag
}
WRITTEN: dict[str, Callable[[Tensor], Any]] = {"expanded": lambda t: t[:1].expand(3)}
ODD_STEPS: dict[str, Callable[[Tensor], Any]] = {
    **{repr(value): lambda _, value=value: value for value in NOT_TENSORS},  # type: ignore[misc]
    "of an integer": Tensor.long,
    "of bfloat16": Tensor.bfloat16,
    "of 2 elements": lambda t: t.repeat(2),
    "of 1 dimension": lambda t: t.reshape(1),
    "on another device": on_meta,
}
NOT_NUMBERS = (None, "0.5", [0.5], torch.ones(2))
NOT_SCALARS = (1.0, "1", torch.ones(2), torch.ones((), device="meta"))
WRONG_SCALES: tuple[tuple[Any, ...], ...] = (
    (torch.ones(2),),
    (torch.ones(2), torch.ones(2)),
    (torch.ones(2), torch.ones(1).double()),
    (torch.ones(2), 1.0),
)
CODED: Arguments = {
    "amsgrad": False,
    "max_exp_avg_sqs": [],
    "state_steps": [torch.ones(()), torch.ones(())],
}

FAULTS = (
    *last_of("params", ODD | WRITTEN | NEGATIVE),
    *last_of("grads", ODD | UNLIKE | NEGATIVE),
    *(fault for name in LISTS[2:5] for fault in last_of(name, ODD | UNLIKE | WRITTEN)),
    *last_of("state_steps", ODD_STEPS),
    *last_of(LOW, ODD | WRITTEN | NEGATIVE | {"of another shape": UNLIKE["of another shape"]}),
    *(
        in_list(name, "with a tensor less", lambda tensors: tensors[1:])
        for name in (*LISTS[1:], LOW)
    ),
    *(in_list(name, "a tuple", tuple) for name in (*LISTS, LOW)),
    *option(LOW, 1.0, [1.0]),
    *(fault for name in LISTS for fault in option(name, None, 1.0)),
    *(f for n in ("lr", "beta1", "beta2", "eps", "weight_decay") for f in option(n, *NOT_NUMBERS)),
    *option("max_grad_norm", *NOT_NUMBERS[1:]),
    *(f for n in ("total_norm", "grad_scale", "found_inf") for f in option(n, *NOT_SCALARS)),
    *(f for n in ("total_norm", "grad_scale") for f in option(n, torch.ones((), dtype=torch.long))),
    *option("rounding_seed", *NOT_SCALARS, torch.ones(())),
    *(wrong_scales(LISTS[2:4], CODED, *wrong) for wrong in WRONG_SCALES),
)
NORM_FAULTS = (
    *last_of("grads", ODD | NEGATIVE),
    *option("grads", None, 1.0, "grads"),
)
