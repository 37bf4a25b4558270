"""CUDA C++ kernels on the CPU, with what is wrong in them: no GPU, no CUDA toolkit, only g++.

    module = simt.compile("scale.cu", build="race")
    findings = module.launch("scale", grid=2, block=128, args=[x, y, 3.0, 200])
    assert not findings

The guide, and what the model finds, is csrc/README.md; the model itself is csrc/simt/.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..extension import BuildError
from . import apart, arguments, build, symbols
from .symbols import Finding

__all__ = ["BuildError", "Finding", "Module", "compile", "why_not"]

ORDERS = ("forward", "reverse", "shuffled")  # bigops::simt::Order

Size = int | Sequence[int]

why_not = build.why_not


def compile(source: str | Path, build: str = "plain", *, flags: Sequence[str] = ()) -> Module:
    """Build a .cu file for the model; again only where it, a header or the model has changed.

    Args:
        source: the file. Its kernels are started by `Module.launch`, or by its own functions
            through `bigops::cuda::launch` (csrc/cuda/device/launch.h): g++ cannot parse `<<<>>>`.
        build: "plain" is the fastest and sees what cannot go on (deadlocks, collectives that
            differ); "race" checks every access (races, shared memory never written, bounds,
            alignment, fences); "address" is AddressSanitizer and UndefinedBehaviorSanitizer.
        flags: further ones for g++, such as -I.

    Raises:
        BuildError: with the first lines of the compiler's message, or the reason of `why_not`.
    """
    return Module(Path(source).resolve(), build, tuple(flags))


class Module:
    """The kernels and functions of one compiled file, by the names they have in it."""

    def __init__(self, source: Path, kind: str, flags: tuple[str, ...]) -> None:
        self.source = source
        self.file = build.kernel(source, kind, flags)
        self._symbols = symbols.Symbols(self.file)
        self._apart = build.address_program() if kind == "address" else None
        self._library = None if self._apart else ctypes.CDLL(str(self.file))

    def launch(
        self,
        kernel: str,
        *,
        grid: Size,
        block: Size,
        args: Sequence[Any] = (),
        shared: int = 0,
        order: str = "forward",
        seed: int = 0,
        workers: int = 0,
        patience: float = 10.0,
        bank_conflicts: bool = False,
        same_bits: bool = False,
    ) -> list[Finding]:
        """Run a kernel once per thread of the grid and return what was found.

        Args:
            kernel: its name; an instantiation of a template as in `scale<float, 4>`. Namespaces may
                be left out.
            grid, block: up to three numbers, x first.
            args: one per parameter: tensors (or None) for pointers, Python's numbers for numbers.
                Only what these tensors span may be touched.
            shared: bytes of dynamic shared memory.
            order: in which threads run: "forward", "reverse" or "shuffled" (by `seed`). What comes
                out must not depend on it.
            workers: OS threads, on which blocks run; 0: as many as cores.
            patience: after how many seconds in which all threads of a block only poll
                (`__nanosleep`) they are taken to do so forever.
            bank_conflicts: in the race build, shared memory's are counted and reported too.
            same_bits: in the race build, floats that are added atomically must be added in an order
                that is enforced, so that sums have the same bits in every run.
        """
        call = _call(order, seed, workers, patience, bank_conflicts, same_bits)
        call.kernel = 1
        call.grid[:], call.block[:], call.shared_bytes = _dim3(grid), _dim3(block), shared
        return self._run(kernel, args, (), call)

    def call(
        self,
        function: str,
        *args: Any,
        memory: Sequence[torch.Tensor] = (),
        order: str = "forward",
        seed: int = 0,
        workers: int = 0,
        patience: float = 10.0,
        bank_conflicts: bool = False,
        same_bits: bool = False,
    ) -> list[Finding]:
        """Call an ordinary function that launches kernels, and return what was found in these.

        Tensors become `const bigops::View&` (csrc/view.h) where the function takes that, lists of
        them a pointer to as many, else pointers to data; structures of ctypes serve for other
        references. `memory` names further tensors that kernels may touch, whose addresses they get
        in some other way.
        """
        call = _call(order, seed, workers, patience, bank_conflicts, same_bits)
        return self._run(function, args, memory, call)

    def _run(
        self,
        name: str,
        args: Sequence[Any],
        memory: Sequence[torch.Tensor],
        call: arguments.Call,
    ) -> list[Finding]:
        function = self._symbols.function(name)
        placed = arguments.place(function, args, memory, call)
        if self._apart is not None:
            error, text = apart.run(self._apart, self.file, function.offset, call, placed)
        else:
            assert self._library is not None
            error, text = arguments.run(self._library, function.offset, call, placed)
        found = self._symbols.findings(text)
        if error:
            raise RuntimeError("\n".join([f"{name}: {error}", *map(str, found)]))
        return found


def _call(
    order: str, seed: int, workers: int, patience: float, bank_conflicts: bool, same_bits: bool
) -> arguments.Call:
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    number = ORDERS.index(order)
    return arguments.Call(
        order=number,
        seed=seed,
        workers=workers,
        patience=patience,
        bank_conflicts=bank_conflicts,
        same_bits=same_bits,
    )


def _dim3(size: Size) -> tuple[int, int, int]:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    if not 1 <= len(sizes) <= 3 or any(n < 1 for n in sizes):
        raise ValueError(f"grid and block are one to three positive numbers, got {size!r}")
    return (*sizes, 1, 1)[:3]  # type: ignore[return-value]
