"""Python's values as a C++ function wants them, by the parameters that its symbol names."""

from __future__ import annotations

import ctypes
import re
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .symbols import SMALL_FLOATS, Function

DTYPES = (  # bigops::DType
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
MAX_DIMS = 8
INTEGERS = {
    "bool": 1,
    "char": 1,
    "signed char": 1,
    "unsigned char": 1,
    "short": 2,
    "unsigned short": 2,
    "int": 4,
    "unsigned int": 4,
    "long": 8,
    "unsigned long": 8,
    "long long": 8,
    "unsigned long long": 8,
}
# What a pointer to these is given; a pointer to anything else takes any tensor.
POINTEES = {
    "float": torch.float32,
    "double": torch.float64,
    "int": torch.int32,
    "long": torch.int64,
    "long long": torch.int64,
    "unsigned char": torch.uint8,
    "bool": torch.bool,
    SMALL_FLOATS["__nv_bfloat16"]: torch.bfloat16,
    SMALL_FLOATS["__half"]: torch.float16,
}
VIEW = "bigops::View"


class Registers(ctypes.Structure):
    """bigops::simt::Registers: where the ABI wants the arguments of a call."""

    _fields_ = (
        ("integers", ctypes.c_uint64 * 6),
        ("floats", ctypes.c_uint64 * 8),
        ("stack", ctypes.c_uint64 * 24),
    )


class Call(ctypes.Structure):
    """BigopsSimtLaunch of csrc/simt/python.h."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("kernel", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("order", ctypes.c_uint32),
        ("workers", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("patience", ctypes.c_double),
        ("bank_conflicts", ctypes.c_uint64),
        ("same_bits", ctypes.c_uint64),
        ("registers", Registers),
    )


class View(ctypes.Structure):
    """bigops::View of csrc/view.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("ndim", ctypes.c_int),
        ("shape", ctypes.c_int64 * MAX_DIMS),
        ("strides", ctypes.c_int64 * MAX_DIMS),
        ("dtype", ctypes.c_uint8),
        ("device_type", ctypes.c_int),
        ("device_id", ctypes.c_int),
        ("stream", ctypes.c_void_p),
    )


@dataclass
class Region:
    """Memory that kernels may touch."""

    low: int
    size: int
    name: str


@dataclass
class Placed:
    """The call's arguments: regions of tensors, and structures with the addresses in them."""

    regions: list[Region] = field(default_factory=list)
    structures: list[ctypes.Structure | ctypes.Array[Any]] = field(default_factory=list)
    # Where addresses stand: in which structure (or the call), at which offset.
    pointers: list[tuple[ctypes.Structure | ctypes.Array[Any], int]] = field(default_factory=list)


def place(
    function: Function, args: Sequence[Any], memory: Sequence[torch.Tensor], call: Call
) -> Placed:
    """Write the arguments into the call's registers."""
    placed = Placed()
    parameters = function.parameters
    if parameters is None:
        parameters = tuple(_guessed(function, i, value) for i, value in enumerate(args))
    if len(parameters) != len(args):
        raise TypeError(
            f"{function.name} takes {len(parameters)} arguments {parameters}, got {len(args)}"
        )
    integers, floats, stack = iter(range(6)), iter(range(8)), iter(range(24))
    registers = call.registers
    for i, (parameter, value) in enumerate(zip(parameters, args, strict=True)):
        where = f"{function.name}: argument {i} ({parameter})"
        parameter = parameter.removesuffix(" const").removesuffix(" __restrict")
        if parameter in ("float", "double"):
            if not isinstance(value, (int, float)):
                raise TypeError(f"{where} takes a number, got {type(value).__name__}")
            word = struct.unpack("<Q", struct.pack("<d", value))[0]
            if parameter == "float":
                word = struct.unpack("<I", struct.pack("<f", value))[0]
            slot, bank = next(floats, None), registers.floats
        else:
            word = _word(where, parameter, value, i, placed)
            slot, bank = next(integers, None), registers.integers
        if slot is None:
            slot, bank = next(stack, None), registers.stack
        if slot is None:
            raise TypeError(f"{function.name} takes more arguments than the model can pass")
        bank[slot] = word
        if parameter.endswith(("*", "&")):
            offset = Call.registers.offset + ctypes.addressof(bank) - ctypes.addressof(registers)
            placed.pointers.append((call, offset + 8 * slot))
    for tensor in memory:
        _add(placed, tensor, "memory")
    return placed


