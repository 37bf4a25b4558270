"""The report: one HTML file with everything in it, which opens without a network.

Light and dark follow the reader's system; on a phone tables scroll sideways inside their frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from bigops.bench.report import limits, listings, pictures, svg
from bigops.bench.report.markup import known
from bigops.bench.tables import geometric_mean, truth

Json = Mapping[str, Any]

# What records lack that were written before these were measured.
OLD = {"peers_ms": {}, "sweep": None, "options": ""}


def page(results: Json) -> str:
    """The whole HTML file for what a run found (`Results.as_json()`)."""
    records, machine = [OLD | r for r in results["records"]], results["machine"]
    found = [
        pictures.speedups(records, machine),
        pictures.against_size(records, machine),
        limits.section(records, machine),
        pictures.peaks(records, machine),
        listings.cases(records, machine),
        pictures.twins(results["training"]),
        listings.overhead(results["overhead"], machine),
        listings.machine(machine),
        listings.peers(results.get("peers") or {}),
        listings.left_out(results),
        listings.method(),
    ]
    sections = [section for section in found if section.body]
    links = "".join(f'<a href="#{s.key}">{escape(s.title)}</a>' for s in sections)
    bodies = "".join(
        f'<section id="{s.key}"><h2>{escape(s.title)}</h2>{s.body}</section>' for s in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>bigops bench: {escape(_device(machine))}</title>"
        f"<style>{_asset('report.css')}</style></head><body>{svg.markers()}<header>"
        f'<h1>bigops bench</h1><p class="summary">{escape(summary(results))}</p>{_tiles(records)}'
        f'<nav aria-label="Sections">{links}</nav></header><main>{bodies}</main>'
        f"<script>{_asset('report.js')}</script></body></html>\n"
    )


def summary(results: Json) -> str:
    """One sentence that says how fast and how true."""
    records, machine = results["records"], results["machine"]
    where = _device(machine)
    if not records:
        return f"Nothing was measured on {where}."
    threads = f" with {machine['threads']} threads" if machine["device"] == "cpu" else ""
    eager, best = (_mean(records, key) for key in ("speedup_vs_eager", "speedup_vs_best"))
    true = sum(truth(r) is True for r in records)
    return (
        f"On {where}{threads}, bigops is {eager} as fast as eager PyTorch and {best} as "
        f"fast as the best of PyTorch (geometric means of {len(records)} cases; faster than the "
        f"best in {_faster(records)}), and {true} of {len(records)} cases are within the error "
        "limit."
    )


def _tiles(records: Sequence[Json]) -> str:
    """The summary's figures, large."""
    if not records:
        return ""
    total = len(records)
    tiles = (
        (_mean(records, "speedup_vs_eager"), "as fast as eager"),
        (_mean(records, "speedup_vs_best"), "as fast as the best of PyTorch"),
        (f"{_faster(records)} / {total}", "faster than the best"),
        (f"{sum(truth(r) is True for r in records)} / {total}", "within the error limit"),
    )
    return "<dl class=tiles>{}</dl>".format(
        "".join(f"<div><dt>{name}</dt><dd>{figure}</dd></div>" for figure, name in tiles)
    )


def _device(machine: Json) -> str:
    gpu = machine.get("gpu")
    return str(gpu["name"] if gpu and machine["device"].startswith("cuda") else machine["cpu"])


def _mean(records: Sequence[Json], key: str) -> str:
    ratios = [r[key] for r in records if known(r[key]) and r[key] > 0.0]
    return f"{geometric_mean(ratios):.2f}x" if ratios else "–"


def _faster(records: Sequence[Json]) -> int:
    return sum(known(r["speedup_vs_best"]) and r["speedup_vs_best"] > 1.0 for r in records)


def _asset(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")
