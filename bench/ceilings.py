"""What this machine can do at most, measured in the same run: the roofline's two sides.

Matrix products per dtype, and three kinds of memory streams: reading, copying (`Tensor.copy_`,
whose stores bypass the caches where that pays) and updating in place. Bandwidth depends on whether
the data fits a cache, so it is measured at the size that the case moves, rounded to a power of two.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

import torch

from bigops.bench import timing
from bigops.ops import Cost

STREAMS = ("read", "copy", "update")
SMALLEST, LARGEST = 2**20, 2**29  # bytes moved
BUDGET = 0.1  # seconds a measurement
PRODUCT_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}


@dataclass
class Ceilings:
    """Rates of one device, each measured when first asked for."""

    device: str
    flops: dict[torch.dtype, float] = field(default_factory=dict)
    bandwidths: dict[tuple[str, int], float] = field(default_factory=dict)

    def product_rate(self, dtype: torch.dtype) -> float:
        """Floating-point operations per second of torch's matrix product."""
        if dtype not in self.flops:
            sizes = PRODUCT_SIZES[torch.device(self.device).type]
            self.flops[dtype] = max(self._product_rate(dtype, size) for size in sizes)
        return self.flops[dtype]

    def bandwidth(self, stream: str, moved: float) -> float:
        """Bytes per second when `moved` bytes are read and written by `stream`."""
        size = 2 ** round(math.log2(min(max(moved, SMALLEST), LARGEST)))
        if (stream, size) not in self.bandwidths:
            self.bandwidths[stream, size] = self._bandwidth(stream, size)
        return self.bandwidths[stream, size]

    def least_seconds(self, cost: Cost, dtype: torch.dtype, stream: str) -> float:
        """The roofline: no less time than the operations take, nor than the bytes."""
        seconds = 0.0
        if cost.flops:
            seconds = cost.flops / self.product_rate(dtype)
        if cost.bytes:
            seconds = max(seconds, cost.bytes / self.bandwidth(stream, cost.bytes))
        return seconds

    def as_json(self) -> dict[str, float]:
        """What was measured, by readable names, in GFLOP/s and GB/s."""
        found = {
            f"matmul {str(dtype).removeprefix('torch.')} GFLOP/s": rate / 1e9
            for dtype, rate in self.flops.items()
        }
        for (stream, size), rate in sorted(self.bandwidths.items()):
            found[f"{stream} {size / 2**20:g} MiB GB/s"] = rate / 1e9
        return found

    def _product_rate(self, dtype: torch.dtype, size: int) -> float:
        left, right = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        return 2.0 * size**3 / self._seconds(lambda _: left @ right)

    def _bandwidth(self, stream: str, size: int) -> float:
        floats = size // 4 // (1 if stream == "read" else 2)
        # Cases on a GPU find its L2 cache cold, as their inputs rotate: so must what bounds them.
        # And a graph's replay shows small streams without their launches.
        on_gpu = torch.device(self.device).type == "cuda"
        count = timing.input_sets(self.device, size) if on_gpu else 1
        clock = timing.GraphClock(batch=max(8, count)) if on_gpu else None
        sources = [torch.randn(floats, device=self.device) for _ in range(count)]
        targets = [torch.empty_like(source) for source in sources] if stream == "copy" else []
        calls: dict[str, timing.Call] = {
            "read": lambda index: sources[index % count].sum(),
            "update": lambda index: sources[index % count].mul_(-1.0),
            "copy": lambda index: targets[index % count].copy_(sources[index % count]),
        }
        return size / self._seconds(calls[stream], clock)

    def _seconds(self, call: timing.Call, clock: timing.Clock | None = None) -> float:
        clock = clock or timing.clock_for(self.device)
        rounds = timing.contest({"it": call}, clock, BUDGET, min_rounds=3).seconds["it"]
        # A ceiling is what the machine can do, so a good moment counts more than a usual one.
        return statistics.quantiles(rounds, n=10, method="inclusive")[0]
