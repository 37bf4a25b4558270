"""The sections with pictures: speed-up, lines against size, memory, the twins' losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bigops.bench.report import markup, svg
from bigops.bench.report.charts import Bar, Line, bar_scale, bars, lines
from bigops.bench.report.common import UNITS, Json, Record, by_subject, introduced, title
from bigops.bench.report.markup import Section, known, short
from bigops.bench.report.sweeps import OURS, Sweep, milliseconds, sweeps
from bigops.bench.tables import command, number


def speedups(records: Sequence[Record], machine: Json) -> Section:
    """Bars over eager, a picture per op or model, all of one scale."""
    shown = [r for r in _unswept(records) if known(r["speedup_vs_eager"])]
    keys = ("speedup_vs_eager", "speedup_vs_best")
    ratios = [r[key] for r in shown for key in keys if known(r[key])]
    scale = bar_scale(min([0.8, *ratios]), max([2.0, *ratios]), 7, log=True)

    def bar(record: Record) -> Bar:
        eager, best, name = (record[key] for key in (*keys, "best_name"))
        over_best = f"{best:.2f}x {name}" if known(best) and name != "eager" else ""
        return Bar(
            f"{record['case']}, {short(record['dtype'])}",
            eager,
            f"{eager:.2f}x",
            f"{title(record)}, {record['pass']}: {eager:.2f}x eager{over_best and ', '}{over_best}",
            over_best,
            best if known(best) else None,
            "slow" if eager < 1.0 else "",
        )

    def picture(name: str, found: Sequence[Record]) -> str:
        return bars(f"Speed-up of {name}", [bar(r) for r in found], scale, 1.0, "x")

    intro = (
        "Bar: how many times as fast as eager PyTorch. Upright mark: as the best of PyTorch, which "
        "is named where it is not eager. Logarithmic; 1x is equal."
    )
    body = by_subject(shown, picture, machine)
    return Section("speed-up", "Speed-up", introduced(intro, body))


def against_size(records: Sequence[Record], machine: Json) -> Section:
    """Time and throughput over the swept size, every contestant a line."""
    found = sweeps(records)
    names = dict.fromkeys(name for s in found for r in s.records for name in milliseconds(r))
    styles = {name: style for style, name in enumerate(names)}
    body = "".join(_sweep(sweep, styles, machine) for sweep in found)
    intro = (
        "Median time (lower is better) and the throughput that it makes (higher is better). A "
        "contestant has one colour, dash and marker in all pictures; * is what changes with the "
        "size."
    )
    return Section("size", "Against size", introduced(intro, body))


def _sweep(sweep: Sweep, styles: Mapping[str, int], machine: Json) -> str:
    times = _lines(sweep.times(), styles)
    key = "gflops" if any(r["gflops"] for r in sweep.records) else "gbytes"
    rates = _lines(sweep.rates(key), styles)
    drawn = [
        lines(f"Time of {sweep.title}", times, sweep.name, "ms"),
        lines(f"Throughput of {sweep.title}", rates, sweep.name, UNITS[key], log_y=False),
    ]
    keys = markup.legend((svg.swatch(line.style), line.name) for line in times)
    cells = "".join(f"<div>{picture}</div>" for picture in drawn if picture)
    body = f'{keys}<div class="columns">{cells}</div>'
    return markup.figure(sweep.title, body, _commands(sweep, machine))


def peaks(records: Sequence[Record], machine: Json) -> Section:
    """Peak bytes of a call, ours and eager's: bars, and lines over a swept size."""
    shown = [r for r in _unswept(records) if known(r["peak_bytes"])]

    def picture(name: str, found: Sequence[Record]) -> str:
        sizes = [r[key] for r in found for key in ("peak_bytes", "eager_peak_bytes")]
        scale = bar_scale(0.0, max([1.0, *filter(known, sizes)]) / 2**20, 17, log=False)
        rows = [bar for r in found for bar in _peak_bars(r)]
        return bars(f"Peak memory of {name}", rows, scale, 0.0, "")

    drawn = []
    for sweep in sweeps(records):
        measured = _lines(sweep.peaks(), {OURS: 0, "eager": 1})
        if measured:
            over_size = lines(f"Peak memory of {sweep.title}", measured, sweep.name, "MiB")
            drawn.append(
                markup.figure(sweep.title, over_size, _commands(sweep, machine, " --memory"))
            )
    body = by_subject(shown, picture, machine, "--memory")
    if drawn:
        body += f'<div class="columns">{"".join(drawn)}</div>'
    intro = "MiB that one call adds to what a fresh process holds. Less is better."
    return Section("memory", "Memory", introduced(intro, body))


