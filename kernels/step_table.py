"""Lists of tensors as one launch sees them: what the optimizers' kernels share.

Torch's fused steps take a launch for every few dozen tensors, since their addresses travel as
kernel arguments; here they lie in a table on the device, a row per tensor, written anew each step
because gradients move. A program owns one chunk of one tensor; which, says a second table that
depends on the sizes only and is kept. How a chunk is gone over says step_walk.py.

In a CUDA graph the table is what it was when the step was captured: every replay copies it from
memory that is kept for good, and so are the tables of sizes. So parameters, gradients and states
have to stay where they were, as with any graph; step counts, the learning rate and what clips,
scales or skips are read on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from . import hardware
from .codes import CODE_BLOCK
from .launch import launch

# 1024 elements and 4 warps: two 16-byte accesses a thread and stream in fp32, one in bf16.
BLOCK = 1024
NUM_WARPS = 4
# Four blocks a chunk: a program's table look-ups are small beside 112 KiB of traffic.
CHUNK = tl.constexpr(4096)

# A row of the table: addresses of a parameter, its gradient, three states and its copy, of two
# states' scales and of a step count; the size, the number in the call's lists; three float64.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
STATE = tl.constexpr(2)
COPY = tl.constexpr(5)
SCALES = tl.constexpr(6)
COUNT = tl.constexpr(8)
SIZE = tl.constexpr(9)
NUMBER = tl.constexpr(10)
STEP_SIZE = tl.constexpr(11)
CORRECTION = tl.constexpr(12)
DECAY = tl.constexpr(13)
COLUMNS = tl.constexpr(14)
DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
    torch.uint8: tl.uint8,
}
# What kernels are told of columns.
KINDS = {"PARAM_DTYPE": PARAM, "GRAD_DTYPE": GRAD, "STATE_DTYPE": STATE, "COPY_DTYPE": COPY}

# Lists of tensors by their column.
Roles = Mapping[int, Sequence[Tensor]]

assert BLOCK % CODE_BLOCK.value == 0

# What graphs read whenever they are replayed: none says when it goes.
_captured: list[Any] = []


def capturing(device: torch.device) -> bool:
    """Whether launches go into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def to_device(table: np.ndarray, device: torch.device) -> Tensor:
    host = torch.from_numpy(table)
    if capturing(device):
        host = host.pin_memory()
        _captured.append(host)
    return host.to(device, non_blocking=True)


