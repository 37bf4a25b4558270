"""What the schedule of a CUDA C++ kernel allows it to reach, before any GPU has run it.

A model, not a measurement. The work of one tile on a multiprocessor is counted as clocks at three
stations: tensor cores, shared memory (operands that warps load themselves) and vector units
(softmax); and as a wait (barriers, latencies) that holds nobody else up. Tiles under way at the
same time are customers that go round these stations and meet at random: their throughput is that of
a closed queueing network, by mean value analysis (Reiser and Lavenberg 1980). How many there are is
what a schedule is about:

- "none": a block's warps meet at a barrier for each tile (in the backward pass, since each needs
  the gradients of scores that the others have); only co-resident blocks overlap. What a tile's own
  steps overlap is not counted, which the bound is there for;
- "between": warpgroups go on their own (ping-pong), each is a customer;
- "within": a warpgroup issues the next tile's products before it has done with this one: two each.

With very many customers the busiest station never waits, which is the bound that is given too. How
often blocks have nothing left to do follows from dealing the output tiles out to multiprocessors.
What the sustained clock makes of all that is in schedule_parts.py, with the numbers' sources; the
kernels, and the published ones that the model is held against, are in schedule_kernels.py.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from .architectures import ARCHITECTURES, Occupancy, occupancy
from .schedule_parts import (
    ARITHMETIC_LATENCY,
    BARRIER_LATENCY,
    COMPARISONS,
    EXPONENTIAL_LATENCY,
    EXPONENTIALS,
    MEMORY_LATENCY,
    PACKS,
    PRODUCT_LATENCY,
    SHARED_BYTES,
    SHUFFLE_LATENCY,
    Part,
)

GROUP_ROWS = 64  # of a wgmma
STEP = 16  # the depth of one matrix instruction, 16-bit operands
WIDE = 2  # bytes of an operand's element
ACCUMULATOR = 4  # bytes


@dataclass(frozen=True)
class Attention:
    """The schedule of an attention kernel: a block keeps `outer` rows (forward: of queries;
    backward: of keys) and walks over tiles of `inner` rows of the other kind."""

    kernel: str
    head_size: int
    outer: int
    inner: int
    groups: int  # that share `outer`: warpgroups, or sets of four warps
    instruction: str  # "wgmma" or "mma.sync"
    overlap: str  # "none", "between" or "within", see above
    registers: int  # of a thread at launch
    threads: int
    slots: int  # inner tiles, of either kind, that shared memory holds
    barriers: int = 3  # waits for each tile
    outer_tiles: int = 1  # with two, the next one's are loaded while this one's results are stored
    backward: bool = False
    # Warps share the gradients otherwise than the scores: weights, too, go through shared memory,
    # and the gradient of queries is added in L2 from registers.
    exchange: bool = False
    sum_with_exponential: bool = False  # else a pass of its own
    heaviest_first: bool = False  # else in the order of rows
    multicast: int = 1  # blocks of a cluster that share loads of inner tiles

    @property
    def tile(self) -> str:
        return f"{self.outer}x{self.inner}"

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block; barriers are few."""
        kinds = 2 if self.backward else 1  # keys and values are kept, or queries
        kept = kinds * self.outer_tiles * self.outer * self.head_size * WIDE
        ring = self.slots * self.inner * self.head_size * WIDE
        # With wgmma this tile's and the one's before.
        copies = (2 if self.instruction == "wgmma" else 1) * (2 if self.exchange else 1)
        grad_scores = copies * self.outer * self.inner * WIDE
        grad_query = 0 if self.exchange else self.inner * self.head_size * ACCUMULATOR
        return kept + ring + (grad_scores + grad_query if self.backward else 0)

    @property
    def inner_bytes(self) -> int:
        """Of the two inner tiles that one step needs."""
        return 2 * self.inner * self.head_size * WIDE

    def fits(self, part: Part) -> Occupancy:
        """Blocks on a multiprocessor."""
        return occupancy(
            ARCHITECTURES[part.target], self.registers, self.shared, self.threads // 32
        )


