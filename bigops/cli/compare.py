"""`bigops bench --compare`: a run, or a file, beside an earlier one."""

from __future__ import annotations

import argparse
from typing import Any

from . import UserError, words


def older(path: str, device: str) -> Any:
    """The results to compare with, if they are of this machine."""
    from ..bench import compare, machine

    old = _results("--compare", path)
    if reason := compare.unlike(old, {"machine": machine.describe(device)}):
        raise UserError(f"--compare: {path}: {reason}")
    return old


def _results(option: str, path: str) -> Any:
    from ..bench import compare

    try:
        return compare.load(path)
    except ValueError as error:
        raise UserError(f"{option}: {error}") from error


def against(old: Any, plan: Any, results: Any, progress: words.Progress) -> Any:
    """The comparison, after another look at what seems to have become worse."""
    from ..bench import compare, run

    asked = run.asked(plan)
    first = compare.compare(old["records"], results.records, asked)
    if not first.regressions:
        return first
    run.again(plan, results, [compare.key(c.new) for c in first.regressions], progress)
    return compare.compare(old["records"], results.records, asked)


def files(args: argparse.Namespace) -> int:
    """--compare OLD.json --with NEW.json: nothing is measured or written."""
    from ..bench import compare

    if args.compare is None:
        raise UserError("--with needs --compare OLD.json")
    if args.ops:
        raise UserError(f"--with compares whole files, not {args.ops[0]}")
    old, new = _results("--compare", args.compare), _results("--with", args.new)
    if reason := compare.unlike(old, new):
        raise UserError(f"--compare: {args.compare}: {reason}")
    compared = compare.compare(old["records"], new["records"])
    show(compared, old, new, args.compare)
    return 1 if compared.regressions else 0


def show(compared: Any, old: Any, new: Any, path: str) -> None:
    """Print what changed, what is in one run only, and one line that counts."""
    from ..bench import compare

    words.print_table(f"Since {path}", compare.HEADERS, compared.rows())
    for what, keys in (("new", compared.added), ("missing", compared.missing)):
        for subject, case, passes, _, dtype in keys:
            print(f"{what}: {subject} {case} {passes} {dtype}")
    for line in compare.newer(old, new):
        print(f"note: {line}")
    print(f"since {path}: {compared.summary()}")
