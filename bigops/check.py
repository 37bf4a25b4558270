"""Truth: the one error rule, and running a sample of an op against it.

Everything is compared with the op's reference in float64. A backend's error, as RMS and as
maximum, may be twice that of eager torch in the same dtype, with a floor of 4 ulp of the
reference's maximum; tensors below 4096 elements are judged by their maximum alone, with a floor of
8 ulp. Limits are derived here and typed in nowhere.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .ops import Op, Sample, explain, use_backend

SMALL = 4096
SEED = 0  # of every draw that `bigops check` makes
MANY_DRAWS, MANY_ELEMENTS = 16, 2**17
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Element:
    """One element of a tensor: its value here, in the float64 reference, and eager's."""

    index: tuple[int, ...]
    got: float
    wanted: float
    eager: float

    def __repr__(self) -> str:
        return (
            f"at {list(self.index)} got {self.got:.9g}, wanted {self.wanted:.9g} "
            f"(off by {abs(self.got - self.wanted):.1e}, eager by "
            f"{abs(self.eager - self.wanted):.1e})"
        )


@dataclass(frozen=True)
class Comparison:
    """One tensor's error by the metric that is nearest its limit, relative to the reference.

    worst: the element that is furthest off; None for a tensor without elements.
    """

    tensor: str
    metric: str
    error: float
    eager_error: float
    error_limit: float
    worst: Element | None = None

    @property
    def ok(self) -> bool:
        return self.error <= self.error_limit

    def __repr__(self) -> str:
        where = f"; worst {self.worst}" if self.worst else ""
        return (
            f"{self.tensor}: {self.metric} error {self.error:.3e}, limit {self.error_limit:.3e}, "
            f"eager's {self.eager_error:.3e}{where}"
        )


class Runs(NamedTuple):
    """One call made three ways: outputs and gradients by name, and the call."""

    got: dict[str, Tensor]
    eager: dict[str, Tensor]
    reference: dict[str, Tensor]  # in float64
    call: tuple[Any, Any, int]  # arguments, keyword arguments, the generators' seed


def ulp(value: float, dtype: torch.dtype) -> float:
    """The spacing of `dtype` at `value`."""
    info = torch.finfo(dtype)
    if value == 0.0:
        return info.tiny
    return info.eps * 2.0 ** math.floor(math.log2(max(abs(value), info.tiny)))


def compare(
    name: str, got: Tensor, eager: Tensor, reference: Tensor, moved: Tensor | None = None
) -> Comparison:
    """Judge `got` against the float64 `reference` by the error of `eager`, all of one shape.

    moved: the reference of inputs that are an ulp away. Its difference is added to eager's error,
    and the limit is twice the usual one.
    """
    _same_shape(name, got, reference)
    if got.numel() == 0:
        return Comparison(name, "max", 0.0, 0.0, 0.0)
    want, dtype = reference.double(), got.dtype
    errors, eager_errors = _difference(got, want), _difference(eager, want)
    finite = want[want.isfinite()]
    top = _largest(finite)
    moves = torch.zeros_like(want) if moved is None else _difference(moved, want)
    factor = 2.0 if moved is None else 4.0
    if moves.max() > EPS**0.5 * top:  # not moved but jumped, as ReLU's gradient does
        moves = torch.zeros_like(want)
    small = got.numel() < SMALL
    floor = (8.0 if small else 4.0) * ulp(top, dtype)
    metrics: dict[str, Callable[[Tensor], float]] = {"max": _largest}
    if not small:
        metrics["rms"] = _rms
    judged = []
    for metric, measure in metrics.items():
        error, eager_error, move = (measure(x) for x in (errors, eager_errors, moves))
        size = measure(finite)
        # Eager that is off by more than there is to find is wrong, not inexact, and sets no limit.
        limit = max(factor * (eager_error + move) if eager_error <= size else 0.0, floor)
        judged.append((error / limit, metric, error, eager_error, limit, size or 1.0))
    _, metric, error, eager_error, limit, size = max(judged)
    worst = _element(int(errors.argmax()), got, eager, want)
    return Comparison(name, metric, error / size, eager_error / size, limit / size, worst)


def _element(flat: int, got: Tensor, eager: Tensor, want: Tensor) -> Element:
    index = _index(flat, got.shape)
    return Element(index, got[index].item(), want[index].item(), eager[index].item())


def _index(flat: int, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(flat, shape))


def _same_shape(name: str, got: Tensor, reference: Tensor) -> None:
    if got.shape != reference.shape:
        raise AssertionError(f"{name}: shape {tuple(got.shape)}, not {tuple(reference.shape)}")


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item() if values.numel() else 0.0