@dataclass(frozen=True)
class Stream:
    """The schedule of a kernel that is as fast as memory: bytes moved once."""

    kernel: str
    registers: int
    threads: int
    flight: int  # bytes of loads that a thread has under way
    bytes_per_element: int


@dataclass(frozen=True)
class Call:
    """16-bit attention of as many queries as keys, within `tokens` in all and 2048 columns."""

    length: int
    causal: bool
    tokens: int = 16384
    columns: int = 2048

    def heads(self, head_size: int) -> int:
        """Batch times heads."""
        return self.tokens // self.length * (self.columns // head_size)

    def __str__(self) -> str:
        return f"{'causal' if self.causal else 'full'} {self.length // 1024}k"


@dataclass(frozen=True)
class Demand:
    """Clocks that one customer's tile takes at each station, and how many customers there are."""

    peak: float  # of its products, were tensor cores at their full rate
    tensor: float
    shared: float
    vector: float
    wait: float
    l2: float  # the multiprocessor's share of L2: loads ahead, for which nobody waits
    banks: float  # all that reads or writes shared memory, waited for or not
    customers: int

    @property
    def stations(self) -> tuple[float, float, float]:
        return self.tensor, self.shared, self.vector

    @property
    def longest(self) -> dict[str, float]:
        """Clocks that a tile cannot go below however tiles overlap, by what they are spent on."""
        return {
            "tensor cores": self.tensor,
            "shared memory": self.banks,
            "vector units": self.vector,
            "L2": self.l2,
        }


@dataclass(frozen=True)
class Allowed:
    """What the model says of one schedule, call and part."""

    kernel: str
    part: str
    call: str
    tile: str
    overlap: str
    blocks: int  # on a multiprocessor, and what limits them
    limited_by: str
    tensor: float  # clocks a tile
    shared: float
    vector: float
    wait: float
    customers: int
    flight_bytes: int  # that loads may have under way on a multiprocessor
    needed_bytes: int  # to be under way by Little's law
    bound: float  # share of the tensor cores' peak if tiles overlapped perfectly
    share: float  # share while tiles are met at random
    busy_share: float  # share over the whole launch, of products that count
    clock: float  # GHz
    tflops: float  # 0 of a kernel that only moves bytes
    terabytes: float  # a second, of such a kernel
    bottleneck: str


def demand(schedule: Attention, part: Part) -> Demand:
    """What one customer asks of a multiprocessor for one tile."""
    one = schedule.overlap == "none"  # of the block as a whole
    share = 1 if one else schedule.groups
    flop = (10 if schedule.backward else 4) * schedule.outer * schedule.inner * schedule.head_size
    peak = flop / share / part.matrix_rate
    if schedule.instruction == "wgmma":  # reads its operands itself, as it goes
        clocks, read = (x * schedule.groups / share for x in _wgmma(schedule, part))
        tensor, operands, own_loads = clocks, read / SHARED_BYTES, 0.0
    else:
        read = (_backward_ldmatrix_bytes if schedule.backward else _ldmatrix_bytes)(schedule)
        operands = own_loads = read / SHARED_BYTES
        tensor = peak / part.mma_sync
    vector, stores = (_backward_vector if schedule.backward else _softmax)(schedule, part, share)
    products = 5 if schedule.backward else 2
    moved = schedule.inner_bytes / schedule.multicast
    if schedule.backward:  # the gradient of queries is added in L2
        moved += schedule.inner * schedule.head_size * ACCUMULATOR
    return Demand(
        peak,
        tensor,
        own_loads + stores,
        vector,
        schedule.barriers * BARRIER_LATENCY + products * PRODUCT_LATENCY,
        moved / share / part.l2_bytes,
        operands + stores + schedule.inner_bytes / share / SHARED_BYTES,
        schedule.fits(part).programs * share * (2 if schedule.overlap == "within" else 1),
    )


