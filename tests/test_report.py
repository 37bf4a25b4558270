"""The report: well-formed, escaped, readable in both schemes, complete for any results."""

from __future__ import annotations

import math
import re
import runpy
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bigops.bench import report
from bigops.bench.report import charts, roofline, svg
from bigops.bench.report.roofline import Ceilings, Point
from bigops.bench.report.sweeps import sweeps

MADE_UP = runpy.run_path(str(Path(__file__).with_name("report_results.py")))
record, swept, results, full = (MADE_UP[n] for n in ("record", "swept", "results", "full"))
machine = MADE_UP["machine"]

VOID = {"meta", "br", "hr", "input", "link", "img"}
HOSTILE = "</style></script><script>alert(1)</script><b title='\"&"


class Element:
    """A tag with its attributes, the words right within it, and what it stands in."""

    def __init__(self, tag: str, attrs: dict[str, str | None], parents: list[Element]) -> None:
        self.tag, self.attrs, self.parents, self.words = tag, attrs, parents, ""

    def within(self, other: Element) -> bool:
        return any(parent is other for parent in self.parents)


class Page(HTMLParser):
    """The page's elements in order; a tag that is not closed where it must be fails."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[Element] = []
        self._open: list[Element] = []
        self.feed(html)
        self.close()
        assert not self._open, [element.tag for element in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        self.elements.append(Element(tag, dict(attrs), list(self._open)))
        if tag not in VOID:
            self._open.append(self.elements[-1])

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, dict(attrs), list(self._open)))

    def handle_data(self, data: str) -> None:
        if self._open:
            self._open[-1].words += data

    def all(self, tag: str) -> list[Element]:
        return [element for element in self.elements if element.tag == tag]

    def words(self, tag: str) -> list[str]:
        return [element.words for element in self.all(tag)]


def test_the_page_has_every_section() -> None:
    page = Page(report.page(full()))
    assert page.words("h2") == [
        "Speed-up", "Against size", "Roofline", "Memory", "Every case", "Trained beside its twin",
        "Call overhead", "The machine", "Peers", "Left out, and why", "How this was measured",
    ]  # fmt: skip
    text = " ".join(element.words for element in page.elements)
    for words in (
        report.summary(full()),
        *("attention, *x8xSx64 causal, bf16, forward", "90.00%", "95.00%", "Some Processor"),
        *("matmul float32, 400 GFLOP/s", "update 32 MiB, 110 GB/s", "copy 64 MiB, 50.0 GB/s"),
        *("20.0 MiB", "eager 300 MiB", "7% of eager's", "flash-attn", "not installed"),
        "no cudnn: needs a GPU",
    ):
        assert words in text, words


def test_it_needs_no_network_and_no_other_file() -> None:
    html = report.page(full())
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\bsrc=|<link|<img|<iframe", html)
    page = Page(html)
    ids = [element.attrs["id"] for element in page.elements if "id" in element.attrs]
    assert len(ids) == len(set(ids))
    targets = [str(element.attrs["href"]) for element in page.all("a")]
    assert targets
    assert {target.removeprefix("#") for target in targets} <= set(ids)


def test_headings_descend_one_by_one() -> None:
    page = Page(report.page(full()))
    levels = [int(e.tag[1]) for e in page.elements if re.fullmatch("h[1-6]", e.tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_every_figure_has_its_picture_and_its_command() -> None:
    page = Page(report.page(full()))
    figures = page.all("figure")
    assert len(figures) == 15
    for figure in figures:
        pictures = [e for e in page.all("svg") if e.within(figure) and "role" in e.attrs]
        assert pictures
        commands = "".join(e.words for e in page.all("code") if e.within(figure))
        assert all(line.startswith("bigops ") for line in commands.splitlines())
        assert commands
    for picture in page.all("svg"):
        if picture.attrs.get("aria-hidden") != "true":
            titles = [e.words for e in page.all("title") if e.parents[-1] is picture]
            assert picture.attrs["role"] == "img"
            assert [picture.attrs["aria-label"]] == titles
            assert titles != [""]


def test_every_record_has_a_row_that_holds_its_command() -> None:
    made = full()
    page = Page(report.page(made))
    for index, found in enumerate(made["records"]):
        body = next(e for e in page.elements if e.attrs.get("id") == f"case-{index}")
        (command,) = (e.words for e in page.all("code") if e.within(body))
        assert command.startswith(f"bigops bench {found.get('op') or found['model']} ")
        assert command.endswith("--threads 2")
        cells = [e.words for e in page.elements if e.within(body) and e.tag in ("th", "td")]
        assert found["case"] in cells


def test_what_was_not_measured_is_said_so_and_sorted_last() -> None:
    page = Page(report.page(results([record(peak_bytes=None), record(error=3e-7)])))
    cells = [(e.words, e.attrs.get("data-key")) for e in page.all("td")]
    assert ("–", "-Infinity") in cells
    assert ("NO", None) in cells


@pytest.mark.parametrize("where", ["case", "op", "best_name", "dtype", "pass", "backend"])
def test_words_of_records_do_not_break_out(where: str) -> None:
    hostile = record(**{where: HOSTILE, "peers_ms": {HOSTILE: 1.0}})
    sweep = {"sweep": {"name": HOSTILE, "value": 512}}
    page = Page(report.page(results([hostile, hostile | sweep])))
    assert len(page.all("script")) == 1
    assert not page.all("b")
    assert any(HOSTILE in element.words for element in page.elements)


def test_other_words_do_not_break_out() -> None:
    made = full() | {
        "notes": [HOSTILE],
        "failed": [HOSTILE],
        "peers": {HOSTILE: HOSTILE},
        "machine": machine(cpu=HOSTILE, os=HOSTILE, ceilings={HOSTILE: 1.0}),
        "overhead": [MADE_UP["OVERHEAD"] | {"op": HOSTILE}],
        "training": MADE_UP["TRAINING"] | {"model": HOSTILE},
    }
    page = Page(report.page(made))
    assert len(page.all("script")) == 1
    assert not page.all("b")
    assert page.words("li").count(HOSTILE) == 2


def bare(**changes: Any) -> dict[str, Any]:
    """A record of which next to nothing was measured."""
    nothing = dict.fromkeys(
        ("compile_ms", "torch_share", "error", "eager_error", "error_limit", "peak_bytes",
         "eager_peak_bytes", "gflops", "gbytes", "percent_of_limit", "speedup_vs_best", "best_name",
         "best_ms", "speedup_vs_eager", "spread")
    )  # fmt: skip
    return record(**(nothing | {"peers_ms": {"eager": None}} | changes))


OLD = {k: v for k, v in record().items() if k not in ("peers_ms", "sweep", "options")}
GPU = {
    "device": "cuda:0",
    "gpu": {"name": "Some GPU", "capability": "9.0", "memory_bytes": 2**36, "cuda": "13.0"},
}
ON_GPU = record(device="cuda:0", case="1x8x2048x64 (CUDA graph)")


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (results([], training=None, overhead=[], notes=[]), "Nothing was measured on Some Proc"),
        (results([record()], training=None), "geometric means of 1 cases"),
        (results([bare()]), "0 of 1 cases are within"),
        (results([bare(sweep={"name": "S", "value": 2048})]), "1x8xSx64, fp32"),
        (results([record(gflops=290.0)], machine=machine(ceilings={})), "FLOP per byte"),
        (results([record(percent_of_limit=None, gflops=0.0)]), "Bandwidth"),
        (results([record(gflops=math.nan, speedup_vs_eager=math.nan)]), "On Some Processor"),
        (results([record(peak_bytes=0, eager_peak_bytes=0)]), "bigops 0 MiB"),
        (results([ON_GPU], machine=machine(**GPU)), "On Some GPU, bigops"),
        ({k: v for k, v in results([OLD]).items() if k != "peers"}, "--dtype float32 --threads"),
        (results([record(dtype="float8_e4m3fn")]), "1x8x2048x64, float8_e4m3fn"),
        (results([record()], peers=[{"name": "quack", "version": None, "reason": "no"}]), "quack"),
    ],
)
def test_any_results_make_a_page(made: dict[str, Any], said: str) -> None:
    page = Page(report.page(made))
    assert any(said in element.words for element in page.elements)
    assert not any("nan" in str(element.attrs.values()) for element in page.elements)


def test_four_hundred_records_stay_under_three_megabytes() -> None:
    made = [
        r
        for case in range(100)
        for r in swept(peers_ms={f"peer {i}": 1.0 + i for i in range(8)}, op=f"op {case}")
    ]
    assert len(made) == 400
    html = report.page(results(made))
    assert len(html.encode()) < 3e6
    assert Page(html).all("figure")


def test_a_sweep_is_what_differs_in_one_size() -> None:
    steps = swept((512, 1024), **{"pass": "step"})
    found = sweeps([*swept((4096, 512)), *steps, *swept((512,)), record()])
    assert [(s.case, [r["sweep"]["value"] for r in s.records]) for s in found] == [
        ("*x8xSx64 causal", [512, 4096]),
        ("*x8xSx64 causal", [512, 1024]),
        ("32x8xSx64 causal", [512]),
    ]
    times = found[0].times()
    assert list(times) == ["bigops", "eager", "compile"]
    assert times["eager"] == [(512, 3e-5 * 512**2), (4096, 3e-5 * 4096**2)]
    rates = found[0].rates("gflops")
    assert rates["bigops"] == [(512, 290.0), (4096, 290.0)]
    assert rates["eager"][0][1] == pytest.approx(290.0 / 3)


def positions(drawn: str) -> list[tuple[float, float]]:
    """Where the marks of a picture are."""
    found = re.findall(r'<use href="#m\d" x="([\d.]+)" y="([\d.]+)"', drawn)
    return [(float(x), float(y)) for x, y in found]


def test_points_at_a_limit_lie_on_its_line() -> None:
    points = [Point(1, 1.0, 50.0, 0, "on the slope"), Point(2, 100.0, 400.0, 0, "on the roof")]
    drawn = roofline.roofline(points, Ceilings({("matmul", 0): 400.0}, {"copy": 50.0}))
    slope, roof = positions(drawn)
    lines = {
        kind: [float(number) for number in found]
        for *found, kind in re.findall(
            r'd="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)" class="(roof|roof s0)"', drawn
        )
    }
    assert roof[1] == lines["roof s0"][1] == lines["roof s0"][3]
    x1, y1, x2, y2 = lines["roof"]
    assert slope[1] == pytest.approx(y1 + (y2 - y1) * (slope[0] - x1) / (x2 - x1), abs=0.2)
    # The two limits meet at 400 / 50 FLOP per byte.
    assert lines["roof s0"][0] == x2


def test_a_square_law_is_a_straight_line() -> None:
    points = [(size, size**2) for size in (1.0, 10.0, 100.0)]
    drawn = positions(charts.lines("t", [charts.Line("a", 0, points)], "S", "ms"))
    (x0, y0), (x1, y1), (x2, y2) = drawn
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2)
    assert y0 > y1 > y2


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize(("low", "high"), [(0.8, 1.2), (0.3, 9.0), (1e-4, 1e9), (37.0, 37000.0)])
def test_ticks_are_few_and_within(low: float, high: float, log: bool) -> None:
    ticks = svg.Scale(low, high, 0.0, 100.0, log).ticks(7)
    assert 2 <= len(ticks) <= 7
    assert all(low * (1 - 1e-9) <= tick <= high * (1 + 1e-9) for tick in ticks)


def test_labels_are_pushed_apart() -> None:
    placed = svg.apart([50.0, 51.0, 10.0, 99.0], 15.0, 0.0, 100.0)
    assert placed == [50.0, 65.0, 10.0, 99.0]
    assert svg.apart([99.0, 98.0], 15.0, 0.0, 100.0) == [100.0, 85.0]


def test_series_differ_without_colour() -> None:
    looks = {re.sub(r' class="[^"]*"', "", svg.swatch(style)) for style in range(12)}
    assert len(looks) == 12


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance of #rgb or #rrggbb."""
    digits = colour.removeprefix("#")
    digits = "".join(d * 2 for d in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_colours_can_be_told_from_their_background() -> None:
    css = Path(report.__file__).with_name("report.css").read_text()
    schemes = [dict(re.findall(r"--([a-z0-9]+): (#\w+)", block)) for block in
               re.findall(r":root \{(.*?)\}", css, re.DOTALL)]  # fmt: skip
    assert [len(scheme) for scheme in schemes] == [13, 13]
    for scheme in schemes:
        for name in set(scheme) - {"back", "panel", "line"}:
            for background in ("back", "panel"):
                light, dark = sorted((luminance(scheme[name]), luminance(scheme[background])))[::-1]
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, background)
