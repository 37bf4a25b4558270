"""What the commands share: turning words into ops, dtypes and files, and telling the user.

A wrong word raises `UserError` with one line that names it and what it could have been.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .. import plugins
from ..ops import Op, get, table
from ..training import InputError, check_writable, usable_device
from ..training.outputs import write_whole
from . import UserError

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
    "fp64": torch.float64,
}
BACKENDS = ("native", "triton", "reference")
HINT = 'pip install "bigops[bench]"'

Progress = Callable[[str, int, int], None]


def with_plugins(names: Sequence[str]) -> list[str]:
    """`names`, or those of the project in the current folder; plugins' ops are in the table now.

    A plugin that cannot be imported is told, and is an error if it was asked for.
    """
    found = plugins.load()
    for name, reason in found.broken.items():
        line = f"plugin {name}: {reason}"
        if name in names or (name in found.local and not names):
            raise UserError(line)
        print(f"bigops: {line}", file=sys.stderr)
    return list(names) or found.here


def ops(names: Sequence[str]) -> list[Op]:
    """The ops with these names, or all."""
    if not names:
        return list(table().values())
    try:
        return [get(name) for name in dict.fromkeys(names)]
    except ValueError as error:
        raise UserError(str(error)) from error


def dtype(name: str) -> torch.dtype:
    """The dtype called `name`."""
    if name not in DTYPES:
        raise UserError(f"unknown dtype {name!r}; known: {', '.join(DTYPES)}")
    return DTYPES[name]


def backend(name: str) -> str:
    """`name`, if it is a backend's."""
    if name not in BACKENDS:
        raise UserError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    return name


def device(name: str) -> str:
    """`name`, if it is a device that works here."""
    try:
        return str(usable_device(name))
    except InputError as error:
        raise UserError(str(error)) from error


def writable(option: str, path: str | None) -> None:
    """Refuse a file that cannot be written, before the work whose result it takes."""
    if path is None:
        return
    try:
        check_writable(option, path)
    except InputError as error:
        raise UserError(str(error)) from error


def write(option: str, path: str | None, text: str) -> None:
    """Put `text` in the place of the file, as a whole or not at all; nothing without a path."""
    if not path:
        return
    try:
        write_whole(option, path, text.encode())
    except InputError as error:
        raise UserError(str(error)) from error


def write_json(path: str | None, content: Any) -> None:
    """`write` for JSON, as --json has it."""
    write("--json", path, json.dumps(content, indent=1) + "\n")


def has_rich() -> bool:
    """Whether rich, of the bench extra, is installed."""
    return importlib.util.find_spec("rich") is not None


def print_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout: rich's on a terminal, aligned words elsewhere or without rich."""
    if not rows:
        return
    if has_rich() and sys.stdout.isatty():
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        drawn = Table(title=title, title_justify="left", title_style="bold")
        for index, header in enumerate(headers):
            drawn.add_column(header, justify="right" if _numeric(rows, index) else "left")
        for row in rows:
            drawn.add_row(*(escape(cell) for cell in row))
        Console().print(drawn)
        return
    print(title)
    widths = [max(len(r[i]) for r in (headers, *rows)) for i in range(len(headers))]
    for row in (headers, *rows):
        cells = [
            cell.rjust(width) if _numeric(rows, i) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  " + "  ".join(cells).rstrip())


def _numeric(rows: Sequence[Sequence[str]], column: int) -> bool:
    return all(row[column][:1].isdigit() or row[column][:1] in "–-" for row in rows)


@contextmanager
def progress() -> Iterator[Progress]:
    """A bar on stderr where that is a terminal and rich is installed, else silence.

    Gives a function of (what is being done, pieces done, pieces in all).
    """
    if not (has_rich() and sys.stderr.isatty()):
        yield lambda what, done, total: None
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("{task.description}"),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(
            task, description=what, completed=done, total=total
        )
