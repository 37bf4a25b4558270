"""Lists of tensors as one launch sees them: what the optimizers' kernels share.

Torch's fused steps take a launch for every few dozen tensors, since their addresses travel as
kernel arguments; here they lie in a table on the device, a row per tensor, written anew each step
because gradients move. A program owns one chunk of one tensor; which, says a second table that
depends on the sizes only and is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import hardware
from .launch import launch

# 1024 elements and 4 warps: two 16-byte accesses a thread and stream in fp32, one in bf16.
BLOCK = 1024
NUM_WARPS = 4
# Four blocks a chunk: a program's table look-ups are small beside 112 KiB of traffic.
CHUNK = tl.constexpr(4096)

# A row of the table: five addresses, the size, and two float64 in their bits.
COLUMNS = tl.constexpr(8)
SIZE = tl.constexpr(5)
STEP_SIZE = tl.constexpr(6)
CORRECTION = tl.constexpr(7)
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def pointer(row, start, ROLE: tl.constexpr, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """The address in a row's column, start elements on. Accesses are as wide as the alignment that
    the compiler knows of; it takes the hint on the addition only, not on the address itself."""
    return tl.multiple_of(tl.load(row + ROLE).to(tl.pointer_type(DTYPE)) + start, ALIGN)


@triton.jit
def number_of(row, COLUMN: tl.constexpr):
    return tl.load(row + COLUMN).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def factor_of(sign, norm_ptr, scale_ptr, max_grad_norm):
    """What gradients are multiplied by: torch.nn.utils.clip_grad_norm_'s coefficient, unscaled."""
    inv_scale = 1.0
    if scale_ptr is not None:
        inv_scale = 1.0 / tl.load(scale_ptr).to(tl.float32)
    factor = sign * inv_scale
    if norm_ptr is not None:
        coefficient = max_grad_norm / (tl.load(norm_ptr).to(tl.float32) * inv_scale + 1e-6)
        # Written so that a NaN comes through, as in torch.
        factor *= tl.where(coefficient > 1.0, 1.0, coefficient)
    return factor


def chunks_of(sizes: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Which tensor each chunk lies in, and which chunk of it it is."""
    counts = np.array([-(-size // CHUNK.value) for size in sizes], dtype=np.int64)
    tensor = np.repeat(np.arange(len(sizes), dtype=np.int32), counts)
    index = np.arange(len(tensor), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    both = torch.from_numpy(np.stack([tensor, index.astype(np.int32)])).to(device)
    return both[0], both[1]


class Part:
    """The tensors of one dtype: what their sizes decide."""

    def __init__(self, first: Sequence[Tensor], which: list[int]) -> None:
        self.which = which
        self.dtype, self.device = first[which[0]].dtype, first[which[0]].device
        sizes = [first[i].numel() for i in which]
        self.table = np.zeros((len(which), COLUMNS.value), dtype=np.int64)
        self.table[:, SIZE.value] = sizes
        self.tensor, self.index = chunks_of(sizes, self.device)

    def launch(
        self,
        kernel: Any,
        roles: Sequence[Sequence[Tensor]],
        numbers: np.ndarray | None,
        *args: Any,
        **meta: Any,
    ) -> None:
        """One launch; `roles` are the table's first columns, `numbers` its last two."""
        if not len(self.tensor):
            return
        table = self.table.copy()
        for role, tensors in enumerate(roles):
            if tensors:
                if len(self.which) < len(tensors):
                    tensors = [tensors[i] for i in self.which]
                table[:, role] = list(map(Tensor.data_ptr, tensors))
        if numbers is not None:
            table[:, STEP_SIZE.value :] = numbers[self.which].view(np.int64)
        addresses = np.bitwise_or.reduce(table[:, : SIZE.value], axis=None)
        with hardware.guard(self.device):
            launch(
                kernel,
                (len(self.tensor),),
                torch.from_numpy(table).to(self.device, non_blocking=True),
                self.tensor,
                self.index,
                *args,
                DTYPE=DTYPES[self.dtype],
                ALIGN=16 if addresses % 16 == 0 else self.dtype.itemsize,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
                **meta,
            )


class Plan:
    """What a call's metadata decides: the launches, and which parameters' tensors are copied.

    Kernels take a parameter's tensors as one run of numbers each, so these must be without gaps and
    in one order.
    """

    def __init__(self, roles: Sequence[Sequence[Tensor]]) -> None:
        self.parts = [Part(roles[0], which) for which in by_dtype(roles[0]).values()]
        alike = [lie_alike(tensors) for tensors in zip(*roles, strict=True)]
        self.copied = [i for i, yes in enumerate(alike) if not yes]


# By what the caller says is alike. Calls that never return must not fill the memory.
_plans: dict[Any, Plan] = {}
MOST = 256


def plan_of(roles: Sequence[Sequence[Tensor]], alike: Any) -> Plan:
    found = _plans.get(alike) if alike is not None else None
    if found is None:
        found = Plan(roles)
        if alike is not None:
            if len(_plans) >= MOST:
                _plans.clear()
            _plans[alike] = found
    return found


def _dense(tensor: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def lie_alike(tensors: Sequence[Tensor]) -> bool:
    if all(t.is_contiguous() for t in tensors):
        return True
    return _dense(tensors[0]) and all(t.stride() == tensors[0].stride() for t in tensors)


def by_dtype(tensors: Sequence[Tensor]) -> dict[torch.dtype, list[int]]:
    found: dict[torch.dtype, list[int]] = {}
    for i, tensor in enumerate(tensors):
        found.setdefault(tensor.dtype, []).append(i)
    return found


def dense_copies(
    plan: Plan, roles: Sequence[Sequence[Tensor]]
) -> tuple[Sequence[Sequence[Tensor]], list[tuple[Tensor, Tensor]]]:
    """The roles as kernels take them, and of what was copied for them (the tensor, its copy)."""
    copies: list[tuple[Tensor, Tensor]] = []
    if not plan.copied:
        return roles, copies
    lists = [list(tensors) for tensors in roles]
    for i in plan.copied:
        for tensors in lists:
            dense = tensors[i].contiguous()
            copies += [] if dense is tensors[i] else [(tensors[i], dense)]
            tensors[i] = dense
    return lists, copies


def copy_back(copies: Sequence[tuple[Tensor, Tensor]], grads: Sequence[Tensor]) -> None:
    """What a launch wrote into copies; it only read gradients."""
    for tensor, dense in copies:
        if all(tensor is not grad for grad in grads):
            tensor.copy_(dense)
