"""What `bigops check` says of a failure, as entries for --json and as lines: the worst element, the
call, the smallest call that still fails, and the command that repeats it."""

from __future__ import annotations

import shlex
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from .. import check
from ..check import Comparison
from ..extension import BuildError
from ..ops import Op, Sample, get
from ..shrink import describe, smallest_failure
from .words import Progress

Entry = dict[str, Any]
MESSAGE_LINES = 12  # of an exception; a compiler's has some


class Case(NamedTuple):
    """What is checked."""

    op: Op
    sample: Sample
    backend: str
    dtype: torch.dtype


def dtype_name(dtype: torch.dtype) -> str:
    """As the command line has it."""
    return str(dtype).removeprefix("torch.")


def entry(case: Case, comparison: Comparison) -> Entry:
    """One compared tensor."""
    return _where(case) | {
        "tensor": comparison.tensor,
        "metric": comparison.metric,
        "error": comparison.error,
        "eager_error": comparison.eager_error,
        "error_limit": comparison.error_limit,
        "ok": comparison.ok,
    }


def off_limit(case: Case, comparison: Comparison, device: str) -> Entry:
    """A tensor that is off its limit."""
    worst = asdict(comparison.worst) if comparison.worst else None
    told = {"worst": worst, "why": str(comparison)}
    return entry(case, comparison) | told | _replay(case, device)


def raised(case: Case, error: Exception, device: str) -> Entry:
    """A sample whose kernel, or whatever is around it, raised."""
    message = "\n".join(str(error).strip().splitlines()[:MESSAGE_LINES])
    frame = traceback.extract_tb(error.__traceback__)[-1]
    what = f"{type(error).__name__}: {message}"
    told = {"raised": what, "why": f"{what}\nraised at {frame.filename}:{frame.lineno}"}
    return _where(case) | told | _replay(case, device)


def shrink(found: list[Entry], device: str, progress: Progress) -> None:
    """Add the smallest failing call to the first failure of each op, backend and dtype."""
    first: dict[tuple[str, ...], Entry] = {}
    for failure in found:
        if not failure.get("raised", "").startswith(BuildError.__name__):
            first.setdefault(sample_of(failure)[:3], failure)
    for done, ((name, backend, dtype), failure) in enumerate(first.items()):
        progress(f"{name} {backend} {dtype}: shrinking what fails", done, len(first))
        op, kind = get(name), getattr(torch, dtype)
        sample = smallest_failure(op, backend, kind, device)
        if sample is not None:
            failure["smallest"] = _smallest(Case(op, sample, backend, kind), device)


def _smallest(case: Case, device: str) -> Entry:
    call = describe(case.op, case.sample, case.dtype)
    torch.manual_seed(check.SEED)
    try:
        with check.nan_memory():
            compared = check.check_arbitrary(*case, device)
    except Exception as error:
        return {"call": call, "why": raised(case, error, device)["why"]}
    return {"call": call, "why": next(str(c) for c in compared if not c.ok)}


def lines(found: list[Entry]) -> Iterator[str]:
    """What there is to read: a sample's failures, and once for all of them how to go on."""
    for i, failure in enumerate(found):
        yield f"FAILED {' '.join(sample_of(failure))}: {_indented(failure['why'])}"
        if i + 1 == len(found) or sample_of(found[i + 1]) != sample_of(failure):
            yield f"  call: {failure['call']}"
            interpreted = " in Triton's interpreter" * (failure["backend"] == "triton")
            yield f"  replay{interpreted}: {failure['replay']}"
        if "smallest" in failure:
            call, why = failure["smallest"]["call"], failure["smallest"]["why"]
            yield f"  the smallest call that fails: {call}: {_indented(why)}"


def _indented(message: str) -> str:
    return message.replace("\n", "\n    ").replace("; worst at", "\n    worst at")


def sample_of(found: Entry) -> tuple[str, ...]:
    """What names the sample of an entry."""
    return tuple(found[key] for key in ("op", "backend", "dtype", "case"))


def _where(case: Case) -> Entry:
    return {
        "op": case.op.name,
        "backend": case.backend,
        "dtype": dtype_name(case.dtype),
        "case": case.sample.name,
    }


def _replay(case: Case, device: str) -> Entry:
    """The call in words, and its command; without --device, Triton's kernels are interpreted."""
    command = ["bigops", "check", case.op.name, "--backend", case.backend]
    command += ["--dtype", dtype_name(case.dtype), "--case", case.sample.name]
    command += ["--bench"] if case.sample.bench else []
    command += ["--device", device] if case.backend != "triton" and device != "cpu" else []
    call = describe(case.op, case.sample, case.dtype)
    return {"call": call, "replay": shlex.join(command)}
