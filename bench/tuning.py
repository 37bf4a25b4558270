"""`bigops bench --tune`: which backend is fastest, call by call, written where dispatch reads it.

For every case all backends that would serve it unforced, and the reference, alternate on the same
inputs; where a gradient is needed, the forward alone is measured too, as inference calls it. The
usual choice stays unless the lower quartile of another's speed-up over it is above a twentieth.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bigops.bench import run, timing
from bigops.bench.cases import OURS, OpCase, dtype_name
from bigops.bench.compare import LEAST
from bigops.check import serves
from bigops.ops import Sample, get, tuned
from bigops.ops.declare import Call
from bigops.ops.dispatch import decision
from bigops.training.outputs import write_whole

HEADERS = ("op", "case", "dtype", "gradients", "chosen", "x as fast", "as")


def tune(
    plan: run.Plan, notes: list[str], progress: Callable[[str, int, int], None] = lambda *_: None
) -> list[dict[str, Any]]:
    """Measure the plan's cases of ops; one entry per call that has a choice."""
    todo = [variant for case in run.cases(plan) for variant in _variants(case)]
    found = []
    for done, case in enumerate(todo):
        progress(f"{case.title}, {case.passes}", done, len(todo))
        torch.manual_seed(0)
        try:
            entry = _entry(case, plan.seconds)
        except Exception as error:  # memory that is not there, say: the others go on
            notes.append(f"{case.title}: {type(error).__name__}: {error}")
            continue
        if isinstance(entry, str):
            notes.append(f"{case.title}: {entry}")
        else:
            found.append(entry)
    return found


def save(entries: list[dict[str, Any]]) -> None:
    """Put the entries into the file, in the place of older ones of the same calls.

    Raises:
        ValueError, OSError: the file cannot be read, or (`InputError`) not be written.
    """
    if not entries:
        return
    file, names = tuned.path(), ("op", "device", "signature", "bigops", "torch")
    kept = {tuple(entry[n] for n in names): entry for entry in (*tuned.entries(), *entries)}
    file.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"entries": list(kept.values())}, indent=1) + "\n"
    write_whole("tuned", file, content.encode())
    _decide_anew(entries)


def forget() -> bool:
    """Delete the file; whether there was one."""
    there = tuned.path().exists()
    tuned.path().unlink(missing_ok=True)
    tuned.forget()
    return there


def rows(entries: list[dict[str, Any]]) -> list[list[str]]:
    """One row of words per entry, under `HEADERS`."""
    return [
        [
            e["op"], e["case"], e["dtype"], "yes" if "grad" in e["signature"] else "no",
            e["backend"], f"{e['speedup']:.2f}", e["over"],
        ]
        for e in entries
    ]  # fmt: skip


def _decide_anew(entries: list[dict[str, Any]]) -> None:
    """What calls of this process have remembered was decided without the entries."""
    tuned.forget()
    for name in {entry["op"] for entry in entries}:
        get(name).routes.clear()


def _variants(case: Any) -> list[OpCase]:
    """A case of an op, and the same without gradients if it has them; none of a model."""
    if not isinstance(case, OpCase):
        return []
    if not any(t.requires_grad for t in pytree.tree_leaves(case._one) if isinstance(t, Tensor)):
        return [case]
    sample = replace(case.sample, make=_detached(case.sample))
    return [case, OpCase(case.op, sample, case.dtype, case.device)]


def _detached(sample: Sample) -> Callable[[str, torch.dtype], Call]:
    def make(device: str, dtype: torch.dtype) -> Call:
        return pytree.tree_map_only(Tensor, Tensor.detach, sample.make(device, dtype))

    return make


def _entry(case: OpCase, seconds: float) -> dict[str, Any] | str:
    """What the file says of the case's call, or why it has no choice."""
    args, kwargs = case.sample.make(case.device, case.dtype)
    op, op_args, beyond = decision(case.op.function, *args, **kwargs)
    signature = tuned.signature(op_args)
    if signature is None:
        return "it takes lists of tensors, for which no choice is kept"
    kind = torch.device(case.device).type
    fast = [b.name for b in op.backends if beyond is None and b.automatic(kind)]
    names = [
        name for name in fast if serves(case.op, case.sample, name, case.dtype, case.device) is None
    ]
    if not names:
        return "no fast backend serves it"
    if not case.too_large:
        names.append("reference")
    if len(names) == 1:
        return f"only {names[0]} serves it, and the reference would take too much memory"
    calls = {name: _runner(case, name, (args, kwargs)) for name in names}
    contest = timing.contest(calls, timing.clock_for(case.device), seconds)
    fastest = contest.fastest(names)
    if contest.speedup(fastest, names[0]).low <= 1.0 + LEAST:
        fastest = names[0]
    second = contest.fastest([name for name in names if name != fastest])
    return {
        "op": case.op.name,
        "device": tuned.place(op_args),
        "signature": signature,
        **tuned.versions(),
        "backend": fastest,
        "over": second,
        "speedup": contest.speedup(fastest, second).median,
        "date": date.today().isoformat(),
        "case": case.name,
        "dtype": dtype_name(case.dtype),
    }


def _runner(case: OpCase, backend: str, call: Call) -> timing.Call:
    """Our call with the backend forced, on inputs that all backends share."""
    sample = replace(case.sample, make=lambda device, dtype: call)
    return OpCase(case.op, sample, case.dtype, case.device, backend).runner(OURS)
