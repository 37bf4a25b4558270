"""Two kinds of pictures: lines over an axis, and bars from a base line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from bigops.bench.report import svg
from bigops.bench.report.svg import LETTER, LINE, WIDTH, Scale

# Above this many points markers would hide the line.
MARKED = 40


@dataclass(frozen=True)
class Line:
    """A series: its points by rising x, and the number of its colour, dash and marker."""

    name: str
    style: int
    points: Sequence[tuple[float, float]]


def lines(
    title: str,
    series: Sequence[Line],
    x_label: str,
    unit: str,
    log_x: bool = True,
    log_y: bool = True,
    height: float = 290,
) -> str:
    """The series over x, each named where it ends. A linear y axis starts at 0."""
    series = [
        Line(s.name, s.style, [p for p in s.points if p[1] > 0.0 or not log_y]) for s in series
    ]
    series = [s for s in series if s.points]
    if not series:
        return ""
    left, right, head, foot = 48.0, 122.0, 24.0, 42.0
    sizes = sorted({x for s in series for x, _ in s.points})
    values = [y for s in series for _, y in s.points]
    low, high = (min(values) / 1.15, max(values) * 1.15) if log_y else (0.0, max(values) * 1.1)
    x_low, x_high = sizes[0], sizes[-1]
    if x_low == x_high:
        x_low, x_high = (x_low / 2, x_high * 2) if log_x else (x_low - 1, x_high + 1)
    x_at = Scale(x_low, x_high, left + 6, WIDTH - right, log_x)
    y_at = Scale(low, high or 1.0, height - foot, head, log_y)

    parts = [svg.words(4, 13, unit, "tick")]
    for tick in y_at.ticks():
        parts.append(svg.line(left, y_at(tick), WIDTH - right + 6, y_at(tick), "rule"))
        parts.append(svg.words(left - 6, y_at(tick) + 4, f"{tick:g}", "tick", "end"))
    wanted = sizes if log_x else x_at.ticks()
    for tick, name in _room_for(wanted, x_at):
        parts.append(svg.line(x_at(tick), height - foot, x_at(tick), height - foot + 4, "rule"))
        parts.append(svg.words(x_at(tick), height - foot + 18, name, "tick", "middle"))
    middle = (left + WIDTH - right) / 2
    parts.append(svg.words(middle, height - 6, x_label, "tick", "middle"))

    ends = [(x_at(s.points[-1][0]), y_at(s.points[-1][1])) for s in series]
    labels = svg.apart([y for _, y in ends], LINE, head, height - foot)
    drawn = list(zip(series, ends, labels, strict=True))
    # The first lies on top where it is marked; of long lines the dashed ones show on top of it.
    for s, end, label in reversed(drawn) if len(sizes) <= MARKED else drawn:
        parts.append(svg.polyline([(x_at(x), y_at(y)) for x, y in s.points], s.style))
        if len(s.points) <= MARKED:
            parts += [
                svg.group(
                    f"{s.name}, {x_label} {x:g}: {y:.3g} {unit}",
                    svg.mark(x_at(x), y_at(y), s.style),
                )
                for x, y in s.points
            ]
        x = WIDTH - right + 14
        parts.append(svg.line(end[0] + 5, end[1], x - 2, label, f"lead s{s.style % 7}"))
        name = svg.clip(s.name, int((WIDTH - x) / LETTER))
        kind = "name ours" if s.style == 0 else "name"
        parts.append(svg.words(x, label + 4, name, kind))
    return svg.picture(title, height, parts)


def _room_for(wanted: Sequence[float], x_at: Scale) -> list[tuple[float, str]]:
    """The ticks whose names do not touch, from the largest down."""
    kept: list[tuple[float, str]] = []
    edge = float("inf")
    for tick in reversed(wanted):
        name = f"{tick:.6g}"
        half = LETTER * (len(name) + 1) / 2
        if x_at(tick) + half <= edge:
            kept.append((tick, name))
            edge = x_at(tick) - half
    return kept


@dataclass(frozen=True)
class Bar:
    """A bar to `value` with `text` at its end; `label` and `aside` stand above it.

    A mark crosses the row at `mark`. `kind` is the bar's class.
    """

    label: str
    value: float
    text: str
    tip: str
    aside: str = ""
    mark: float | None = None
    kind: str = ""


def bars(title: str, rows: Sequence[Bar], at: Scale, base: float, unit: str) -> str:
    """A bar from `base` per row; a row without a label belongs to the one above it.

    `at` is given from outside, so that pictures side by side have one scale.
    """
    tall = [36.0 if row.label else 17.0 for row in rows]
    height = sum(tall) + 28
    # The grid is drawn beside the bars only, so that it crosses no label.
    feet = list(accumulate(tall))
    parts = []
    for tick in at.ticks(6):
        strong = " strong" if tick == base else ""
        pieces = "".join(f"M{at(tick):.1f} {foot - 16:g}v18" for foot in feet)
        parts.append(f'<path d="{pieces}" class="rule{strong}"/>')
        parts.append(svg.words(at(tick), height - 6, f"{tick:g}{unit}", "tick", "middle"))
    for row, y in zip(rows, feet, strict=True):
        start, end = sorted((at(base), at(row.value)))
        drawn = []
        if row.label:
            letters = 56 - len(row.aside)
            drawn.append(svg.words(2, y - 18, svg.clip(row.label, letters), "name"))
            drawn.append(svg.words(WIDTH - 2, y - 18, row.aside, "tick name", "end"))
        drawn.append(
            f'<rect x="{start:.1f}" y="{y - 13:.1f}" width="{max(end - start, 1.5):.1f}" '
            f'height="12" rx="2" class="bar {row.kind}"/>'
        )
        if row.mark is not None:
            end = max(end, at(row.mark))
            drawn.append(svg.line(at(row.mark), y - 16, at(row.mark), y + 2, "best"))
        drawn.append(svg.words(end + 6, y - 3, row.text, "name value" if row.label else "name"))
        parts.append(svg.group(row.tip, *drawn))
    return svg.picture(title, height, parts)


def bar_scale(low: float, high: float, letters: int, log: bool) -> Scale:
    """A scale for `bars` that leaves room for texts of so many letters at the bars' ends."""
    return Scale(low, high, 4, WIDTH - 10 - LETTER * letters, log)
