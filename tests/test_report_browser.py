"""The report as headless Chromium shows it: at desktop and phone width, in light and dark.

The page stands, unchanged, in a frame of the width to be tried, since a headless window is never
narrower than 500 pixels; a script outside the frame looks at it and writes down what it found.
"""

from __future__ import annotations

import html
import json
import os
import re
import runpy
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigops.bench import report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome on PATH"
)

FULL = runpy.run_path(str(Path(__file__).with_name("report_results.py")))["full"]
HEIGHT = 1000
DESKTOP, PHONE = 1280, 390
COLOURS = {  # of report.css, by dark or not: the background, our series
    False: ("#ffffff", "#0b7a55"),
    True: ("#0e1217", "#3ecf95"),
}
FRAME = """<!doctype html><html style="color-scheme: light dark"><meta charset="utf-8">
<body style="margin: 0"><script>
async function look(frame) {{
  const view = frame.contentWindow, page = frame.contentDocument;
  const all = selector => [...page.querySelectorAll(selector)];
  found.textContent = JSON.stringify(await (async () => {{ {script} }})());
}}
</script><iframe onload="look(this)" srcdoc="{page}"
style="display: block; border: 0; width: {width}px; height: {height}px"></iframe>
<pre id="found"></pre>"""  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """What the script returned, the picture's pixels in 0 to 255, and the console's lines."""

    found: Any
    pixels: np.ndarray
    console: list[str]


