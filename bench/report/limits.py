"""The section that holds every op against what the machine can do: roofline and bandwidth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from bigops.bench.report import markup, svg
from bigops.bench.report.charts import Bar, bar_scale, bars
from bigops.bench.report.common import CASE, Json, Record, introduced, rate, run_command, title
from bigops.bench.report.markup import Section, known
from bigops.bench.report.roofline import Ceilings, Point, roofline
from bigops.bench.tables import number, subject


def section(records: Sequence[Record], machine: Json) -> Section:
    """The roofline of what counts operations, the bandwidth of what only moves bytes."""
    computing: dict[int, Record] = {}
    moving: list[Record] = []
    left_out: dict[str, None] = {}
    for index, r in enumerate(records):
        if not known(r["gbytes"]) or r["gbytes"] <= 0.0:
            left_out[subject(r)] = None
        elif known(r["gflops"]) and r["gflops"] > 0.0:
            computing[index] = r
        else:
            moving.append(r)
    body = _roofline(computing, machine) if computing else ""
    intro = (
        "How near the limits of this machine, measured in the same run. Level lines: matrix "
        "products of a dtype. Slanted: what the slowest and the fastest of the memory streams "
        "allow. A point's number leads to its name."
    )
    if moving:
        body += _bandwidth(moving, machine)
        intro += " What only moves bytes has bars, with a mark at what its stream allows."
    if left_out:
        intro += f" Operations and bytes are not counted for {', '.join(left_out)}."
    return Section("roofline", "Roofline", introduced(intro, body))


def _roofline(records: Mapping[int, Record], machine: Json) -> str:
    """`records` by their index, which the list beside the picture leads to."""
    names = dict.fromkeys(r["dtype"] for r in records.values())
    dtypes = {dtype: style for style, dtype in enumerate(names)}
    points = [
        Point(
            number,
            r["gflops"] / r["gbytes"],
            r["gflops"],
            dtypes[r["dtype"]],
            f"{number}: {title(r)}, {r['pass']}: {rate(r, 'gflops', 'gbytes')}",
        )
        for number, r in enumerate(records.values(), 1)
    ]
    listed = "".join(
        f'<li>{svg.swatch(p.style, False)} <a href="#{CASE}{index}">{escape(title(r))}</a> '
        f'<span class="faint">{rate(r, "gflops")}, {escape(r["pass"])}</span></li>'
        for p, (index, r) in zip(points, records.items(), strict=True)
    )
    keys = markup.legend((svg.swatch(style, False), dtype) for dtype, style in dtypes.items())
    picture = roofline(points, _ceilings(machine.get("ceilings") or {}, dtypes))
    body = (
        f'{keys}<div class="columns"><div>{picture}</div>'
        f'<ol class="points" tabindex="0" aria-label="The points">{listed}</ol></div>'
    )
    return markup.figure("", body, [run_command(list(records.values()), machine)])


def _ceilings(measured: Mapping[str, float], dtypes: Mapping[str, int]) -> Ceilings:
    """The machine's ceilings, named as `bench/ceilings.py` names them."""
    products = {
        (f"matmul {dtype}", style): measured[f"matmul {dtype} GFLOP/s"]
        for dtype, style in dtypes.items()
        if f"matmul {dtype} GFLOP/s" in measured
    }
    streams = {n.removesuffix(" GB/s"): v for n, v in measured.items() if n.endswith(" GB/s")}
    return Ceilings(products, streams)


def _bandwidth(records: Sequence[Record], machine: Json) -> str:
    """Bars of GB/s, with what the stream of that size allows."""
    limits = [
        100.0 * r["gbytes"] / r["percent_of_limit"] if r["percent_of_limit"] else None
        for r in records
    ]
    highest = max(*(r["gbytes"] for r in records), *filter(known, limits), 0.0)
    rows = [
        Bar(
            title(r),
            r["gbytes"],
            f"{number(r['gbytes'])} GB/s",
            f"{title(r)}, {r['pass']}: {rate(r, 'gbytes')}",
            mark=limit,
        )
        for r, limit in zip(records, limits, strict=True)
    ]
    scale = bar_scale(0.0, highest, 11, log=False)
    picture = bars("GB/s of what only moves bytes", rows, scale, 0.0, "")
    return markup.figure("Bandwidth, GB/s", picture, [run_command(records, machine)])