def _peak_bars(record: Record) -> list[Bar]:
    ours, eager = record["peak_bytes"], record["eager_peak_bytes"]
    label = f"{record['case']}, {short(record['dtype'])}"
    share = f"{ours / eager:.0%} of eager's" if known(eager) and eager > 0 else ""
    tip = f"{title(record)}, {record['pass']}: {share}"
    found = [Bar(label, ours / 2**20, f"{OURS} {number(ours / 2**20)} MiB", tip, share)]
    if known(eager):
        text = f"eager {number(eager / 2**20)} MiB"
        found.append(Bar("", eager / 2**20, text, tip, kind="plain"))
    return found


def twins(training: Json | None) -> Section:
    """The losses of the model and its plain twin, and their held-out accuracy per epoch."""
    if not training:
        return Section("twins", "", "")
    ours, plain = training["evaluations"], training["plain_evaluations"]
    gap = max(abs(a - b) for a, b in zip(training["losses"], training["plain_losses"], strict=True))
    curves = [
        Line(name, style, list(enumerate(training[key], 1)))
        for name, style, key in ((OURS, 0, "losses"), ("plain", 1, "plain_losses"))
    ]
    picture = lines("Loss of each step", curves, "step", "cross-entropy", log_x=False)
    columns = (("epoch", ""), ("held-out accuracy", ""), ("plain", ""), ("loss", ""), ("plain", ""))
    rows = [
        markup.Row(
            [
                markup.Cell(str(epoch), epoch),
                *(markup.Cell(f"{e['accuracy']:.2%}", e["accuracy"]) for e in (a, b)),
                *(markup.Cell(f"{e['loss']:.4f}", e["loss"]) for e in (a, b)),
            ]
        )
        for epoch, (a, b) in enumerate(zip(ours, plain, strict=True), 1)
    ]
    table = markup.table("Held-out accuracy and loss", "epoch-", columns, rows)
    name, epochs = training["model"], len(ours)
    commands = [f"bigops train {name.lower()} --epochs {epochs}{o}" for o in ("", " --plain")]
    intro = (
        f"The {name.upper()} and its twin of PyTorch's own layers, trained side by side on "
        f"handwritten digits from the same seed, {epochs} epochs. Held-out accuracy "
        f"{ours[-1]['accuracy']:.2%} and {plain[-1]['accuracy']:.2%} (plain); a step takes "
        f"{training['step_ms']:.2f} ms and {training['plain_step_ms']:.2f} ms (plain), "
        f"{training['speedup']:.2f}x pair by pair. The losses differ by at most {gap:.1e}."
    )
    body = f'<div class="columns"><div>{picture}</div>{table}</div>'
    drawn = markup.figure("", body, commands)
    return Section("twins", "Trained beside its twin", introduced(intro, drawn))


def _unswept(records: Sequence[Record]) -> list[Record]:
    """Those that are not drawn as lines already."""
    return [r for r in records if not r["sweep"]]


def _lines(
    found: Mapping[str, Sequence[tuple[float, float]]], styles: Mapping[str, int]
) -> list[Line]:
    return [Line(name, styles[name], points) for name, points in found.items()]


def _commands(sweep: Sweep, machine: Json, options: str = "") -> list[str]:
    return [command(r, machine["threads"]) + options for r in sweep.records]