def chunks_of(sizes: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Which tensor each chunk lies in, and which chunk of it it is."""
    counts = np.array([-(-size // CHUNK.value) for size in sizes], dtype=np.int64)
    tensor = np.repeat(np.arange(len(sizes), dtype=np.int32), counts)
    index = np.arange(len(tensor), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    both = to_device(np.stack([tensor, index.astype(np.int32)]), device)
    return both[0], both[1]


class Part:
    """Tensors whose dtypes agree, role by role: what their sizes decide."""

    def __init__(self, roles: Roles, which: list[int]) -> None:
        self.which = which
        self.dtypes = {column: tensors[which[0]].dtype for column, tensors in roles.items()}
        first = next(iter(roles.values()))
        self.device = first[which[0]].device
        sizes = [first[i].numel() for i in which]
        self.table = np.zeros((len(which), COLUMNS.value), dtype=np.int64)
        self.table[:, SIZE.value] = sizes
        self.table[:, NUMBER.value] = which
        self.tensor, self.index = chunks_of(sizes, self.device)

    def filled(self, roles: Roles, numbers: np.ndarray | None = None) -> tuple[np.ndarray, bool]:
        """The table with addresses and the last three columns' numbers, and whether all elements
        begin at multiples of 16 bytes."""
        table = self.table.copy()
        for column, tensors in roles.items():
            if len(self.which) < len(tensors):
                tensors = [tensors[i] for i in self.which]
            table[:, column] = list(map(Tensor.data_ptr, tensors))
        if numbers is not None:
            table[:, STEP_SIZE.value :] = numbers[self.which].view(np.int64)
        addresses = np.bitwise_or.reduce(table[:, : SCALES.value], axis=None)
        return table, bool(addresses % 16 == 0)

    def seed(self, seed: Tensor | None) -> Tensor | None:
        """What these tensors' parameters are rounded by: bfloat16 ones only."""
        rounded = seed is not None and self.dtypes[PARAM.value] == torch.bfloat16
        return seed.to(self.device) if rounded else None

    def launch(self, kernel: Any, table: Tensor, aligned: bool, *args: Any, **meta: Any) -> None:
        """A program for each chunk; the kernel is told those dtypes that it asks for."""
        if not len(self.tensor):
            return
        types = {
            name: DTYPES.get(self.dtypes.get(column.value))
            for name, column in KINDS.items()
            if name in kernel.arg_names
        }
        with hardware.guard(self.device):
            launch(
                kernel,
                (len(self.tensor),),
                table,
                self.tensor,
                self.index,
                *args,
                ALIGNED=aligned,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
                **types,
                **meta,
            )


class Plan:
    """What a call's metadata decides: the launches, and which parameters' tensors are copied.

    Kernels take a parameter's tensors as one run of numbers each, so these must be without gaps and
    in one order: the parameter's in memory.
    """

    def __init__(self, roles: Roles) -> None:
        first = next(iter(roles.values()))
        kinds: dict[Any, list[int]] = {}
        for i, tensors in enumerate(zip(*roles.values(), strict=True)):
            kinds.setdefault(tuple(t.dtype for t in tensors), []).append(i)
        self.parts = [Part(roles, which) for which in kinds.values()]
        alike = map(lie_alike, zip(*elements(roles).values(), strict=True))
        self.copied = {i: memory_order(first[i]) for i, yes in enumerate(alike) if not yes}


# By what the caller says is alike. Calls that never return must not fill the memory.
_plans: dict[Any, Plan] = {}
MOST = 256


def plan_of(roles: Roles, alike: Any) -> Plan:
    """alike: equal for calls whose tensors agree in metadata, or None."""
    key = None if alike is None else (tuple(roles), alike)
    device = next((t.device for tensors in roles.values() for t in tensors), torch.device("cpu"))
    found = _plans.get(key)
    if capturing(device):
        # What is made in a capture holds nothing before a replay, so it serves no other call.
        found = found or Plan(roles)
        _captured.append(found)
    elif found is None:
        found = Plan(roles)
        if key is not None:
            if len(_plans) >= MOST:
                _plans.clear()
            _plans[key] = found
    return found


def elements(roles: Roles) -> Roles:
    """Those that hold a number for each of the parameter's."""
    return {column: tensors for column, tensors in roles.items() if column < SCALES.value}


def memory_order(tensor: Tensor) -> list[int]:
    """Dimensions from the outermost in memory to the innermost."""
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


def _dense(tensor: Tensor) -> bool:
    return tensor.permute(memory_order(tensor)).is_contiguous()


def lie_alike(tensors: Sequence[Tensor]) -> bool:
    if all(t.is_contiguous() for t in tensors):
        return True
    return _dense(tensors[0]) and all(t.stride() == tensors[0].stride() for t in tensors)


def dense_copies(plan: Plan, roles: Roles) -> tuple[Roles, list[tuple[Tensor, Tensor]]]:
    """The roles as kernels take them, and of what was copied for them (the tensor, its copy)."""
    copies: list[tuple[Tensor, Tensor]] = []
    if not plan.copied:
        return roles, copies
    lists = {column: list(tensors) for column, tensors in roles.items()}
    for i, order in plan.copied.items():
        for column, tensors in elements(lists).items():
            laid = tensors[i].permute(order)
            dense = laid.contiguous()
            if dense is not laid and column != GRAD.value:
                copies.append((laid, dense))
            lists[column][i] = dense
    return lists, copies


def copy_back(copies: Sequence[tuple[Tensor, Tensor]]) -> None:
    """What a launch wrote into copies; it only read gradients."""
    for tensor, dense in copies:
        tensor.copy_(dense)


def rate(lr: float | Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    """A learning rate that is known here, or one that is read on the device."""
    there = isinstance(lr, Tensor) and lr.device == device
    return (0.0, lr) if there else (float(lr), None)
