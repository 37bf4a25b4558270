"""The report's pictures, as inline SVG drawn in the page's own colours (CSS variables)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

# Drawn for a phone: on a wide screen the pictures do not grow with the page.
WIDTH = 520
ROW = 38
PAD = 48


def speedup_bars(rows: Sequence[tuple[str, float, float, str]]) -> str:
    """One bar per row of (label, speed-up over eager, speed-up over the best, its name).

    The axis is logarithmic, so that twice as fast and half as fast are equally far from 1.
    """
    if not rows:
        return ""
    top = max(2.0, *(max(eager, best) for _, eager, best, _ in rows))
    bottom = min(0.8, *(min(eager, best) for _, eager, best, _ in rows))
    span = math.log(top / bottom)

    def at(value: float) -> float:
        return 4 + (WIDTH - 4 - PAD) * math.log(value / bottom) / span

    height = ROW * len(rows) + 30
    parts = [_open(WIDTH, height, "Speed-up over eager PyTorch and over the best PyTorch")]
    for tick in _ticks(bottom, top):
        strong = " strong" if tick == 1.0 else ""
        parts.append(_line(at(tick), 0, at(tick), height - 24, f"grid{strong}"))
        parts.append(_text(at(tick), height - 8, f"{tick:g}x", "tick", "middle"))
    for index, (label, eager, best, name) in enumerate(rows):
        y = ROW * index + 18
        start, end = sorted((at(1.0), at(eager)))
        parts.append(f"<g><title>{escape(label)}: {eager:.2f}x eager, {best:.2f}x {name}</title>")
        parts.append(_text(4, y - 4, label, "label"))
        kind = "bar" if eager >= 1.0 else "bar slow"
        width = max(end - start, 1.0)
        parts.append(
            f'<rect x="{start:.1f}" y="{y}" width="{width:.1f}" height="14" rx="2" class="{kind}"/>'
        )
        x = at(best)
        parts.append(f'<path d="M{x:.1f} {y - 2}v18" class="best"/>')
        parts.append(_text(max(end, x) + 6, y + 11, f"{eager:.2f}x", "value"))
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def curves(lines: Mapping[str, Sequence[float]], x_label: str, y_label: str) -> str:
    """Lines over their index, the y axis logarithmic. Later lines are dashed, to be seen on top."""
    values = [v for line in lines.values() for v in line if v > 0.0]
    if not values:
        return ""
    width, height, left, foot = WIDTH, 280, 40, 40
    low, high = min(values) * 0.9, max(values) * 1.1
    longest = max(len(line) for line in lines.values())

    def x_at(index: int) -> float:
        return left + (width - left - 16) * index / max(longest - 1, 1)

    def y_at(value: float) -> float:
        share = math.log(max(value, low) / low) / math.log(high / low)
        return 12 + (height - foot - 12) * (1.0 - share)

    parts = [_open(width, height, f"{y_label} over {x_label}")]
    for tick in _ticks(low, high):
        parts.append(_line(left, y_at(tick), width - 16, y_at(tick), "grid"))
        parts.append(_text(left - 6, y_at(tick) + 4, f"{tick:g}", "tick", "end"))
    for index in range(0, longest, max(1, round(longest / 6))):
        parts.append(_text(x_at(index), height - 22, str(index + 1), "tick", "middle"))
    parts.append(_text((left + width) / 2, height - 5, x_label, "tick", "middle"))
    for number, (name, line) in enumerate(lines.items()):
        points = " ".join(f"{x_at(i):.1f},{y_at(v):.1f}" for i, v in enumerate(line))
        parts.append(f'<polyline points="{points}" class="line line{number}"/>')
        x, y = width - 160, 20 + 18 * number
        parts.append(f'<path d="M{x} {y}h28" class="line line{number}"/>')
        parts.append(_text(x + 34, y + 4, name, "label"))
    return "".join([*parts, "</svg>"])


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within the range."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    candidates = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
    return [round(tick, 10) for tick in candidates if low <= tick <= high]


def _open(width: int, height: int, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" class="{kind}"/>'


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'
    )