def _wgmma(schedule: Attention, part: Part) -> tuple[float, float]:
    """Clocks of tensor cores and bytes of shared memory that a warpgroup's products take. A step of
    one, 16 of depth, reads A (its rows, unless they are in registers) and B, and cannot be faster
    than that."""
    d, inner, outer = schedule.head_size, schedule.inner, schedule.outer
    # Depth, rows, columns, rows of A to read.
    scores: tuple[float, float, float, float] = (d, GROUP_ROWS, inner, GROUP_ROWS)
    values: tuple[float, float, float, float] = (inner, GROUP_ROWS, d, 0)
    products = [scores, values]
    part_of_head = d / schedule.groups
    if schedule.exchange:
        scores = (d, GROUP_ROWS, inner / schedule.groups, GROUP_ROWS)
        values = (inner, GROUP_ROWS, part_of_head, GROUP_ROWS)
        products = [scores, scores, values, values, (outer, inner, part_of_head, inner)]
    elif schedule.backward:
        grad_query = (outer, part_of_head, inner, part_of_head)
        products = [scores, scores, values, values, grad_query]
    clocks = read = 0.0
    for depth, rows, columns, rows_of_a in products:
        step = (rows_of_a + columns) * STEP * WIDE
        flop = 2 * rows * columns * STEP
        clocks += depth / STEP * max(flop / part.matrix_rate, step / SHARED_BYTES)
        read += depth / STEP * step
    return clocks, read


def _ldmatrix_bytes(schedule: Attention) -> float:
    """Every warp loads both inner tiles and its own rows of the outer one for each tile."""
    return 4 * schedule.groups * schedule.inner_bytes + schedule.outer * schedule.head_size * WIDE


def _backward_ldmatrix_bytes(schedule: Attention) -> float:
    """A warp loads both operands of its part of each product, (rows + columns) * depth elements:
    of scores half of the queries, of the gradients half of the head."""
    d, inner, outer, warps = (
        schedule.head_size, schedule.inner, schedule.outer, schedule.threads // 32,
    )  # fmt: skip
    across = warps // 2 if d % (8 * warps) == 0 else 2  # parts of the head, for the queries' sums
    keys = outer * 2 / warps
    scores, grads = (inner / 2 + keys) * d, (keys + d / 2) * inner
    sums = (inner * across / warps + d / across) * outer
    return warps * WIDE * (2 * scores + 2 * grads + sums)


def _softmax(schedule: Attention, part: Part, share: int) -> tuple[float, float]:
    """Clocks of vector units and of shared memory. The passes over a tile's scores follow each
    other; each takes as long as its slowest unit, and a running maximum or sum as long as its chain
    at least: a lane has a quarter of a row."""
    rows = schedule.outer / share
    scores = rows * schedule.inner
    chain = schedule.inner / 4 * ARITHMETIC_LATENCY
    maximum = max(scores / COMPARISONS, chain) + 2 * (SHUFFLE_LATENCY + ARITHMETIC_LATENCY)
    factor = 2 * ARITHMETIC_LATENCY + EXPONENTIAL_LATENCY  # what older sums are multiplied by
    additions = scores / part.fp32
    if schedule.sum_with_exponential:
        exponential, total = max(scores / EXPONENTIALS, 2 * additions), 0.0
    else:
        exponential, total = max(scores / EXPONENTIALS, additions), max(additions, chain)
    packs = scores / 2 / PACKS
    rescale = rows * schedule.head_size / part.fp32
    return maximum + factor + exponential + total + packs + rescale, 0.0


def _backward_vector(schedule: Attention, part: Part, share: int) -> tuple[float, float]:
    """P = 2^(S - lse), dS = P * (dP - delta), both packed; dS and fp32 dQ go to shared memory, or
    dS and P."""
    scores = schedule.outer * schedule.inner / share
    exponential = max(scores / EXPONENTIALS, scores / part.fp32)
    vector = exponential + 2 * scores / part.fp32 + 2 * scores / 2 / PACKS
    other = schedule.inner * schedule.head_size / share * ACCUMULATOR  # dQ
    if schedule.exchange:
        other = scores * WIDE
    return vector, (scores * WIDE + other) / SHARED_BYTES


def throughput(stations: Sequence[float], wait: float, customers: int) -> float:
    """Tiles a clock of a closed network of single servers, by exact mean value analysis."""
    queues = [0.0] * len(stations)
    rate = 0.0
    for count in range(1, customers + 1):
        times = [clocks * (1 + queue) for clocks, queue in zip(stations, queues, strict=True)]
        rate = count / (wait + sum(times))
        queues = [rate * time for time in times]
    return rate


