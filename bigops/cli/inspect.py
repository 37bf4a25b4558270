"""`bigops inspect`: what became of the kernels on every GPU: registers, spills, occupancy, code."""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..backends import triton
from ..ledger import difference, files, nvcc, nvcc_rules, rules
from ..ledger.architectures import ARCHITECTURES
from ..ledger.compiling import LedgerError, code, compile_all, plan
from ..ledger.entries import Entry, all_recorded, choose, folder, recorded
from ..ledger.launches import Launch
from ..ops import Op, get, table
from . import UserError, schedules, words

ABOUT = "Show what Triton's compiler makes of the kernels on GPUs that need not be here."
EPILOG = "example: bigops inspect attention --arch sm_90 --call 'causal, bf16'"
HEADERS = (
    "kernel", "call", "dtype", "step", "GPU", "registers", "spills", "shared", "matrix", "load",
    "store", "TF32", "occupancy", "limited by", "tile",
)  # fmt: skip

CUDA_HEADERS = (
    "file", "kernel", "GPU", "registers", "spills", "shared", "matrix", "copies", "load", "store",
)  # fmt: skip


def add_parser(subparsers: Any) -> None:
    """Add `inspect` to the command line."""
    parser = subparsers.add_parser("inspect", help=ABOUT, description=ABOUT, epilog=EPILOG)
    add = parser.add_argument
    add("ops", nargs="*", metavar="KERNEL", help="ops or kernel functions (default: a summary)")
    add("--op", help="only what this op launches")
    add("--arch", metavar="GPU", help=f"one of {', '.join(ARCHITECTURES)}")
    add("--call", default="", metavar="TEXT", help="only calls with this in 'call, dtype, step'")
    add("--sass", action="store_true", help="print the machine code (AMD: assembly)")
    add("--ptx", action="store_true", help="print the PTX (AMD: LLVM's IR)")
    add("--diff", metavar="SAVED", help="a file of the ledger or of --json: what changed since")
    add("--json", metavar="FILE", help="write the entries as JSON")
    add("--update", action="store_true", help="compile what changed and write the ledger's files")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0; 1 when an entry breaks a rule without a reason or, with --diff, became worse."""
    if args.arch not in (None, *ARCHITECTURES):
        raise UserError(f"unknown GPU {args.arch!r}; known: {', '.join(ARCHITECTURES)}")
    if args.op is not None:
        words.ops([args.op])
    before = _saved(args.diff) if args.diff else []
    words.writable("--json", args.json)
    try:
        if args.update:
            return _update(args)
        chosen = [args.op] if args.op and not args.ops else args.ops
        if args.sass or args.ptx:
            return _code(args, chosen)
        entries = _entries(args, chosen)
    except LedgerError as error:
        raise UserError(str(error)) from error
    found = choose(entries, chosen, args.op, args.arch, args.call)
    cuda = _cuda(args, chosen)
    modelled = schedules.choose(chosen, args.op, args.arch, args.call)
    if not (found or cuda):
        raise UserError("no kernel matches these words")
    content = {"entries": [_as_json(entry) for entry in found], **schedules.as_json(modelled)}
    words.write_json(args.json, content)
    if args.diff:
        return _difference(choose(before, chosen, args.op, args.arch, args.call), found)
    excuses: list[str] = []
    if chosen:
        words.print_table("Triton kernels, compiled", HEADERS, [_row(entry) for entry in found])
        excuses = rules.excuses(found) + nvcc_rules.excuses(cuda)
    else:
        _summary(found)
    words.print_table("CUDA C++ kernels, by nvcc", CUDA_HEADERS, [_cuda_row(k) for k in cuda])
    schedules.show(modelled, explained=bool(chosen))
    for line in excuses:
        print(f"accepted: {line}")
    complaints = rules.complaints(found, spare=0 if _same_triton() else rules.FEW)
    complaints += nvcc_rules.complaints(cuda)
    for line in complaints:
        print(f"broken: {line}")
    return int(bool(complaints))


def _entries(args: argparse.Namespace, chosen: Sequence[str]) -> list[Entry]:
    """The recorded entries; those chosen by name as the kernels are now."""
    known = all_recorded()
    if not chosen:
        return known
    ops = _ops(chosen, known)
    if not triton.INSTALLED and all(op in files.own_ops() for op in ops):
        return known
    comparison = files.compare(_planned(args, ops, chosen), _triton_version())
    with words.progress() as progress:
        return comparison.entries(_compiled(comparison.changed, progress))


def _compiled(launches: Sequence[Launch], progress: words.Progress) -> list[Entry]:
    done = 0

    def report(launch: Launch) -> None:
        nonlocal done
        done += 1
        progress(f"{launch.kernel} on {launch.target}", done, len(launches))

    return compile_all(launches, report)


def _planned(args: argparse.Namespace, ops: Sequence[Op], chosen: Sequence[str]) -> list[Launch]:
    targets = [args.arch] if args.arch else list(ARCHITECTURES)
    return choose(plan(ops, targets), chosen, args.op, args.arch, args.call)


def _ops(chosen: Sequence[str], known: Sequence[Entry]) -> list[Op]:
    """The ops that launch the kernels of these names, which are ops or kernel functions."""
    found: dict[str, Op] = {}
    for word in chosen:
        if word in table():
            names = [word]
        else:
            names = [entry.op for entry in known if entry.kernel == word]
            names = names or _launching(word)
        if not names:
            kernels = sorted({entry.kernel for entry in known})
            listed = ", ".join([*sorted(table()), *kernels])
            raise UserError(f"unknown op or kernel {word!r}; known: {listed}")
        found |= {name: get(name) for name in names}
    return list(found.values())


def _launching(kernel: str) -> list[str]:
    """The ops that launch a kernel which is not recorded: a new one, or one declared elsewhere."""
    if not triton.INSTALLED:
        return []
    found = plan(list(table().values()), ["sm_90"])
    return [launch.op for launch in found if launch.kernel == kernel]


def _code(args: argparse.Namespace, chosen: Sequence[str]) -> int:
    if not chosen:
        raise UserError("--sass and --ptx need a KERNEL or --op")
    launches = _planned(args, _ops(chosen, all_recorded()), chosen)
    if not launches:
        raise UserError("no kernel matches these words")
    for text in [option for option in ("sass", "ptx") if getattr(args, option)]:
        for launch, listing in zip(launches, code(launches, text), strict=True):
            print(f"// {launch.kernel}: {launch.op} {launch.call}, {launch.dtype}, {launch.step}")
            print(f"// {launch.target}: {launch.config}")
            print(listing.rstrip() + "\n")
    return 0


def _update(args: argparse.Namespace) -> int:
    given = ("ops", "op", "arch", "call", "sass", "ptx", "diff", "json")
    if any(getattr(args, name) for name in given):
        raise UserError("--update goes alone: it writes all of the ledger's files")
    with words.progress() as progress:
        texts, entries, new = files.renewed(_triton_version(), progress)
        cuda = nvcc.renewed(progress)
    if cuda is not None:
        texts["cuda"], built = cuda
    for name, text in texts.items():
        words.write("--update", str(folder() / f"{name}.txt"), text)
    for name in recorded().keys() - texts.keys():
        (folder() / f"{name}.txt").unlink()
    print(f"{entries} entries, {new} of them compiled, in {folder()}")
    if cuda is None:
        print("CUDA C++ kernels stay as recorded: there is no nvcc or cuobjdump here, or no source")
        return 0
    for name, file in nvcc.recorded_files()[1].items():
        how = "compiled anew" if name in built else "as recorded"
        print(f"{name}: {len(file.kernels)} kernels, {file.seconds} seconds of a core, {how}")
    return 0


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        raise LedgerError("compiling needs triton, which is not installed") from None


def _same_triton() -> bool:
    """Whether the entries shown are of the Triton that wrote the files."""
    return not triton.INSTALLED or {v for v, _ in recorded().values()} == {_triton_version()}


def _saved(path: str) -> list[Entry]:
    try:
        return difference.saved(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UserError(f"--diff {path}: {reason}") from error
    except ValueError as error:
        raise UserError(f"--diff {path}: {error}") from error


def _difference(before: Sequence[Entry], after: Sequence[Entry]) -> int:
    changes = difference.changes(before, after)
    rows = [
        [*change.name[:1], *change.name[2:], "; ".join(change.words), ", ".join(change.worse)]
        for change in changes
    ]
    headers = ("kernel", "call", "dtype", "step", "GPU", "changed", "worse")
    words.print_table("Changes", headers, rows)
    worse = sum(bool(change.worse) for change in changes)
    print(f"{len(after)} entries, {len(changes)} changed, {worse} worse")
    return int(bool(worse))


def _summary(entries: Sequence[Entry]) -> None:
    """A row per kernel and GPU: the worst of its entries."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.kernel, entry.target), []).append(entry)
    rows = [
        [
            kernel,
            target,
            str(len(found)),
            str(max(e.registers for e in found)),
            str(max(e.spills for e in found)),
            str(max(e.shared for e in found)),
            " ".join(sorted({kind for e in found for kind in e.matrix_counts})),
            f"{min(e.occupancy.percent for e in found)}%",
        ]
        for (kernel, target), found in groups.items()
    ]
    headers = ("kernel", "GPU", "entries", "registers", "spills", "shared", "matrix", "occupancy")
    words.print_table("Triton kernels, the worst of their entries", headers, rows)


