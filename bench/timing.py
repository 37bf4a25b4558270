"""The one place that times. Contestants alternate; figures are ratios taken pair by pair.

A machine's speed drifts (clocks, neighbours, page cache), and what drifts slowly hits contestants
that run right after one another alike. So a round measures every contestant once, A B C, then
A B C again, and a speed-up is the median over the rounds of b's time over a's time *in the same
round*; its spread is the interquartile range of these ratios. Warm-up (first calls, compilation,
thread pools) comes before and is not counted. Every call of a contestant gets an index by which it
picks its input, so that inputs rotate; what the last call returned is read after the clock stopped.

On a CUDA device the clock is a pair of events around a batch of calls. Inputs rotate over more
bytes than the L2 cache holds, so that each call finds it cold, and a graph clock replays the same
calls captured as a CUDA graph: for kernels of a few microseconds it shows the kernels' time where
the events show the launches'.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Call = Callable[[int], Any]  # takes the index of its input

MIN_ROUNDS = 5
MAX_ROUNDS = 400
# So few rounds do, once so much time beyond the budget is spent.
FEWEST_ROUNDS, LONG_SECONDS = 2, 10.0
# Shorter samples than this show the clock's own cost (0.1 us) and the scheduler's.
SAMPLE_SECONDS = 1e-3


class Clock(Protocol):
    """Measures `count` calls with the indices `first`, `first` + 1, ...; seconds per call."""

    def measure(self, call: Call, first: int, count: int) -> float: ...

    def now(self) -> float:
        """Host seconds, for the budget."""
        ...


class CpuClock:
    """The host's monotonic clock."""

    def now(self) -> float:
        return time.perf_counter()

    def measure(self, call: Call, first: int, count: int) -> float:
        start = self.now()
        for index in range(first, first + count):
            result = call(index)
        seconds = (self.now() - start) / count
        use(result)
        return seconds


class CudaClock:
    """Device events around a batch of calls on the current stream."""

    def now(self) -> float:
        return time.perf_counter()

    def measure(self, call: Call, first: int, count: int) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for index in range(first, first + count):
            result = call(index)
        stop.record()
        stop.synchronize()
        use(result)
        return start.elapsed_time(stop) / 1e3 / count


class GraphClock(CudaClock):
    """Device events around the replay of `batch` calls captured as one CUDA graph.

    A capture fixes the inputs' addresses, so a batch goes once through all input sets; `first` and
    `count` only say how often it is replayed. Gradients are captured with their forward pass.
    """

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._graphs: dict[Call, tuple[torch.cuda.CUDAGraph, list[Any]]] = {}

    def measure(self, call: Call, first: int, count: int) -> float:
        if call not in self._graphs:
            self._graphs[call] = self._capture(call)
        graph, results = self._graphs[call]
        replays = math.ceil(count / self._batch)
        seconds = super().measure(lambda _: graph.replay(), 0, replays) / self._batch
        use(results[-1])
        return seconds

    def _capture(self, call: Call) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
        # Capture wants a warm allocator and warm kernels, on a stream other than the default.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for index in range(min(3, self._batch)):
                call(index)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            # The results stay referenced: the graph writes into their memory at each replay.
            results = [call(index) for index in range(self._batch)]
        return graph, results


def clock_for(device: str) -> Clock:
    """The clock that measures work on `device`."""
    return CudaClock() if torch.device(device).type == "cuda" else CpuClock()


def input_sets(device: str, bytes_of_one: int) -> int:
    """How many input sets to rotate: two on a CPU, on a GPU more than twice its L2 cache holds."""
    if torch.device(device).type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    free, _ = torch.cuda.mem_get_info(device)
    wanted = 2 + 2 * cache // max(bytes_of_one, 1)
    return int(max(2, min(wanted, free // 8 // max(bytes_of_one, 1), 256)))


def use(result: Any) -> None:
    """Read one element of every tensor in `result`."""
    for leaf in pytree.tree_leaves(result):
        if isinstance(leaf, Tensor) and leaf.numel():
            leaf.detach()[(-1,) * leaf.dim()].item()


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """The interquartile range."""
        return self.high - self.low


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of `values`."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


@dataclass
class Contest:
    """Seconds per call of every contestant, one number per round."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """Median seconds per call."""
        return statistics.median(self.seconds[name])

    def speedup(self, name: str, over: str) -> Spread:
        """How many times faster `name` is than `over`, from the pairs of each round."""
        pairs = zip(self.seconds[over], self.seconds[name], strict=True)
        return spread([baseline / ours for baseline, ours in pairs])

    def excess(self, name: str, over: str) -> Spread:
        """Seconds by which `name` is slower than `over`, from the pairs of each round."""
        pairs = zip(self.seconds[over], self.seconds[name], strict=True)
        return spread([ours - baseline for baseline, ours in pairs])

    def fastest(self, names: Sequence[str]) -> str:
        """The one of `names` with the least median time."""
        return min(names, key=self.median)


def contest(
    contestants: Mapping[str, Call],
    clock: Clock,
    budget: float,
    *,
    sample_seconds: float = SAMPLE_SECONDS,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
) -> Contest:
    """Let contestants alternate for about `budget` seconds.

    Args:
        contestants: what each calls; results are used, inputs chosen by the index.
        clock: measures calls.
        budget: seconds; at least `min_rounds` rounds are made all the same, unless these would
            take long.
        sample_seconds: a contestant is called so often per round that it takes at least this long.
    """
    counts = {name: _warm_up(call, clock, sample_seconds) for name, call in contestants.items()}
    result = Contest({name: [] for name in contestants})
    start = clock.now()
    for round_ in range(max_rounds):
        spent = clock.now() - start
        if round_ >= min_rounds and spent >= budget:
            break
        # Calls of seconds differ less from round to round than the short ones do.
        if round_ >= FEWEST_ROUNDS and spent >= budget + LONG_SECONDS:
            break
        for name, call in contestants.items():
            seconds = clock.measure(call, round_ * counts[name], counts[name])
            result.seconds[name].append(seconds)
    return result


def _warm_up(call: Call, clock: Clock, sample_seconds: float) -> int:
    """Call until times settle; returns the number of calls that one sample takes."""
    clock.measure(call, 0, 1)
    seconds = clock.measure(call, 1, 1)
    if seconds < sample_seconds:
        count = max(1, math.ceil(sample_seconds / max(seconds, 1e-7)))
        seconds = clock.measure(call, 0, count)
    return max(1, math.ceil(sample_seconds / max(seconds, 1e-7)))