def _difference(got: Tensor, want: Tensor) -> Tensor:
    """|got - want|; 0 where both are the same infinity or NaN, infinite where only one is.

    Infinity is what a number beyond the dtype's largest rounds to.
    """
    rounded, got = want.to(got.dtype).double(), got.double()
    if torch.equal(got, want):  # as what an op only reads is
        return torch.zeros_like(want)
    error = (got - want).abs()
    beyond = rounded.isinf() & (got == rounded)
    same = (got == want) | beyond | (got.isnan() & want.isnan())
    return torch.where(same, 0.0, torch.where(error.isnan(), float("inf"), error))


@contextmanager
def nan_memory() -> Iterator[None]:
    """torch.empty gives NaN (integers: their maximum), so that an unwritten element is seen."""
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def check_sample(
    op: Op, sample: Sample, backend: str | None, dtype: torch.dtype, device: str = "cpu"
) -> list[Comparison]:
    """Run one sample on `backend` and compare every output and gradient.

    The maximal error of a small tensor is a matter of luck, eager's too: small samples are drawn
    three times and judged together.

    Raises:
        BackendError: the backend does not serve the sample.
    """
    return _judged(_draws(op, sample, backend, dtype, device))


def check_arbitrary(
    op: Op, sample: Sample, backend: str | None, dtype: torch.dtype, device: str = "cpu"
) -> list[Comparison]:
    """The same for a random call, whose sizes and scales may make it ill-conditioned.

    One that fails, though by less than a whole result, is judged once more, with more draws
    and a wider limit: twice the usual one, of eager's error and of what moving the inputs by an ulp
    does, as no one can tell the moved ones from the given ones (Higham 2002, "Accuracy and
    stability of numerical algorithms", 1.5). Twice, since gradients of attention that save no
    weights (FlashAttention's) lose more than eager's where nearly all weight of a row is on one
    key: two sums that eager takes from the same numbers cancel there. Of 24000 calls of attention
    310 were judged again, the worst at 0.65 of this limit (counted before attention had its options
    and with MANY_DRAWS of every size).
    """
    runs = _draws(op, sample, backend, dtype, device)
    compared = _judged(runs)
    failed = [c for c in compared if not c.ok]
    if not failed or any(c.error >= 1.0 for c in failed):
        return compared
    # Large tensors hold as much luck in one draw as small ones in many.
    size = sum(t.numel() for t in runs[0].got.values())
    more = min(max(MANY_ELEMENTS // max(size, 1), 2), MANY_DRAWS)
    runs += [_three_ways(op, sample, backend, dtype, device) for _ in range(more)]
    return _judged(runs, [_moved(op, *run.call) for run in runs])


def _draws(
    op: Op, sample: Sample, backend: str | None, dtype: torch.dtype, device: str
) -> list[Runs]:
    count = 1 if sample.bench or op.is_step else 3
    return [_three_ways(op, sample, backend, dtype, device) for _ in range(count)]


def _judged(runs: list[Runs], moved: list[dict[str, Tensor]] | None = None) -> list[Comparison]:
    return [_together(name, runs, moved) for name in runs[0].got]


def _together(name: str, runs: list[Runs], moved: list[dict[str, Tensor]] | None) -> Comparison:
    for run in runs:
        for whose, has in (("eager", run.eager), ("the reference", run.reference)):
            if name not in has:
                raise AssertionError(f"{name}: {whose} has none, only {', '.join(has)}")
        _same_shape(name, run.got[name], run.reference[name])

    def joined(tensors: list[dict[str, Tensor]]) -> Tensor:
        return torch.cat([named[name].flatten() for named in tensors])

    ways = joined([r.got for r in runs]), joined([r.eager for r in runs])
    reference = joined([r.reference for r in runs])
    found = compare(name, *ways, reference, None if moved is None else joined(moved))
    return _in_its_draw(found, [run.got[name].shape for run in runs])


def _in_its_draw(found: Comparison, shapes: list[torch.Size]) -> Comparison:
    """With the worst element's index in its own tensor, not in all draws put together."""
    if found.worst is None:
        return found
    (flat,) = found.worst.index
    for shape in shapes:
        if flat < shape.numel():
            break
        flat -= shape.numel()
    return replace(found, worst=replace(found.worst, index=_index(flat, shape)))


def _three_ways(
    op: Op, sample: Sample, backend: str | None, dtype: torch.dtype, device: str
) -> Runs:
    args, kwargs = sample.make(device, dtype)
    seed = int(torch.randint(2**31, ()))
    with use_backend(backend):
        got = _run(op, op.function, args, kwargs, seed)
    with use_backend("reference"):
        wide_args, wide_kwargs = pytree.tree_map_only(Tensor, _to_double, (args, kwargs))
        reference = _run(op, op.function, wide_args, wide_kwargs, seed)
        eager = _run(op, op.same_draws or op.eager, args, kwargs, seed)
    return Runs(got, eager, reference, (args, kwargs, seed))


def _moved(op: Op, args: Any, kwargs: Any, seed: int) -> dict[str, Tensor]:
    """The float64 reference of a call whose inputs have moved by an ulp of float32."""

    def move(t: Tensor) -> Tensor:
        return _nudged(_to_double(t)) if t.dtype.is_floating_point else t

    with use_backend("reference"):
        args, kwargs = pytree.tree_map_only(Tensor, move, (args, kwargs))
        return _run(op, op.function, args, kwargs, seed)


def _nudged(t: Tensor) -> Tensor:
    """Each element an ulp up or down; every second tensor's all the same way, which does not
    average out in a product."""
    signs = torch.randint(2, () if torch.rand(()) < 0.5 else t.shape, device=t.device) * 2.0 - 1.0
    return (t.detach() * (1.0 + EPS * signs)).requires_grad_(t.requires_grad)


def _to_double(t: Tensor) -> Tensor:
    if not t.dtype.is_floating_point:
        return t
    # Contiguous: of other strides torch's own float64 convolution has wrong gradients at times.
    wide = t.detach().to(torch.float64, memory_format=torch.contiguous_format)
    return wide.requires_grad_(t.requires_grad)


def _run(
    op: Op, function: Callable[..., Any], args: Any, kwargs: Any, seed: int = SEED
) -> dict[str, Tensor]:
    """Outputs and gradients by name, on copies of the inputs, with torch's generators at `seed`."""
    args, kwargs = pytree.tree_map_only(Tensor, _clone, (args, kwargs))
    leaves = _tensors((args, kwargs))
    named = dict(zip(_parameter_names(op), args, strict=False)) | kwargs
    written = {name: _tensors(named[name]) for name in op.mutates if name in named}
    mutable = {id(t) for tensors in written.values() for t in tensors}
    kept = [(t, t.detach().clone()) for t in leaves if id(t) not in mutable]
    devices = {t.device.index for t in leaves if t.is_cuda}
    with torch.random.fork_rng(devices=devices):
        # Of devices that are not in use, torch.manual_seed notes its caller's stack: a millisecond.
        (torch.manual_seed if devices else torch.default_generator.manual_seed)(seed)
        outputs = _tensors(function(*args, **kwargs))
    found = {f"out{i}" if i else "out": t.detach() for i, t in enumerate(outputs)}
    for name, tensors in written.items():
        found |= {f"{name}[{i}]": t.detach() for i, t in enumerate(tensors)}
    wanted = [(i, t) for i, t in enumerate(leaves) if t.requires_grad]
    if wanted:
        roots = [t for t in outputs if t.requires_grad]
        gradients = [_gradient_of(t) for t in roots]
        kept += [(t, t.clone()) for t in gradients]
        grads = torch.autograd.grad(roots, [t for _, t in wanted], gradients, allow_unused=True)
        for (i, leaf), grad in zip(wanted, grads, strict=True):
            found[f"grad{i}"] = torch.zeros_like(leaf) if grad is None else grad
    for t, before in kept:
        if _difference(t.detach(), before.double()).any():
            raise AssertionError(f"{op.name} changed an input or the gradient of an output")
    return found


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def _parameter_names(op: Op) -> list[str]:
    return list(inspect.signature(op.function).parameters)


def _clone(t: Tensor) -> Tensor:
    """A copy that lies as the original does: strides, also 0, its offset, and what is between."""
    with torch.no_grad():
        memory = t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0).clone()
        copy = memory.as_strided(t.shape, t.stride(), t.storage_offset())
    return copy.detach().requires_grad_(t.requires_grad)


def _gradient_of(out: Tensor) -> Tensor:
    """A random gradient for `out`, the same values whatever its dtype: drawn in bfloat16's grid."""
    generator = torch.Generator().manual_seed(out.numel())
    drawn = torch.randn(out.shape, generator=generator)
    drawn = drawn.masked_fill(out.detach().cpu().isinf(), 0.0).bfloat16()
    return drawn.to(device=out.device, dtype=out.dtype)


def serves(op: Op, sample: Sample, backend: str, dtype: torch.dtype, device: str) -> str | None:
    """None when `backend` serves the sample, else the reason."""
    args, kwargs = sample.make(device, dtype)
    with use_backend(backend):
        explanation = explain(op.function, *args, **kwargs)
    if explanation.backend == backend:
        return None
    reasons = [reason for name, reason in explanation.passed_over if name == backend]
    return "; ".join(reasons) or f"{op.name} has no backend {backend}"


def cases(
    ops: list[Op], backends: list[str], dtypes: list[torch.dtype] | None = None, bench: bool = False
) -> Iterator[tuple[Op, Sample, str, torch.dtype]]:
    """Every op x sample x backend x dtype; with `bench`, the realistic samples instead."""
    for op in ops:
        for sample in op.samples:
            if sample.bench != bench:
                continue
            for backend in backends:
                for dtype in sample.dtypes or op.dtypes:
                    if dtypes is None or dtype in dtypes:
                        yield op, sample, backend, dtype
