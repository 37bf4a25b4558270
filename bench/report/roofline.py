"""The roofline: how fast an operation runs against how often it uses each byte it moves.

S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model for
multicore architectures", Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from bigops.bench.report import svg
from bigops.bench.report.svg import LETTER, LINE, WIDTH, Scale
from bigops.bench.tables import number

HEIGHT = 400.0
LEFT, RIGHT, HEAD, FOOT = 48.0, 12.0, 24.0, 42.0
APART = 1.6  # as many times the slowest stream a faster one's line has room for its name

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Point:
    """One record: FLOP per byte, GFLOP/s, the number of its dtype's style, and its own number."""

    number: int
    intensity: float
    rate: float
    style: int
    tip: str


@dataclass(frozen=True)
class Ceilings:
    """Matrix products' rates in GFLOP/s, by (name, style), and streams' in GB/s, by name."""

    products: Mapping[tuple[str, int], float]
    streams: Mapping[str, float]


def roofline(points: Sequence[Point], ceilings: Ceilings) -> str:
    """The points under the machine's ceilings, each with its number where there is room for it.

    The streams' bandwidth depends on whether the data fits a cache: the slowest is drawn, and the
    fastest where it lies well above.
    """
    streams = sorted(ceilings.streams.items(), key=lambda item: item[1])
    apart = len(streams) > 1 and streams[-1][1] > APART * streams[0][1]
    slopes = [streams[0], streams[-1]] if apart else streams[:1]
    roofs = list(ceilings.products.values())
    ridges = [roof / rate for roof, (_, rate) in product(roofs, slopes)]
    x_low = min(*(p.intensity for p in points), *ridges, math.inf) / 2
    x_high = max(*(p.intensity for p in points), *ridges, 0.0) * 2
    floor = min(p.rate for p in points)
    top = max(*(p.rate for p in points), *roofs, 0.0)
    x_at = Scale(x_low, x_high, LEFT, WIDTH - RIGHT)
    y_at = Scale(floor / 2, top * 1.8, HEIGHT - FOOT, HEAD)
    parts = _axes(x_at, y_at)
    boxes = [_box(x_at(p.intensity), y_at(p.rate), 0) for p in points]
    parts += _roofs(ceilings, slopes, x_at, y_at, boxes)
    for name, rate in slopes:
        parts += _slope(name, rate, top, x_at, y_at)
    marks = []
    for point in points:
        x, y = x_at(point.intensity), y_at(point.rate)
        place = _free_place(x, y, len(str(point.number)), boxes)
        if place is not None:
            parts.append(svg.words(*place, str(point.number), "number", "middle"))
        marks.append(svg.group(point.tip, svg.mark(x, y, point.style)))
    return svg.picture(
        "GFLOP/s against FLOP per byte, and the machine's limits", HEIGHT, parts + marks
    )


def _axes(x_at: Scale, y_at: Scale) -> list[str]:
    parts = [svg.words(4, 13, "GFLOP/s", "tick")]
    for tick in y_at.ticks():
        parts.append(svg.line(LEFT, y_at(tick), WIDTH - RIGHT, y_at(tick), "rule"))
        parts.append(svg.words(LEFT - 6, y_at(tick) + 4, f"{tick:g}", "tick", "end"))
    for tick in x_at.ticks():
        parts.append(svg.line(x_at(tick), HEAD, x_at(tick), HEIGHT - FOOT, "rule"))
        parts.append(svg.words(x_at(tick), HEIGHT - FOOT + 18, f"{tick:g}", "tick", "middle"))
    parts.append(svg.words((LEFT + WIDTH) / 2, HEIGHT - 6, "FLOP per byte", "tick", "middle"))
    return parts


def _roofs(
    ceilings: Ceilings,
    slopes: Sequence[tuple[str, float]],
    x_at: Scale,
    y_at: Scale,
    taken: list[Box],
) -> list[str]:
    """The products' rates, from where the fastest stream can feed them.

    Each is named at the end where its name covers fewer points.
    """
    parts = []
    for (name, style), rate in ceilings.products.items():
        start = max(x_at.low, rate / slopes[-1][1]) if slopes else x_at.low
        y = y_at(rate)
        parts.append(svg.line(x_at(start), y, WIDTH - RIGHT, y, f"roof s{style % 7}"))
        words = f"{name}, {number(rate)} GFLOP/s"
        half = LETTER * len(words) / 2
        middles = (WIDTH - RIGHT - half, min(x_at(start) + 6, WIDTH - RIGHT - 2 * half) + half)
        boxes = [_box(x, y - 9, len(words)) for x in middles]
        box = min(boxes, key=lambda box: sum(_touch(box, other) for other in taken))
        taken.append(box)
        parts.append(svg.words((box[0] + box[2]) / 2, y - 5, words, "tick name", "middle"))
    return parts


def _slope(name: str, rate: float, top: float, x_at: Scale, y_at: Scale) -> list[str]:
    """What a stream's bytes allow: rate x intensity."""
    low = max(x_at.low, y_at.low / rate)
    high = min(x_at.high, top / rate)
    if low >= high:
        return []
    x1, y1, x2, y2 = x_at(low), y_at(rate * low), x_at(high), y_at(rate * high)
    turn = math.degrees(math.atan2(y2 - y1, x2 - x1))
    x, y = x1 + 0.04 * (x2 - x1), y1 + 0.04 * (y2 - y1)
    return [
        svg.line(x1, y1, x2, y2, "roof"),
        svg.words(x + 2, y - 6, f"{name}, {number(rate)} GB/s", "tick name", turn=turn),
    ]


def _box(x: float, y: float, letters: int) -> Box:
    """What a marker (no letters) or a number with its middle at (x, y) covers."""
    wide, high = (LETTER * letters / 2 + 1, LINE / 2 - 1) if letters else (5.0, 5.0)
    return x - wide, y - high, x + wide, y + high


def _touch(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _free_place(x: float, y: float, letters: int, taken: list[Box]) -> tuple[float, float] | None:
    """Where a point's number is drawn: near it, on nothing that is taken, which it then is."""
    for far in (12.0, 18.0, 25.0):
        for right, down in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1)):
            box = _box(x + right * far, y + down * far, letters)
            inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= HEAD and box[3] <= HEIGHT
            if inside and not any(_touch(box, other) for other in taken):
                taken.append(box)
                return x + right * far, y + down * far + 4
    return None