def allowed(schedule: Attention, part: Part, call: Call) -> Allowed:
    """Run the model."""
    asked, fits = demand(schedule, part), schedule.fits(part)
    if not fits.programs:
        raise ValueError(f"{schedule.kernel} {schedule.tile} does not fit on {part.name}")
    bottleneck = max(asked.longest, key=lambda name: asked.longest[name])
    shortest = asked.longest[bottleneck]
    rate = min(throughput(asked.stations, asked.wait, asked.customers), 1 / shortest)
    share = rate * asked.peak
    clock = part.clock(share)
    # A block advances by a tile when each of its customers' tiles is done.
    of_block = 1 if schedule.overlap == "none" else schedule.groups
    step = fits.programs * of_block / rate
    useful, clocks = _launch(schedule, part, call, step, fits.programs)
    tflops = useful / clocks * clock / 1e3
    flight = fits.programs * schedule.slots * schedule.inner_bytes // 2
    needed = schedule.inner_bytes * fits.programs / step * MEMORY_LATENCY
    return Allowed(
        schedule.kernel, part.name, str(call), f"D {schedule.head_size}, {schedule.tile}",
        schedule.overlap, fits.programs, fits.limit,
        asked.tensor, asked.shared, asked.vector, asked.wait, asked.customers,
        flight, round(needed), asked.peak / shortest, share,
        tflops / clock / part.peak, clock, tflops, 0.0, bottleneck,
    )  # fmt: skip


def _launch(
    schedule: Attention, part: Part, call: Call, step: float, blocks: int
) -> tuple[float, float]:
    """FLOP that count, and clocks until the last block is done: output tiles in their order, each
    to the block that is free first."""
    count = -(-call.length // schedule.outer)
    steps = [_steps(schedule, call, tile) for tile in range(count)]
    if schedule.heaviest_first:
        steps.sort(reverse=True)
    # Each output tile: the first loads, and with "within" a pipeline that fills and drains.
    extra = 0.0 if schedule.outer_tiles > 1 else float(MEMORY_LATENCY)
    extra += step if schedule.overlap == "within" else 0.0
    heads = call.heads(schedule.head_size)
    order = [n for n in steps for _ in range(heads)] if schedule.heaviest_first else steps * heads
    free = [0.0] * (part.multiprocessors * blocks)
    for n in order:
        heapq.heapreplace(free, free[0] + n * step + extra)
    per_pair = 10 if schedule.backward else 4
    flop = per_pair * call.length**2 * schedule.head_size * heads / (2 if call.causal else 1)
    return flop, max(free)


def _steps(schedule: Attention, call: Call, tile: int) -> int:
    """Inner tiles that an outer one meets."""
    if not call.causal:
        return -(-call.length // schedule.inner)
    if schedule.backward:  # keys are seen by their own rows and all later ones
        return -(-call.length // schedule.inner) - tile * schedule.outer // schedule.inner
    return -(-min(call.length, (tile + 1) * schedule.outer) // schedule.inner)


def streaming(schedule: Stream, part: Part) -> Allowed:
    """The roofline of a kernel that moves each byte once: all of the bandwidth if loads enough are
    under way (Little's law), else what those under way bring."""
    if not part.stream_tbs:
        raise ValueError(f"no bandwidth was measured on {part.name}")
    architecture = ARCHITECTURES[part.target]
    fits = occupancy(architecture, schedule.registers, 0, schedule.threads // 32)
    flight = fits.programs * schedule.threads * schedule.flight
    per_clock = part.stream_tbs * 1e3 / part.top_clock / part.multiprocessors
    needed = round(per_clock * MEMORY_LATENCY)
    share = min(1.0, flight / needed)
    return Allowed(
        schedule.kernel, part.name, "fp32", f"{schedule.bytes_per_element} B an element", "none",
        fits.programs, fits.limit, 0.0, 0.0, 0.0, 0.0, fits.programs, flight, needed,
        1.0, share, share, part.top_clock, 0.0, share * part.stream_tbs, "memory",
    )  # fmt: skip
