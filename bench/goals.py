"""Calls on a CPU beside the best that PyTorch has for each, one line per goal.

Every contestant has a process of its own, and they take turns of some calls: what a call finds in
caches and in the allocator's hands is its own, as in a training loop. (In one process one's freed
memory spares another page faults, which may take longer than a call.) A line's figure is the
median, over the turns, of the fastest PyTorch contestant's time over ours, the fastest by its
median. Behind it stand the figures of the others.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Collection, Iterable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

ROUNDS = 15
TURN_SECONDS = 0.02
THREADS = 2
Call = Callable[[], Any]
Contestants = dict[str, Call]
Goal = tuple[str, Callable[[], Call], Callable[[], Contestants]]  # its name, ours, PyTorch's
Lines = Callable[[], Iterable[tuple[torch.dtype, Goal]]]


class Ready(NamedTuple):
    """What a process says of a line: who it is, how long a call takes, what is to be told."""

    name: str
    dtype: str
    who: str | None  # nobody, if there are fewer contestants
    seconds: float
    said: str


def compare(
    lines: Lines,
    word: str = "",
    *,
    without: Collection[str] = (),
    tell: Callable[[Call], str] | None = None,
    others: int = 4,
) -> list[float]:
    """Print a line for each goal with `word` in its name; returns their figures.

    Args:
        lines: a function of a module's top level, called in every process.
        without: contestants that are left out.
        tell: what is said of our call at the line's end.
        others: at most so many contestants of PyTorch's.
    """
    print(f"{'call':56} {'dtype':9} {'ours, ms':>9} {'best, ms':>9} {'ratio':>6} PyTorch")
    spawn, seats, figures = multiprocessing.get_context("spawn"), [], []
    for seat in range(others + 1):
        here, there = spawn.Pipe()
        args = (there, seat, lines, word, without, tell if seat == 0 else None)
        spawn.Process(target=_contestant, args=args, daemon=True).start()
        there.close()
        seats.append(here)
    while (ready := [_asked(seat, 0) for seat in seats])[0] is not None:
        playing = [(seat, r) for seat, r in zip(seats, ready, strict=True) if r.who is not None]
        times: dict[str, list[float]] = {r.who: [] for _, r in playing}
        for _ in range(ROUNDS):
            for seat, r in playing:
                times[r.who].append(_asked(seat, math.ceil(TURN_SECONDS / r.seconds)))
        figures.append(_print(ready[0], times))
    return figures


def _asked(seat: Connection, count: int) -> Any:
    seat.send(count)
    return seat.recv()


def _contestant(
    parent: Connection,
    seat: int,
    lines: Lines,
    word: str,
    without: Collection[str],
    tell: Callable[[Call], str] | None,
) -> None:
    """Answers a number of calls by the seconds of one, and 0 by the next line it is ready for."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    assert parent.recv() == 0
    for dtype, (name, ours, theirs) in lines():
        if word not in name:
            continue
        torch._dynamo.reset()  # at eight kinds of call it stops compiling
        who: str | None = "ours"
        call: Call | None = None
        if seat == 0:
            call = ours()
        else:
            known = [(w, c) for w, c in theirs().items() if w not in without]
            who, call = known[seat - 1] if seat <= len(known) else (None, None)
        if call is not None:
            call()
        seconds = 0.0 if call is None else _seconds(call, 1)
        said = tell(call) if tell is not None and call is not None else ""
        parent.send(Ready(name, str(dtype)[6:], who, seconds, said))
        while count := parent.recv():
            parent.send(_seconds(call, count))
    parent.send(None)


def _seconds(call: Call, count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - began) / count


def _print(line: Ready, times: dict[str, list[float]]) -> float:
    others = sorted(times.keys() - {"ours"}, key=lambda other: statistics.median(times[other]))
    ratios = {
        other: statistics.median(b / a for a, b in zip(times["ours"], times[other], strict=True))
        for other in others
    }
    best = others[0]
    mine, least = (1e3 * statistics.median(times[who]) for who in ("ours", best))
    more = "".join(f", {other} {ratios[other]:.2f}" for other in others[1:])
    print(
        f"{line.name:56} {line.dtype:9} {mine:9.2f} {least:9.2f} {ratios[best]:6.2f} {best}{more}"
        f"{line.said and '; '}{line.said}",
        flush=True,
    )
    return ratios[best]
