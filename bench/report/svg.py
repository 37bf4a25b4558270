"""Inline SVG in the page's own colours: scales with their ticks, marks, labels that do not collide.

A picture is drawn in a user space of `WIDTH` units, which a phone shows at three quarters of their
size and a desktop at five quarters; report.css sets the letters larger on a phone, and the margins
here are made for those.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 460
LETTER = 7.4  # the usual width of a letter on a phone, the larger of the two
LINE = 15.0  # the height of a line of text

# Every series has a colour, a dash and a marker, so that colour alone never tells it.
MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "M-3.5-3.5h7v7h-7z",
    "M0-4.8L4.6 3.4H-4.6z",
    "M0-5L5 0L0 5L-5 0z",
    "M0 4.8L4.6-3.4H-4.6z",
    "M-5-1.7h3.3v-3.3h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3z",
    "M-2.2-5h4.4l2.8 5l-2.8 5h-4.4l-2.8-5z",
)
DASHES = ("", "7 4", "2 3", "9 3 2 3", "12 4", "4 2")


@dataclass(frozen=True)
class Scale:
    """Maps values from `low` to `high` to positions from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = True

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 7) -> list[float]:
        """Round values within the range, at most `most` of them."""
        if not self.log:
            return _even_ticks(self.low, self.high, most)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for mantissas, every in (((1, 2, 5), 1), ((1,), 1), ((1,), 2), ((1,), 3)):
            found = [
                m * 10.0**e
                for e in range(first, last + 1)
                for m in mantissas
                if e % every == 0 and self.low <= m * 10.0**e <= self.high * (1 + 1e-9)
            ]
            if len(found) <= most:
                break
        return found if len(found) > 1 else _even_ticks(self.low, self.high, most)


def _even_ticks(low: float, high: float, most: int) -> list[float]:
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(m * power for m in (1, 2, 2.5, 5, 10, 20) if (high - low) / (m * power) <= most - 1)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def picture(title: str, height: float, parts: Iterable[str], width: float = WIDTH) -> str:
    """The <svg> around `parts`."""
    name = escape(title)
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{name}">'
        f"<title>{name}</title>{''.join(parts)}</svg>"
    )


def group(tip: str, *parts: str) -> str:
    """`parts` that tell `tip` to who points at them."""
    return f"<g><title>{escape(tip)}</title>{''.join(parts)}</g>"


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line of class `kind`."""
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" class="{kind}"/>'


def words(x: float, y: float, text: str, kind: str = "", anchor: str = "", turn: float = 0) -> str:
    """Text of class `kind` with its `anchor` (start, middle, end) at (x, y), turned by degrees."""
    kind = f' class="{kind}"' if kind else ""
    anchor = f' text-anchor="{anchor}"' if anchor else ""
    turned = f' transform="rotate({turn:.1f} {x:.1f} {y:.1f})"' if turn else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{kind}{anchor}{turned}>{escape(text)}</text>'


def mark(x: float, y: float, style: int) -> str:
    """The marker of a series, with room around it for a finger; the page has `markers`."""
    marker = style % len(MARKERS)
    return f'<use href="#m{marker}" x="{x:.1f}" y="{y:.1f}" class="mark s{style % 7}"/>'


def markers() -> str:
    """What `mark` refers to, once a page."""
    shapes = "".join(
        f'<g id="m{number}"><circle r="9" class="near"/><path d="{shape}"/></g>'
        for number, shape in enumerate(MARKERS)
    )
    return f'<svg class="defs" aria-hidden="true"><defs>{shapes}</defs></svg>'


def polyline(points: Sequence[tuple[float, float]], style: int) -> str:
    """A series' line."""
    listed = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{listed}" class="line s{style % 7}"{_dash(style)}/>'


def swatch(style: int, lined: bool = True) -> str:
    """What a legend shows of a series: its marker, on its line if it has one."""
    drawn = f'<path d="M1 7H33" class="line s{style % 7}"{_dash(style)}/>' if lined else ""
    box, kind = ("0 0 34 14", "swatch") if lined else ("10 0 14 14", "swatch small")
    return (
        f'<svg class="{kind}" viewBox="{box}" aria-hidden="true">{drawn}{mark(17, 7, style)}</svg>'
    )


def _dash(style: int) -> str:
    dash = DASHES[style % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def clip(text: str, letters: int) -> str:
    """`text`, cut with an ellipsis where it is longer."""
    return text if len(text) <= letters else text[: letters - 1] + "…"


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, in their order, `gap` apart, up to `high`."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    placed = list(wanted)
    floor = low
    for index in order:
        placed[index] = max(wanted[index], floor)
        floor = placed[index] + gap
    for index in reversed(order):
        placed[index] = min(placed[index], high)
        high = placed[index] - gap
    return placed
