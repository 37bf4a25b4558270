"""`bigops check`: the truth of every op on every backend, held against the float64 reference."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import check as truth
from ..backends import interpreter, triton
from ..extension import BuildError
from ..ops import BackendError, FallbackWarning, Op, Sample
from . import UserError, failures, words

ABOUT = "Hold every op on every backend against its float64 reference, outputs and gradients."
EPILOG = "Exit status: 0 all within their limits, 1 something is not, 2 a wrong word."


def add_parser(subparsers: Any) -> None:
    """Add `check` to the command line."""
    parser = subparsers.add_parser("check", help=ABOUT, description=ABOUT, epilog=EPILOG)
    add = parser.add_argument
    add("ops", nargs="*", metavar="OP", help="ops; all by default")
    add("--backend", help="native, triton or reference (default: those that work here)")
    add("--dtype", action="append", default=[], help="float32, bfloat16, ...; may be repeated")
    add("--case", default="", metavar="TEXT", help="only samples whose name contains this")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    add("--bench", action="store_true", help="the realistic sizes instead of the small ones")
    add("--json", metavar="FILE", help="write every comparison as JSON")
    parser.set_defaults(run=run)


@dataclass
class Found:
    """What a check found; `checks` holds one entry per op, backend, dtype, sample and tensor."""

    checks: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    not_served: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    unavailable: list[str] = field(default_factory=list)
    broken: set[tuple[str, str]] = field(default_factory=set)  # ops and backends


def run(args: argparse.Namespace) -> int:
    """0 when all is within its limits, else 1."""
    ops = words.ops(args.ops)
    device = words.device(args.device)
    dtypes = [words.dtype(name) for name in args.dtype] or None
    asked = words.backend(args.backend) if args.backend else None
    words.writable("--json", args.json)
    found = Found()
    backends = _backends(ops, asked)
    if backends == ["triton"] and device == "cpu" and triton.INSTALLED and not triton.INTERPRETED:
        return _interpreted(args)
    backends = [b for b in backends if _available(b, device, ops, found)]
    todo = [
        case for case in truth.cases(ops, backends, dtypes, args.bench) if args.case in case[1].name
    ]
    if backends and not todo:
        raise UserError(f"no sample has {args.case!r} in its name and one of these dtypes")
    if "triton" in backends and device == "cpu":
        interpreter.apply()
    try:
        with words.progress() as progress:
            for done, (op, sample, backend, dtype) in enumerate(todo):
                progress(
                    f"{op.name} {backend} {failures.dtype_name(dtype)} {sample.name}",
                    done,
                    len(todo),
                )
                if (op.name, backend) not in found.broken:
                    _check(found, op, sample, backend, dtype, device)
            failures.shrink(found.failures, device, progress)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    words.write_json(args.json, _as_json(found, device))
    _print(found)
    return 1 if found.failures else 0


def _backends(ops: list[Op], asked: str | None) -> list[str]:
    if asked:
        return [asked]
    return list(dict.fromkeys(backend.name for op in ops for backend in op.backends))


def _available(backend: str, device: str, ops: list[Op], found: Found) -> bool:
    """Whether the backend runs here at all; the reason is noted where not."""
    reason = None
    kind = torch.device(device).type
    if backend == "native":
        devices = {d for op in ops for b in op.backends if b.name == backend for d in b.devices}
        reason = None if kind in devices else f"no kernels for {kind} yet"
    elif backend == "triton":
        reason = triton.why_not(kind)
        if reason and triton.INSTALLED:
            reason = "on a CPU it is interpreted: bigops check --backend triton"
    if reason:
        found.unavailable.append(f"{backend}: {reason}")
    return reason is None


def _check(
    found: Found, op: Op, sample: Sample, backend: str, dtype: torch.dtype, device: str
) -> None:
    """Check one sample; whatever it raises is a failure of the sample."""
    case = failures.Case(op, sample, backend, dtype)
    torch.manual_seed(truth.SEED)
    try:
        if backend != "reference":
            reason = truth.serves(op, sample, backend, dtype, device)
            if reason is not None:
                found.not_served[op.name, backend, reason] += 1
                return
        torch.manual_seed(truth.SEED)
        with warnings.catch_warnings(), truth.nan_memory():
            warnings.simplefilter("ignore", FallbackWarning)
            comparisons = truth.check_sample(op, sample, backend, dtype, device)
    except BackendError as error:
        found.not_served[op.name, backend, str(error)] += 1
        return
    except BuildError as error:  # the same for all samples of the backend: told once
        found.broken.add((op.name, backend))
        found.failures.append(failures.raised(case, error, device))
        return
    except Exception as error:  # a kernel that raises is as wrong as one that miscounts
        found.failures.append(failures.raised(case, error, device))
        return
    for comparison in comparisons:
        found.checks.append(failures.entry(case, comparison))
        if not comparison.ok:
            found.failures.append(failures.off_limit(case, comparison, device))


def _interpreted(args: argparse.Namespace) -> int:
    """The same command in a process in which Triton interprets its kernels."""
    command = [sys.executable, "-c", "import sys; from bigops.cli import main; sys.exit(main())"]
    words_again = ["check", *args.ops, "--backend", "triton", "--device", args.device]
    for name in args.dtype:
        words_again += ["--dtype", name]
    words_again += ["--case", args.case] + (["--bench"] if args.bench else [])
    words_again += ["--json", args.json] if args.json else []
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    try:
        return subprocess.call([*command, *words_again], env=environment)
    except KeyboardInterrupt:
        return 130


def _as_json(found: Found, device: str) -> dict[str, Any]:
    return {
        "device": device,
        "checks": found.checks,
        "failures": found.failures,
        "not_served": [
            {"op": op, "backend": backend, "reason": reason, "samples": count}
            for (op, backend, reason), count in found.not_served.items()
        ],
        "unavailable": found.unavailable,
    }


def _print(found: Found) -> None:
    groups: defaultdict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for entry in found.checks:
        groups[entry["op"], entry["backend"], entry["dtype"]].append(entry)
    rows = []
    for (op, backend, dtype), entries in groups.items():
        worst = max(entries, key=_share)
        cases = len({entry["case"] for entry in entries})
        where = f"{worst['case']}: {worst['tensor']}"
        bad = len({e["case"] for e in entries if not e["ok"]})
        verdict = f"{bad} FAILED" if bad else "ok"
        rows.append([op, backend, dtype, str(cases), f"{_share(worst):.3g}", where, verdict])
    headers = ("op", "backend", "dtype", "samples", "error / limit", "worst at", "")
    words.print_table("Worst error over its limit", headers, rows)
    for (op, backend, reason), count in found.not_served.items():
        print(f"not served: {op} on {backend}, {count} samples: {reason}")
    for line in found.unavailable:
        print(f"not available: {line}")
    for line in failures.lines(found.failures):
        print(line)
    checked = {failures.sample_of(entry) for entry in found.checks + found.failures}
    failed = {failures.sample_of(entry) for entry in found.failures}
    print(
        f"{len(checked)} samples checked, {len(found.checks)} tensors compared, "
        f"{len(failed)} samples failed"
    )


def _share(entry: dict[str, Any]) -> float:
    if entry["error_limit"] == 0.0:
        return 0.0 if entry["error"] == 0.0 else float("inf")
    return float(entry["error"] / entry["error_limit"])
