"""Calls on a CPU beside the best that PyTorch has for each, one line per goal.

Contestants take turns, of several calls if these are short: what a call finds in caches is then
mostly its own, as in a training loop, and not the contestant's before it. They share a process, and
so the allocator's state: in processes of their own it is by chance that one has its pages taken
away and mapped anew at every call, which may take longer than the call itself. A line's figure is
the median, over the turns, of the fastest PyTorch contestant's time over ours, the fastest by its
median. Behind it stand the figures of the others.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

ROUNDS = 15
TURN_SECONDS = 0.02
Call = Callable[[], Any]
Contestants = dict[str, Call]
Goal = tuple[str, Callable[[], Call], Callable[[], Contestants]]  # its name, ours, PyTorch's


def head() -> None:
    """Print what stands over the lines."""
    print(f"{'call':56} {'dtype':9} {'ours, ms':>9} {'best, ms':>9} {'ratio':>6} PyTorch")


def line(
    name: str, dtype: torch.dtype, ours: Call, theirs: Contestants, *, said: str = ""
) -> float:
    """Time a line's contestants, print it with `said` at its end, and return its figure."""
    torch._dynamo.reset()  # at eight kinds of call it stops compiling
    times = in_turns({"ours": ours, **theirs})
    others = sorted(theirs, key=lambda other: statistics.median(times[other]))
    ratios = {
        other: statistics.median(b / a for a, b in zip(times["ours"], times[other], strict=True))
        for other in others
    }
    best = others[0]
    mine, least = (1e3 * statistics.median(times[who]) for who in ("ours", best))
    more = "".join(f", {other} {ratios[other]:.2f}" for other in others[1:])
    print(
        f"{name:56} {str(dtype)[6:]:9} {mine:9.2f} {least:9.2f} {ratios[best]:6.2f} {best}{more}"
        f"{said and '; '}{said}",
        flush=True,
    )
    return ratios[best]


def in_turns(contestants: Contestants) -> dict[str, list[float]]:
    """Seconds of a call, for every turn."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for call in contestants.values():
        call()
    counts = {name: math.ceil(TURN_SECONDS / _seconds(call)) for name, call in contestants.items()}
    for _ in range(ROUNDS):
        for name, call in contestants.items():
            times[name].append(_seconds(call, counts[name]))
    return times


def _seconds(call: Call, count: int = 1) -> float:
    began = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - began) / count