def look(
    page: str, folder: Path, script: str = "", width: int = DESKTOP, dark: bool = False
) -> Seen:
    """Show the page and run `script`, a function's body that knows `view`, `page` and `all`."""
    pyplot_image = pytest.importorskip("matplotlib.image")
    shown = FRAME.format(script=script, page=html.escape(page), width=width, height=HEIGHT)
    (folder / "frame.html").write_text(shown, encoding="utf-8")
    command = [
        str(CHROMIUM), "--headless", "--disable-gpu", "--hide-scrollbars",
        *(["--no-sandbox"] if os.geteuid() == 0 else []),  # root has none
        f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{HEIGHT}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--enable-logging=stderr",
        "--virtual-time-budget=5000", f"--screenshot={folder / 'page.png'}", "--dump-dom",
        (folder / "frame.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    pixels = pyplot_image.imread(folder / "page.png")[..., :3] * 255
    return Seen(
        json.loads(html.unescape(found[1]) or "null"),
        pixels.round().astype(int),
        [line for line in done.stderr.splitlines() if ":CONSOLE" in line],
    )


def rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


LAYOUT = """
  all("details").forEach(d => d.open = true);
  all(".open").forEach(button => button.click());
  const inside = e => e.closest("figure").getBoundingClientRect();
  const letters = all("svg text").map(t => {
    const { a, b } = t.getScreenCTM();
    return parseFloat(view.getComputedStyle(t).fontSize) * Math.hypot(a, b);
  });
  return {
    dark: view.matchMedia("(prefers-color-scheme: dark)").matches,
    wide: page.documentElement.scrollWidth,
    outside: all("svg text").filter(t => {
      const { left, right } = t.getBoundingClientRect();
      return left < inside(t).left || right > inside(t).right;
    }).map(t => t.textContent),
    smallest: Math.min(...letters),
    largest: Math.max(...letters),
    scrolls: all(".frame").map(f => view.getComputedStyle(f).overflowX),
  };
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_it_fits_and_follows_the_system(width: int, dark: bool, tmp_path: Path) -> None:
    seen = look(report.page(FULL()), tmp_path, LAYOUT, width, dark)
    assert not seen.console
    assert seen.found["dark"] == dark
    assert seen.found["wide"] == width
    assert seen.found["outside"] == []
    assert 10.0 <= seen.found["smallest"] <= seen.found["largest"] <= 16.0
    assert set(seen.found["scrolls"]) == {"auto"}
    assert seen.pixels.shape == (HEIGHT, width, 3)
    background, ours = map(rgb, COLOURS[dark])
    for corner in ((2, 2), (2, -3), (-3, 2)):
        assert seen.pixels[corner].tolist() == background
    # The bars of the first figures are in sight.
    assert (seen.pixels == ours).all(axis=-1).sum() > 1000


SORT = """
  const table = all("#cases table")[0], heads = [...table.tHead.rows[0].cells];
  const column = name => heads.findIndex(h => h.textContent === name);
  const press = (name, times) => {
    for (let i = 0; i < times; i++) heads[column(name)].querySelector("button").click();
    return [...table.tBodies].map(body => body.rows[0].cells[column(name)].textContent);
  };
  return {
    down: press("x eager", 1), state: heads.map(h => h.ariaSort).filter(Boolean),
    up: press("x eager", 1), words: press("op or model", 2),
    missing: press("GFLOP/s", 1).at(-1),
    together: [...table.tBodies].every(body => body.rows.length === 2
      && body.rows[1].textContent.includes(body.rows[0].cells[0].textContent)),
    tabs: heads.every(h => h.querySelector("button").tabIndex === 0),
  };
"""


def test_a_head_sorts_its_column(tmp_path: Path) -> None:
    seen = look(report.page(FULL()), tmp_path, SORT)
    assert not seen.console
    down = [float(word) for word in seen.found["down"]]
    assert down == sorted(down, reverse=True)
    assert down[0] == 8.5
    assert down[-1] == 0.8
    assert seen.found["state"] == ["descending"]
    assert [float(word) for word in seen.found["up"]] == down[::-1]
    assert seen.found["words"] == sorted(seen.found["words"], key=str.lower)
    assert seen.found["missing"] == "–"
    assert seen.found["together"]
    assert seen.found["tabs"]


USE = """
  const button = all("#case-1 .open")[0], more = page.getElementById("case-1-more");
  const before = [more.hidden, button.ariaExpanded];
  button.click();
  const after = [more.hidden, button.ariaExpanded];
  const third = page.getElementById("case-2-more");
  view.location.hash = "#case-2";
  await new Promise(next => setTimeout(next, 50));
  const point = all("#roofline g")[0], tip = all(".tip")[0];
  const hidden = tip.hidden;
  point.dispatchEvent(new view.PointerEvent("pointerenter", { clientX: 300, clientY: 300 }));
  const told = [hidden, tip.hidden, tip.textContent];
  const box = tip.getBoundingClientRect();
  point.dispatchEvent(new view.PointerEvent("pointerleave"));
  let written = null;
  const clipboard = value =>
    Object.defineProperty(view.navigator, "clipboard", { value, configurable: true });
  clipboard({ writeText: async text => { written = text; } });
  more.querySelector(".copy").click();
  await new Promise(next => setTimeout(next, 50));
  const copied = more.querySelector(".copy").textContent;
  clipboard(undefined);
  more.querySelector(".copy").click();
  return { before, after, told, again: tip.hidden, onScreen: box.right < view.innerWidth,
    linked: third.hidden, written, copied, selected: String(view.getSelection()).trim(),
    titles: all("svg title").length };
"""


def test_rows_open_points_tell_and_commands_are_copied(tmp_path: Path) -> None:
    seen = look(report.page(FULL()), tmp_path, USE, PHONE)
    assert not seen.console
    assert seen.found["before"] == [True, "false"]
    assert seen.found["after"] == [False, "true"]
    assert seen.found["linked"] is False
    hidden, still, told = seen.found["told"]
    assert hidden
    assert not still
    assert told.startswith("1: attention, 1x8x2048x64, fp32, forward: 290 GFLOP/s")
    assert seen.found["again"]
    assert seen.found["onScreen"]
    command = "bigops bench attention --case '2x8:2x1024x64 causal' --dtype bfloat16"
    assert seen.found["written"].startswith(command)
    assert seen.found["copied"] == "Copied"
    assert seen.found["selected"].startswith(command)
    assert seen.found["titles"] == 0  # or the browser would show each a second time


def test_a_page_of_nothing_shows(tmp_path: Path) -> None:
    made = FULL() | {"records": [], "training": None, "overhead": []}
    seen = look(report.page(made), tmp_path, "return all('section').map(s => s.id)", PHONE)
    assert not seen.console
    assert seen.found == ["machine", "peers", "left-out", "method"]


def test_an_error_of_a_page_is_seen(tmp_path: Path) -> None:
    seen = look("<p><script>missing()</script>", tmp_path)
    assert any("missing is not defined" in line for line in seen.console)
