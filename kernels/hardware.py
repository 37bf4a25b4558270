"""What launchers ask of the hardware, in one place, so that someone else may answer.

A tensor on a GPU is served by that GPU; one on the CPU is interpreted, unless `pretend` names what
its kernels are compiled for, as the compile ledger does.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton


class Hardware(NamedTuple):
    """A GPU, as far as launchers choose by it."""

    arch: str  # "sm_90", "gfx942"; empty where kernels are interpreted
    multiprocessors: int
    shared: int  # bytes of shared memory that one program may hold

    @property
    def interpreted(self) -> bool:
        return not self.arch

    @property
    def descriptors(self) -> bool:
        """Whether it has the tensor memory accelerator, which Triton reaches by descriptors."""
        return self.interpreted or (self.arch.startswith("sm_") and int(self.arch[3:]) >= 90)

    @property
    def tf32(self) -> bool:
        """Whether products of fp32 may be TF32: of AMD's, Triton takes it on some only."""
        return not self.arch.startswith("gfx")


INTERPRETED = Hardware("", 1, 227 << 10)
_pretended: Hardware | None = None


def of(tensor: torch.Tensor) -> Hardware:
    """What kernels on this tensor run on."""
    if _pretended is not None:
        return _pretended
    return _gpu(tensor.device) if tensor.is_cuda else INTERPRETED


@functools.cache
def _gpu(device: torch.device) -> Hardware:
    found = triton.runtime.driver.active.utils.get_device_properties(device.index)
    if torch.version.hip:
        arch = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    else:
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return Hardware(arch, found["multiprocessor_count"], found["max_shared_mem"])


@contextlib.contextmanager
def pretend(hardware: Hardware) -> Iterator[None]:
    """Inside, every tensor is on `hardware`."""
    global _pretended
    before, _pretended = _pretended, hardware
    try:
        yield
    finally:
        _pretended = before


def state(tensor: torch.Tensor) -> tuple[object, ...]:
    """What launchers choose by, besides their arguments: the device and torch's flags."""
    if tensor.dtype != torch.float32:
        return of(tensor), tensor.device
    flags = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    return of(tensor), tensor.device, *flags


_NOTHING_TO_DO = contextlib.nullcontext()


def guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes the device the current one: where Triton launches."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING_TO_DO
    return torch.cuda.device(device)
