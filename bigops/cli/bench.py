"""`bigops bench`: every op and both models against PyTorch, as a table, a report and records."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch

from . import UserError, compare, tune, words

MODELS = ("CNN", "ResNet18", "Transformer")
ABOUT = "Check and time every op and the models against PyTorch; train the CNN beside its twin."
EPILOG = 'example: bigops bench attention CNN --quick (needs pip install "bigops[bench]")'


def add_parser(subparsers: Any) -> None:
    """Add `bench` to the command line."""
    parser = subparsers.add_parser("bench", help=ABOUT, description=ABOUT, epilog=EPILOG)
    add = parser.add_argument
    add(
        "ops",
        nargs="*",
        metavar="OP",
        help="ops or models (CNN, ResNet18, Transformer); all by default",
    )
    add("--quick", action="store_true", help="less time a case; about 5 minutes on 2 cores")
    add(
        "--case",
        default="",
        metavar="NAME",
        help="only this case, or if none is called so, those whose name contains it",
    )
    add(
        "--sweep",
        action="append",
        default=[],
        metavar="DIM=SIZES",
        help="an op's dimension over many sizes instead of its cases: S=512:16384 doubles, "
        "S=512,1000 lists them; may be repeated",
    )
    add("--json", metavar="FILE", help="write machine and records as JSON")
    add(
        "--report",
        metavar="FILE",
        default="bigops-report.html",
        help="the HTML report (default: %(default)s); '' writes none",
    )
    add("--markdown", action="store_true", help="print README's table instead of the terminal's")
    add("--update-readme", metavar="FILE", help="put README's table between its bench markers")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    add("--backend", help="force native, triton or reference")
    add("--dtype", action="append", default=[], help="float32, bfloat16, ...; may be repeated")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    add("--memory", action="store_true", help="measure peak memory with --quick too")
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add(
        "--compare",
        metavar="OLD.json",
        help="say what became slower or faster since this earlier --json; exit status 1 if "
        "anything is slower, or less true, when measured twice",
    )
    add("--with", dest="new", metavar="NEW.json", help="compare with this file, measure nothing")
    add(
        "--tune",
        action="store_true",
        help="measure the backends that may serve each case and keep the choice for later calls "
        "in the user's cache (see bigops.explain; BIGOPS_TUNED=0 turns it off)",
    )
    add("--forget", action="store_true", help="with --tune: delete the choices instead")
    add("--seconds", type=float, metavar="S", help="time a case, beside its first calls")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 when every case ran, is true, and is no slower than in the run to compare with; else 1."""
    from ..bench import report, run, tables

    if args.new is not None:
        return compare.files(args)
    if args.forget:
        return tune.forget(args)
    plan = _plan(args)
    readme = _readme(args.update_readme)
    for option in ("json", "report", "update_readme"):
        words.writable("--" + option.replace("_", "-"), getattr(args, option) or None)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.tune:
        return tune.tune(plan)
    old = None if args.compare is None else compare.older(args.compare, plan.device)
    compared = None
    try:
        with words.progress() as progress:
            results = run.run(plan, progress)
            if old is not None and not results.stopped:
                compared = compare.against(old, plan, results, progress)
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    if results.stopped and not results.records:
        print("stopped; nothing was measured", file=sys.stderr)
        return 130
    found = results.as_json()
    words.write_json(args.json, found)
    if args.report:
        words.write("--report", args.report, report.page(found))
    markdown = tables.markdown(found)
    if readme is not None and not results.stopped:
        words.write("--update-readme", args.update_readme, tables.insert(readme, markdown))
    if args.markdown:
        print(markdown)
    else:
        _print(found, args.report)
    if old is not None and compared is not None:
        compare.show(compared, old, found, args.compare)
    for line in results.failed:
        print(f"bigops bench: {line}", file=sys.stderr)
    for record in run.failing(results.records):
        print(
            f"bigops bench: {tables.subject(record)} {record['case']} {record['dtype']}: error "
            f"{record['error']:.2e} exceeds its limit {record['error_limit']:.2e}",
            file=sys.stderr,
        )
    if results.stopped:
        return 130
    return 0 if results.ok and not (compared and compared.regressions) else 1


