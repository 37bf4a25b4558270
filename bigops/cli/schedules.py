"""What `bigops inspect` says of the CUDA C++ kernels' schedules: a model, not a measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..ledger.schedule import Allowed
from ..ledger.schedule_kernels import PUBLISHED, Kernel, kernels
from ..ledger.schedule_parts import ASSUMPTIONS
from . import words

HEADERS = (
    "kernel", "GPU", "call", "tile", "blocks", "tensor", "shared", "vector", "wait", "under way",
    "in flight", "bound", "share", "launch", "GHz", "allows", "busiest",
)  # fmt: skip
LEGEND = (
    "blocks: on a multiprocessor. tensor, shared, vector, wait: clocks of a tile. under way: tiles "
    "at a time. in flight: KB that loads may have, and must by Little's law. share: of the tensor "
    "cores' time while tiles meet at random; bound: if they never met; launch: with ends and masks."
)


def choose(chosen: Sequence[str], op: str | None, target: str | None, call: str) -> list[Kernel]:
    """The kernels that the command's words choose; none where they ask for a Triton call."""
    return [
        kernel
        for kernel in kernels()
        if not call
        and (not chosen or kernel.op in chosen or kernel.schedule.kernel in chosen)
        and op in (None, kernel.op)
        and target in (None, kernel.part.target)
    ]


def as_json(found: Sequence[Kernel]) -> dict[str, Any]:
    """The rows, and how far the model is from what others measured."""
    return {
        "schedules": [
            {"op": kernel.op, **asdict(row)}
            for kernel in found
            for row in kernel.rows()
        ],
        "published": [
            {
                "what": p.what, "part": p.part.name, "call": str(p.call), "source": p.source,
                "measured_tflops": p.tflops, "model_tflops": p.model.tflops,
                "deviation": p.deviation,
            }
            for p in PUBLISHED
        ],
    }  # fmt: skip


def show(found: Sequence[Kernel], explained: bool) -> None:
    """The table; with what it rests on if `explained`."""
    rows = [_row(row) for kernel in found for row in kernel.rows()]
    title = "CUDA C++ kernels, what their schedules allow: a model, not a measurement"
    words.print_table(title, HEADERS, rows)
    if not rows or not explained:
        return
    print(LEGEND)
    if any(row.tensor for kernel in found for row in kernel.rows()):
        checks = [
            [p.what, p.part.name, str(p.call), f"{p.tflops:.0f}", f"{p.model.tflops:.0f}",
             f"{p.deviation:+.1%}", p.source]
            for p in PUBLISHED
        ]  # fmt: skip
        headers = ("kernel", "GPU", "call", "TFLOP/s", "model", "deviation", "source")
        words.print_table("The same model on published kernels", headers, checks)
    for line in ASSUMPTIONS:
        print(f"assumed: {line}")


def _row(row: Allowed) -> list[str]:
    allows = f"{row.tflops:.0f} TFLOP/s" if row.tflops else f"{row.terabytes:.2f} TB/s"
    return [
        row.kernel, row.part, row.call, row.tile,
        f"{row.blocks} by {row.limited_by}",
        *(f"{clocks:.0f}" for clocks in (row.tensor, row.shared, row.vector, row.wait)),
        str(row.customers), f"{row.flight_bytes / 1e3:.0f} of {row.needed_bytes / 1e3:.0f}",
        f"{row.bound:.0%}", f"{row.share:.0%}", f"{row.busy_share:.0%}", f"{row.clock:.2f}",
        allows, row.bottleneck,
    ]  # fmt: skip
