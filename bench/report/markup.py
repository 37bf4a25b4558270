"""The page's HTML parts: sections, figures with the commands that repeat them, sortable tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from bigops.bench.tables import number

Json = Mapping[str, Any]

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


@dataclass(frozen=True)
class Section:
    """A part of the page under its own heading; one without a body is left out."""

    key: str  # its id, which the navigation leads to
    title: str
    body: str


@dataclass(frozen=True)
class Cell:
    """What a table's cell shows, and the number that it is sorted by, if it is one."""

    text: str
    key: float | None = None


@dataclass(frozen=True)
class Row:
    """A table's row, and the commands that show when it is opened."""

    cells: Sequence[Cell]
    commands: Sequence[str] = field(default=())


def figure(title: str, body: str, commands: Iterable[str]) -> str:
    """A picture or a group of them with its heading, if it has one of its own, and commands."""
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    return f"<figure>{heading}{body}{repeat(commands)}</figure>"


def repeat(commands: Iterable[str]) -> str:
    """The commands that repeat what is above, each once, to be opened."""
    listed = escape("\n".join(dict.fromkeys(commands)))
    return f'<details class="repeat"><summary>Repeat</summary>{_code(listed)}</details>'


def legend(swatches: Iterable[tuple[str, str]]) -> str:
    """A list of (picture, name)."""
    items = "".join(f"<li>{picture}{escape(name)}</li>" for picture, name in swatches)
    return f'<ul class="legend">{items}</ul>'


def table(label: str, prefix: str, columns: Sequence[tuple[str, str]], rows: Sequence[Row]) -> str:
    """A table sorted by the head that is pressed; `columns` are (name, "word" or "").

    A row is a body of its own, whose id is `prefix` and its index. One with commands is two rows,
    which stay together.
    """
    head = "".join(
        f'<th scope="col" class="{kind}"><button type="button">{escape(name)}</button></th>'
        for name, kind in columns
    )
    bodies = []
    for index, row in enumerate(rows):
        name = f"{prefix}{index}"
        cells = "".join(
            _cell(cell, kind, column == 0)
            for column, (cell, (_, kind)) in enumerate(zip(row.cells, columns, strict=True))
        )
        more = ""
        if row.commands:
            code = _code(escape("\n".join(row.commands)))
            more = f'<tr id="{name}-more"><td colspan="{len(columns)}">{code}</td></tr>'
        bodies.append(f'<tbody id="{name}"><tr>{cells}</tr>{more}</tbody>')
    return (
        f'<div class="frame" tabindex="0" role="region" aria-label="{escape(label)}">'
        f'<table class="sortable"><thead><tr>{head}</tr></thead>{"".join(bodies)}</table></div>'
    )


def pairs(items: Iterable[tuple[str, str]]) -> str:
    """A list of names and what they are."""
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in items)
    return f"<dl>{listed}</dl>"


def numeric(value: float | None, unit: float = 1.0) -> Cell:
    """A cell with a number of `unit`s; what was not measured is sorted below all."""
    if not known(value):
        return Cell("–", -math.inf)
    return Cell(number(value / unit), value / unit)


def known(value: float | None) -> bool:
    """Whether the value was measured."""
    return value is not None and math.isfinite(value)


def yes_or_no(judged: bool | None) -> Cell:
    """A cell with a judgement."""
    return Cell({True: "yes", False: "NO", None: "–"}[judged])


def short(dtype: str) -> str:
    """The dtype's name where there is little room."""
    return SHORT.get(dtype, dtype)


def _cell(cell: Cell, kind: str, first: bool) -> str:
    classes = f"{kind} bad" if cell.text == "NO" else kind
    key = ""
    if cell.key is not None:
        number_in_script = f"{cell.key:.9g}".replace("inf", "Infinity")
        key = f' data-key="{number_in_script}"'
    if first:
        return f'<th scope="row" class="{classes}"{key}>{escape(cell.text)}</th>'
    return f'<td class="{classes}"{key}>{escape(cell.text)}</td>'


def _code(escaped: str) -> str:
    return f'<div class="code"><pre><code>{escaped}</code></pre></div>'