def _plan(args: argparse.Namespace) -> Any:
    from ..bench import run

    models = tuple(m for m in MODELS if m.lower() in {name.lower() for name in args.ops})
    names = [name for name in args.ops if name.lower() not in {m.lower() for m in MODELS}]
    chosen = tuple(op.name for op in words.ops(names)) if names or not args.ops else None
    device = words.device(args.device)
    backend = words.backend(args.backend) if args.backend else None
    if backend == "triton" and device == "cpu":
        raise UserError("--backend triton needs a GPU here: the interpreter's time means nothing")
    if args.threads is not None and not 1 <= args.threads <= 4096:
        raise UserError(f"--threads must be at least 1, got {args.threads}")
    if args.seconds is not None and not 0.0 < args.seconds <= 3600.0:
        raise UserError(f"--seconds must be above 0, got {args.seconds}")
    changes: dict[str, Any] = {
        "ops": chosen if names else (),
        "with_ops": chosen is not None,
        "models": models if args.ops else MODELS,
        "case": args.case,
        "sweeps": _sweeps(args.sweep, names, models),
        "device": device,
        "backend": backend,
        "dtypes": tuple(dict.fromkeys(words.dtype(name) for name in args.dtype)),
        "memory": args.memory or not args.quick,
        "training": not (args.case or args.sweep) and (not args.ops or "CNN" in models),
    }
    if args.no_compile:
        changes["compile_seconds"] = 0.0
    if args.seconds is not None:
        changes["seconds"] = args.seconds
    plan = run.quick(**changes) if args.quick else run.Plan(**changes)
    if not run.cases(plan):
        raise UserError(f"no case has {args.case!r} in its name and these ops and dtypes")
    return plan


def _sweeps(texts: list[str], names: list[str], models: tuple[str, ...]) -> Any:
    """The sweeps, if every op that is named has the dimension, or any op where none is."""
    from ..bench import sweeps

    found = []
    for text in texts:
        try:
            sweep = sweeps.parse(text)
        except ValueError as error:
            raise UserError(f"--sweep {text}: {error}") from error
        if models:
            raise UserError(f"--sweep {text}: {models[0]} is a model and has no dimensions to vary")
        if reason := sweeps.missing(words.ops(names), sweep, every=bool(names)):
            raise UserError(f"--sweep {text}: {reason}")
        found.append(sweep)
    return tuple(found)


def _readme(path: str | None) -> str | None:
    """The file's text, if it has the markers."""
    from ..bench import tables

    if path is None:
        return None
    try:
        text = Path(path).read_text(encoding="utf-8")
        tables.insert(text, "")
    except OSError as error:
        raise UserError(f"--update-readme: {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--update-readme: {path}: {error}") from error
    return text


def _print(found: dict[str, Any], report_path: str) -> None:
    from ..bench import report, tables

    words.print_table("Speed and truth", tables.HEADERS, tables.rows(found["records"]))
    overheads = tables.overhead_rows(found["overhead"])
    words.print_table("Call overhead, tiny inputs", tables.OVERHEAD_HEADERS, overheads)
    training = found["training"]
    if training:
        curve = zip(training["evaluations"], training["plain_evaluations"], strict=True)
        words.print_table(
            "CNN on handwritten digits beside its plain twin, same seed",
            ("epoch", "held-out accuracy", "plain", "held-out loss", "plain"),
            [
                [
                    str(epoch),
                    f"{100 * ours['accuracy']:.2f}%",
                    f"{100 * plain['accuracy']:.2f}%",
                    f"{ours['loss']:.6f}",
                    f"{plain['loss']:.6f}",
                ]
                for epoch, (ours, plain) in enumerate(curve, 1)
            ],
        )
        print(
            f"A training step takes {training['step_ms']:.2f} ms, plain "
            f"{training['plain_step_ms']:.2f} ms: {training['speedup']:.2f}x."
        )
    for note in found["notes"]:
        print(f"note: {note}")
    print(report.summary(found))
    if report_path:
        print(f"report: {os.path.abspath(report_path)}")
    if not words.has_rich():
        print(f"for tables, progress bars and the training: {words.HINT}")