def _row(entry: Entry) -> list[str]:
    fits = entry.occupancy
    vectors = str(entry.registers) + (f" ({entry.agpr} acc)" if entry.agpr else "")
    return [
        entry.kernel, entry.call, entry.dtype, entry.step, entry.target, vectors,
        str(entry.spills), str(entry.shared), entry.matrix, str(entry.load), str(entry.store),
        "yes" if entry.tf32 else "", f"{fits.percent}%" if fits.programs else "does not fit",
        fits.limit, entry.config,
    ]  # fmt: skip


def _cuda(args: argparse.Namespace, chosen: Sequence[str]) -> list[nvcc.CudaKernel]:
    """The CUDA C++ kernels that the words choose, as recorded."""
    if args.call:
        return []
    return [
        k
        for k in nvcc.recorded()[1]
        if (not chosen or k.op in chosen or k.kernel.partition("<")[0] in chosen)
        and args.op in (None, k.op)
        and args.arch in (None, k.target.removesuffix("a"))
    ]


def _cuda_row(kernel: nvcc.CudaKernel) -> list[str]:
    return [
        kernel.source, kernel.kernel, kernel.target, str(kernel.registers), str(kernel.spills),
        str(kernel.shared), kernel.matrix, str(kernel.copies), str(kernel.load), str(kernel.store),
    ]  # fmt: skip


def _as_json(entry: Entry) -> dict[str, Any]:
    return {**asdict(entry), "occupancy": asdict(entry.occupancy)}
