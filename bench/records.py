"""One case becomes one record: time, peers, truth, memory, and how far from the machine's limit.

speedup_vs_eager   median over the rounds of eager's time over ours in the same round
spread             interquartile range of those ratios
error, eager_error, error_limit
                   of the tensor that is nearest its limit, relative to the float64 reference
torch_share        part of our time inside torch's own kernels: 0 where all of it is ours
percent_of_limit   100 x the roofline's time over ours
peers_ms           median of every contestant beside ours, null of those that could not run or
                   computed something else
sweep              null, or the dimension and its size: {"name": "S", "value": 512}
options            what the command that repeats the record needs besides its case
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from bigops.bench import memory, timing
from bigops.bench.cases import COMPILE, EAGER, OURS, Case, Unjudged, dtype_name
from bigops.bench.ceilings import Ceilings
from bigops.bench.peers.adapter import NOT_INSTALLED, first_line
from bigops.check import Comparison

KEYS = (
    "case", "pass", "device", "dtype", "backend", "time_ms", "eager_ms", "compile_ms", "best_ms",
    "best_name", "speedup_vs_eager", "speedup_vs_best", "spread", "torch_share", "error",
    "eager_error", "error_limit", "peak_bytes", "eager_peak_bytes", "gflops", "gbytes",
    "percent_of_limit", "peers_ms", "sweep", "options",
)  # fmt: skip
Record = dict[str, Any]
GRAPH = " (CUDA graph)"  # behind the case's name

# Shorter than this, launches weigh as much as kernels: the replay of a graph is measured beside.
GRAPH_BELOW_SECONDS = 50e-6

_KERNELS = ("aten::", "mkldnn::", "mkl::")
# What torch spends on memory and metadata is no kernel of torch's.
_NOT_KERNELS = re.compile(
    r"aten::(empty|new_empty|resize|view|_unsafe_view|as_strided|expand|permute|transpose|t$"
    r"|select|slice|narrow|unsqueeze|squeeze|detach|alias|unbind|split|reshape|flatten|unflatten"
    r"|chunk|result_type|is_nonzero|item|_local_scalar_dense|lift_fresh)"
)


@dataclass
class Effort:
    """How much time a case may take, what is measured at all, and what was left out."""

    seconds: float = 2.0
    compile_seconds: float = 60.0  # what is left of them, for all cases together
    memory: bool = False
    notes: list[str] = field(default_factory=list)
    not_compiled: list[str] = field(default_factory=list)

    def note(self, line: str) -> None:
        """Add a line, once."""
        if line not in self.notes:
            self.notes.append(line)


def measure(case: Case, ceilings: Ceilings, effort: Effort) -> list[Record]:
    """The case's record; on a GPU, for short kernels, a second one of the graph's replay."""
    torch.manual_seed(0)
    comparisons = _truth(case, effort)
    tried = {name: case.runner(name) for name in (OURS, EAGER)}
    for name in (*((COMPILE,) if case.compiles else ()), *case.peers()):
        tried[name] = _tried(case, name, effort)
    for name, reason in case.left_out().items():
        if reason.endswith(NOT_INSTALLED):
            continue  # a run says so once for all ops
        effort.note(f"{case.subject} {dtype_name(case.dtype)}: no {name}: {reason}")
    contestants = {name: call for name, call in tried.items() if call is not None}
    clock = timing.clock_for(case.device)
    contest = timing.contest(contestants, clock, effort.seconds)
    record = _record(case, contest, comparisons, ceilings)
    record["peers_ms"] = {
        name: 1e3 * contest.median(name) if name in contestants else None
        for name in tried
        if name != OURS
    }
    record["torch_share"] = _torch_share(contestants[OURS])
    if effort.memory:
        record["peak_bytes"] = memory.peak_bytes(case, OURS)
        record["eager_peak_bytes"] = memory.peak_bytes(case, EAGER)
    records = [record]
    on_gpu = torch.device(case.device).type == "cuda"
    if on_gpu and contest.median(OURS) < GRAPH_BELOW_SECONDS:
        records += _graph_records(case, contestants, record, effort)
    return records


def _truth(case: Case, effort: Effort) -> list[Comparison]:
    try:
        with ieee_products():
            return case.truth()
    except Unjudged as reason:
        effort.note(f"{case.title}: its error is not known: {reason}")
        return []


@contextmanager
def ieee_products() -> Iterator[None]:
    """fp32 convolutions without TF32, which torch allows cuDNN to use where that is faster.

    Where it does is not to be known, and errors would say who has used it, not who is right.
    """
    flags: Any = torch.backends.cudnn.conv
    before = flags.fp32_precision
    flags.fp32_precision = "ieee"
    try:
        yield
    finally:
        flags.fp32_precision = before


def _tried(case: Case, name: str, effort: Effort) -> timing.Call | None:
    """The contestant's call, or None and a note if it cannot run or computes something else."""
    compiled = case.compiled(name)
    if compiled and effort.compile_seconds <= 0.0:
        if name == COMPILE:
            effort.not_compiled.append(case.title)
        return None
    start = time.perf_counter()
    try:
        # What torch.compile makes of eager is eager's by definition.
        wrong = None if name == COMPILE else case.disagreement(name)
        call = case.runner(name)
        call(0)
    except Exception as error:  # whatever Inductor or a package raises, the others stand
        shown = "torch.compile" if name == COMPILE else name
        effort.note(f"{case.title}: {shown} cannot: {first_line(error)}")
        return None
    finally:
        if compiled:
            effort.compile_seconds -= time.perf_counter() - start
    if wrong is not None:
        effort.note(f"{case.title}: {name} computes something else: {wrong}")
        return None
    return call


