"""The report: one HTML file with everything in it, which opens without a network.

Light and dark follow the reader's system; on a phone the table scrolls sideways inside its frame.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from bigops.bench import figures
from bigops.bench.tables import command, geometric_mean, number, subject, truth

Json = Mapping[str, Any]

STYLE = """
:root { --back: #fff; --text: #1b1f24; --faint: #656d76; --line: #d8dee4; --panel: #f6f8fa;
  --ours: #1a7f5a; --plain: #b35900; --bad: #c62828; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --back: #0f1318; --text: #e6e9ed; --faint: #97a1ab;
  --line: #2b333c; --panel: #171d24; --ours: #3fb984; --plain: #e29a4a; --bad: #ff7b72; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 16px; background: var(--back);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5em; margin: .4em 0; } h2 { font-size: 1.15em; margin: 1.8em 0 .5em; }
p { max-width: 75ch; } .faint { color: var(--faint); } .bad { color: var(--bad); }
.summary { font-size: 1.1em; border-left: 4px solid var(--ours); padding: .3em .8em;
  background: var(--panel); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { padding: 5px 9px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
th { background: var(--panel); position: sticky; top: 0; }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid var(--ours); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
td.word, th.word { text-align: left; } tr:last-child td { border-bottom: 0; }
code { font: 12px ui-monospace, monospace; }
svg { width: 100%; height: auto; max-width: 620px; display: block; }
svg text { fill: var(--text); font: 12px system-ui, sans-serif; }
svg .label { paint-order: stroke; stroke: var(--back); stroke-width: 4px; }
svg .tick { fill: var(--faint); font-size: 11px; } .grid { stroke: var(--line); fill: none; }
.grid.strong { stroke: var(--faint); } .bar { fill: var(--ours); } .bar.slow { fill: var(--bad); }
.best { stroke: var(--text); stroke-width: 2; } .line { fill: none; stroke-width: 1.6; }
.line0 { stroke: var(--ours); } .line1 { stroke: var(--plain); stroke-dasharray: 5 4; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") !== "descending";
    heads.forEach(h => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[column].dataset.key;
    const order = (a, b) => isNaN(a - b) ? a.localeCompare(b) : a - b;
    const rows = [...body.rows].sort((a, b) => order(key(a), key(b)) * (down ? -1 : 1));
    body.append(...rows);
  }));
}
"""


def page(results: Json) -> str:
    """The whole HTML file for what a run found (`Results.as_json()`)."""
    records = results["records"]
    machine = results["machine"]
    sections = [
        f'<p class="summary">{escape(summary(results))}</p>',
        _bars(records),
        _table(records),
        _training(results["training"]),
        _overhead(results["overhead"]),
        _machine(machine),
        _commands(records, machine),
        _notes(results),
        _method(),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>bigops bench: {escape(str(machine['cpu']))}</title><style>{STYLE}</style></head>"
        f"<body><h1>bigops bench</h1>{''.join(sections)}<script>{SCRIPT}</script></body></html>\n"
    )


def summary(results: Json) -> str:
    """One sentence that says how fast and how true."""
    records, machine = results["records"], results["machine"]
    gpu = machine.get("gpu")
    where = gpu["name"] if gpu and machine["device"].startswith("cuda") else machine["cpu"]
    if not records:
        return f"Nothing was measured on {where}."
    eager = geometric_mean([r["speedup_vs_eager"] for r in records])
    best = geometric_mean([r["speedup_vs_best"] for r in records])
    faster = sum(r["speedup_vs_best"] > 1.0 for r in records)
    true = sum(truth(r) is True for r in records)
    threads = f" with {machine['threads']} threads" if machine["device"] == "cpu" else ""
    return (
        f"On {where}{threads}, bigops is {eager:.2f}x as fast as eager PyTorch and {best:.2f}x as "
        f"fast as the best of PyTorch (geometric means of {len(records)} cases; faster than the "
        f"best in {faster}), and {true} of {len(records)} cases are within the error limit."
    )


def _bars(records: Sequence[Json]) -> str:
    rows = [
        (
            f"{subject(r)}, {r['case']}, {_short(r['dtype'])}",
            r["speedup_vs_eager"],
            r["speedup_vs_best"],
            r["best_name"],
        )
        for r in records
    ]
    return (
        "<h2>Speed-up</h2><p class=faint>Bars: over eager PyTorch. Upright mark: over the best of "
        f"PyTorch. Logarithmic; 1x is equal.</p>{figures.speedup_bars(rows)}"
    )


_COLUMNS = (
    ("op or model", "word"), ("case", "word"), ("dtype", "word"), ("x eager", ""), ("spread", ""),
    ("x best", ""), ("best is", "word"), ("true", "word"), ("ours, ms", ""), ("eager, ms", ""),
    ("compiled, ms", ""), ("best, ms", ""), ("% of limit", ""), ("GFLOP/s", ""), ("GB/s", ""),
    ("in torch", ""), ("peak, MiB", ""), ("eager's peak", ""), ("error", ""),
    ("eager's error", ""), ("error's limit", ""), ("pass", "word"), ("backend", "word"),
)  # fmt: skip


def _table(records: Sequence[Json]) -> str:
    rows = [
        [
            (subject(r), None), (r["case"], None), (r["dtype"], None),
            _cell(r["speedup_vs_eager"]), _cell(r["spread"]), _cell(r["speedup_vs_best"]),
            (r["best_name"], None), (_word(truth(r)), None), _cell(r["time_ms"]),
            _cell(r["eager_ms"]), _cell(r["compile_ms"]), _cell(r["best_ms"]),
            _cell(r["percent_of_limit"]), _cell(r["gflops"]), _cell(r["gbytes"]),
            _cell(r["torch_share"]), _cell(r["peak_bytes"], 2**20),
            _cell(r["eager_peak_bytes"], 2**20), _cell(r["error"]), _cell(r["eager_error"]),
            _cell(r["error_limit"]), (r["pass"], None), (r["backend"], None),
        ]
        for r in records
    ]  # fmt: skip
    return "<h2>Every case</h2>" + _sortable(_COLUMNS, rows)


def _overhead(rows: Sequence[Json]) -> str:
    if not rows:
        return ""
    columns = (
        ("op", "word"), ("sample", "word"), ("pass", "word"), ("ours, µs", ""), ("eager, µs", ""),
        ("overhead, µs", ""), ("spread", ""), ("limit", ""), ("within", "word"),
    )  # fmt: skip
    cells = [
        [
            (r["op"], None), (r["case"], None), (r["pass"], None), _cell(r["ours_us"]),
            _cell(r["eager_us"]), _cell(r["overhead_us"]), _cell(r["spread_us"]),
            _cell(r["limit_us"]), (_word(r["overhead_us"] <= r["limit_us"]), None),
        ]
        for r in rows
    ]  # fmt: skip
    return (
        "<h2>Call overhead</h2><p class=faint>Microseconds of a call that has next to nothing to "
        f"compute, ours minus eager's.</p>{_sortable(columns, cells)}"
    )


def _training(training: Json | None) -> str:
    if not training:
        return ""
    plain, ours = training["plain_evaluations"][-1], training["evaluations"][-1]
    gap = max(abs(a - b) for a, b in zip(training["losses"], training["plain_losses"], strict=True))
    picture = figures.curves(
        {"bigops": training["losses"], "plain PyTorch": training["plain_losses"]},
        "step",
        "cross-entropy",
    )
    return (
        f"<h2>The {training['model'].upper()} and its plain twin, trained side by side</h2>"
        f"<p>Handwritten digits, {len(training['evaluations'])} epochs, the same seed. Held-out "
        f"accuracy {100 * ours['accuracy']:.2f}% and {100 * plain['accuracy']:.2f}% (plain); a "
        f"step takes {training['step_ms']:.2f} ms and {training['plain_step_ms']:.2f} ms (plain), "
        f"{training['speedup']:.2f}x pair by pair. The two losses differ by at most {gap:.1e}.</p>"
        f"{picture}<p class=faint>Repeat: <code>bigops train cnn --epochs "
        f"{len(training['evaluations'])}</code> and the same with <code>--plain</code>.</p>"
    )


def _machine(machine: Json) -> str:
    items = []
    for key, value in machine.items():
        if key == "ceilings" or value is None:
            continue
        if key == "memory_bytes":
            value = f"{value / 2**30:.1f} GiB"
        items.append((key.replace("_bytes", ""), value))
    items += [(name, f"{rate:.4g}") for name, rate in machine.get("ceilings", {}).items()]
    listed = "".join(
        f"<dt>{escape(str(k))}</dt><dd>{escape(v if isinstance(v, str) else json.dumps(v))}</dd>"
        for k, v in items
    )
    return f"<h2>The machine, and its ceilings in this run</h2><dl>{listed}</dl>"


def _commands(records: Sequence[Json], machine: Json) -> str:
    rows = "".join(
        f"<tr><td class=word>{escape(subject(r))}, {escape(r['case'])}, {r['dtype']}</td>"
        f"<td class=word><code>{escape(command(r, machine['threads']))}</code></td></tr>"
        for r in records
    )
    return (
        "<h2>Repeat a figure</h2><div class=scroll><table><tbody>" + rows + "</tbody></table></div>"
    )


def _notes(results: Json) -> str:
    failed = [f"<li class=bad>{escape(line)}</li>" for line in results["failed"]]
    notes = [f"<li>{escape(line)}</li>" for line in results["notes"]]
    if not failed and not notes:
        return ""
    return f"<h2>Left out, and why</h2><ul class=faint>{''.join(failed + notes)}</ul>"


def _method() -> str:
    return (
        "<h2>How this was measured</h2><p>Contestants alternate within each round; a speed-up is "
        "the median over the rounds of the baseline's time over ours in the same round, its "
        "spread the interquartile range of these ratios. Inputs are random and rotate, results "
        "are used, warm-up and compilation are not counted. Errors are against the op's float64 "
        "reference, relative to its size, for the tensor nearest its limit; the limit is twice "
        "eager's own error, at least 4 units in the last place. The limit of speed is the roofline "
        "of the ceilings above.</p>"
    )


def _sortable(
    columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[tuple[str, float | None]]]
) -> str:
    head = "".join(
        f'<th class="{kind}"><button type="button">{escape(name)}</button></th>'
        for name, kind in columns
    )
    body = []
    for row in rows:
        cells = []
        for (_, kind), (text, key) in zip(columns, row, strict=True):
            sort_key = text if key is None else f"{key!r}"
            bad = " bad" if text == "NO" else ""
            cells.append(
                f'<td class="{kind}{bad}" data-key="{escape(sort_key)}">{escape(text)}</td>'
            )
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class=scroll><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _cell(value: float | None, unit: float = 1.0) -> tuple[str, float]:
    if value is None or math.isnan(value):
        return "–", -1.0
    return number(value / unit), value / unit


def _word(judged: bool | None) -> str:
    return {True: "yes", False: "NO", None: "–"}[judged]


def _short(dtype: str) -> str:
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}[dtype]
