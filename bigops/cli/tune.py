"""`bigops bench --tune`: measure the backends, keep the choices, or forget them."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..ops import tuned
from ..training import InputError
from . import UserError, words


def tune(plan: Any) -> int:
    """Always 0: what has no choice is noted."""
    from ..bench import tuning

    if plan.backend is not None:
        raise UserError(f"--tune chooses among the backends: leave out --backend {plan.backend}")
    file = tuned.path()
    try:
        tuned.entries()
        file.parent.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        raise UserError(f"--tune: {file}: {error} (--tune --forget deletes it)") from error
    except OSError as error:
        raise UserError(f"--tune: {file}: {error.strerror}") from error
    words.writable("--tune", str(file))
    notes: list[str] = []
    try:
        with words.progress() as progress:
            entries = tuning.tune(plan, notes, progress)
        tuning.save(entries)
    except InputError as error:
        raise UserError(str(error)) from error
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    words.print_table("Backends", tuning.HEADERS, tuning.rows(entries))
    for note in notes:
        print(f"note: {note}")
    print(f"{len(entries)} choices kept in {file}" if entries else "nothing was kept")
    return 0


def forget(args: argparse.Namespace) -> int:
    """Delete what was kept."""
    from ..bench import tuning

    if not args.tune:
        raise UserError("--forget goes with --tune")
    print(f"{'deleted' if tuning.forget() else 'there is no'} {tuned.path()}")
    return 0