def worst(comparisons: list[Comparison]) -> Comparison | None:
    """The comparison that is nearest its limit, or furthest beyond."""
    judged = [c for c in comparisons if c.error_limit > 0.0] or comparisons
    return max(judged, key=lambda c: c.error / (c.error_limit or 1.0), default=None)


def _record(
    case: Case, contest: timing.Contest, comparisons: list[Comparison], ceilings: Ceilings
) -> Record:
    ours = contest.median(OURS)
    best = contest.fastest([name for name in contest.seconds if name != OURS])
    speedup = contest.speedup(OURS, EAGER)
    truth = worst(comparisons)
    cost = case.cost()
    limit = ceilings.least_seconds(cost, case.dtype, case.streams) if cost else None
    compiled = COMPILE in contest.seconds
    return {
        case.kind: case.subject,
        "case": case.name,
        "pass": case.passes,
        "device": case.device,
        "dtype": dtype_name(case.dtype),
        "backend": case.backend(),
        "time_ms": 1e3 * ours,
        "eager_ms": 1e3 * contest.median(EAGER),
        "compile_ms": 1e3 * contest.median(COMPILE) if compiled else None,
        "best_ms": 1e3 * contest.median(best),
        "best_name": best,
        "speedup_vs_eager": speedup.median,
        "speedup_vs_best": contest.speedup(OURS, best).median,
        "spread": speedup.width,
        "torch_share": None,
        "error": truth.error if truth else None,
        "eager_error": truth.eager_error if truth else None,
        "error_limit": truth.error_limit if truth else None,
        "peak_bytes": None,
        "eager_peak_bytes": None,
        "gflops": cost.flops / ours / 1e9 if cost else None,
        "gbytes": cost.bytes / ours / 1e9 if cost else None,
        "percent_of_limit": 100.0 * limit / ours if limit else None,
        "peers_ms": {},
        "sweep": case.sweep,
        "options": case.options,
    }


def _graph_records(
    case: Case, contestants: dict[str, timing.Call], record: Record, effort: Effort
) -> list[Record]:
    """The same case with every contestant captured as a CUDA graph, of those that can be."""
    clock = timing.GraphClock(batch=32)
    capturable = {}
    for name in [name for name in contestants if name != COMPILE]:
        try:
            clock.measure(contestants[name], 0, 1)
        except Exception as error:  # what copies from the host, say; its launches were measured
            effort.note(f"{case.title}: {name} is no CUDA graph: {first_line(error)}")
        else:
            capturable[name] = contestants[name]
    if not {OURS, EAGER} <= capturable.keys():
        return []
    contest = timing.contest(capturable, clock, effort.seconds)
    best = contest.fastest([name for name in contest.seconds if name != OURS])
    speedup = contest.speedup(OURS, EAGER)
    faster = contest.median(OURS) * 1e3 / record["time_ms"]
    scaled = {
        key: record[key] / faster
        for key in ("gflops", "gbytes", "percent_of_limit")
        if record[key] is not None
    }
    return [
        record
        | scaled
        | {
            "case": record["case"] + GRAPH,
            "time_ms": 1e3 * contest.median(OURS),
            "eager_ms": 1e3 * contest.median(EAGER),
            "compile_ms": None,
            "best_ms": 1e3 * contest.median(best),
            "best_name": best,
            "speedup_vs_eager": speedup.median,
            "speedup_vs_best": contest.speedup(OURS, best).median,
            "spread": speedup.width,
            "peers_ms": {
                name: 1e3 * contest.median(name) if name in contest.seconds else None
                for name in record["peers_ms"]
            },
        }
    ]


def _torch_share(call: timing.Call) -> float | None:
    """The part of a call's time that torch's kernels take."""
    found = torch_times(call)
    return None if found is None else min(1.0, sum(found[1].values()) / found[0])


def torch_times(call: timing.Call, calls: int = 3) -> tuple[float, dict[str, float]] | None:
    """The time of whole calls and the self time of each of torch's kernels in them, in
    microseconds, by torch's profiler; None where it does not tell."""
    if sys.platform != "linux":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        _silent_stderr(),
        torch.profiler.profile(activities=activities) as profile,
        torch.profiler.record_function("bench"),
    ):
        for index in range(calls):
            call(index)
    whole, inside = 0.0, {}
    for event in profile.key_averages():
        if event.key == "bench":
            whole = event.cpu_time_total
        elif event.key.startswith(_KERNELS) and not _NOT_KERNELS.match(event.key):
            inside[event.key] = event.self_cpu_time_total
    return (whole, inside) if whole else None


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what native code writes: some of torch's profilers announce every start and stop."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)


def failing(records: list[Record]) -> list[Record]:
    """The records whose error exceeds its limit."""
    return [r for r in records if r["error"] is not None and not r["error"] <= r["error_limit"]]