def _guessed(function: Function, i: int, value: Any) -> str:
    if value is None or isinstance(value, (torch.Tensor, ctypes.Structure)):
        return "void*"
    if isinstance(value, int):
        return "long"
    raise TypeError(
        f'{function.name} is extern "C", which does not tell whether argument {i} is a float or a '
        'double: declare it without extern "C"'
    )


def _word(where: str, parameter: str, value: Any, i: int, placed: Placed) -> int:
    if parameter.endswith(("*", "&")):
        pointee = re.sub(r"\bconst\b|\bvolatile\b|[*&]$", "", parameter).strip()
        if value is None:
            return 0
        if isinstance(value, ctypes.Structure):
            placed.structures.append(value)
            return ctypes.addressof(value)
        if isinstance(value, (list, tuple)) and pointee == VIEW:
            return _views(where, value, i, placed)
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{where} takes a tensor, got {type(value).__name__}")
        if value.device.type != "cpu":
            raise ValueError(f"{where}: the tensor is on {value.device}, not on the CPU")
        _add(placed, value, f"argument {i}")
        if pointee == VIEW:
            view = _view(where, value)
            placed.structures.append(view)
            placed.pointers.append((view, View.data.offset))
            return ctypes.addressof(view)
        if pointee in POINTEES and value.dtype != POINTEES[pointee]:
            raise TypeError(f"{where}: the tensor is {value.dtype}")
        return value.data_ptr()
    if "::" in parameter and parameter not in INTEGERS and not isinstance(value, int):
        raise TypeError(f"{where}: only numbers, pointers and references can be passed")
    if not isinstance(value, int):
        raise TypeError(f"{where} takes an integer, got {type(value).__name__}")
    bits = 8 * INTEGERS.get(parameter, 4)  # an enumeration's are an int's
    if not -(1 << (bits - 1)) <= value < 1 << bits:
        raise OverflowError(f"{where} cannot hold {value}")
    return value & ((1 << 64) - 1)


def _views(where: str, tensors: Sequence[torch.Tensor], i: int, placed: Placed) -> int:
    views = (View * len(tensors))(*(_view(where, tensor) for tensor in tensors))
    placed.structures.append(views)
    for k, tensor in enumerate(tensors):
        _add(placed, tensor, f"argument {i}[{k}]")
        placed.pointers.append((views, k * ctypes.sizeof(View) + View.data.offset))
    return ctypes.addressof(views)


def _add(placed: Placed, tensor: torch.Tensor, name: str) -> None:
    if tensor.numel() == 0:
        return
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = (last + 1) * tensor.element_size()
    placed.regions.append(Region(tensor.data_ptr(), size, name))


def _view(where: str, tensor: torch.Tensor) -> View:
    if tensor.dim() > MAX_DIMS or tensor.dtype not in DTYPES:
        raise TypeError(f"{where}: no View of {tensor.dim()} dimensions of {tensor.dtype}")
    view = View(ndim=tensor.dim(), dtype=DTYPES.index(tensor.dtype), device_type=1)
    view.data = tensor.data_ptr() if tensor.numel() else None
    view.shape[: tensor.dim()] = tensor.shape
    view.strides[: tensor.dim()] = tensor.stride()
    return view


_one_runs = threading.Lock()


def run(library: ctypes.CDLL, offset: int, call: Call, placed: Placed) -> tuple[str, str]:
    """In this process: the error, and the findings' text."""
    # A handle of dlopen is its link_map, whose first field is added to addresses in the file.
    call.function = ctypes.c_size_t.from_address(library._handle).value + offset
    library.bigops_simt_run.restype = ctypes.c_char_p
    library.bigops_simt_take_findings.restype = ctypes.c_char_p
    with _one_runs:
        for region in placed.regions:
            library.bigops_simt_add_region(
                ctypes.c_void_p(region.low), ctypes.c_size_t(region.size), region.name.encode()
            )
        try:
            error = library.bigops_simt_run(ctypes.byref(call)) or b""
        finally:
            for region in placed.regions:
                library.bigops_simt_remove_region(ctypes.c_void_p(region.low))
        text = library.bigops_simt_take_findings()
    return error.decode(), text.decode()
